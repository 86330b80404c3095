# make demo   train, cut and decode a small nested language model; report in runs/demo/
# make test   the whole test suite
# make lint   the linter
# make chaos  train a small model while its processes are killed, its disk filled and its checkpoints cut
# make parity the tests that `make test` skips: against PyTorch, transformers, the evaluation harness, Optuna and Ray
# make aot    compile every Pallas kernel for TPUs and a GPU that are not here; report in docs/results/kernels/aot.md
# Each sets itself up in .venv, `make parity` and `make aot` in their own (3 GB of peers, 1.2 GB of compilers). Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS = setup.cfg pyproject.toml constraints.txt

.PHONY: demo test lint chaos parity aot
.DELETE_ON_ERROR:

demo: .venv/stamp-run
	.venv/bin/python -m experiments.demo --workdir=runs/demo

test: .venv/stamp-test
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 15

chaos: .venv/stamp-test
	.venv/bin/python -m tests.training.chaos

lint: .venv/stamp-lint
	.venv/bin/ruff check .

# Those files whose tests are skipped where a peer is missing.
parity: .venv-parity/stamp
	.venv-parity/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 \
	  $$(grep -rlE "importorskip|parity|is not installed" tests --include='test_*.py')

aot: .venv-aot/stamp
	.venv-aot/bin/python -m experiments.bench.aot

# A stamp is written only after its install succeeded, so an interrupted one is done again.
.venv/stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv-parity/stamp: $(INPUTS)
	$(PYTHON) -m venv --clear .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[test,parity,eval,sweep]'
	@touch $@

.venv-aot/stamp: $(INPUTS)
	$(PYTHON) -m venv --clear .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[aot]'
	@touch $@

.venv/stamp-run: .venv/stamp-python $(INPUTS)
	$(PIP) -e .
	@touch $@

.venv/stamp-test: .venv/stamp-python $(INPUTS)
	$(PIP) -e '.[test]'
	@touch $@

.venv/stamp-lint: .venv/stamp-python constraints.txt
	$(PIP) ruff
	@touch $@
