"""Runs many variants of a config: those that its `get_sweep` lists, or those that a searcher proposes.

    python -m experiments.sweep --config=configs/matlm.py:tiny --workdir=runs/sweep
    python -m experiments.sweep --config=configs/matlm.py:tiny --workdir=runs/sweep --config.seed=1 --parallel=2
    python -m experiments.sweep --config=configs/matlm.py:tiny --workdir=runs/tpe --search=tpe
    python -m experiments.sweep --config=... --workdir=/shared/sweep --backend=ray --address=auto --resources=GPU=1

Each trial is a run of `experiments.train` with a workdir of its own below the sweep's; as many run at a time as there
is room for. The same command again goes on: trials that are over are not run again, one that was interrupted
continues from its checkpoint, and one whose process crashed is started again `--retries` times. A run whose loss
diverged is marked so, and a mistake in a config fails its trial at once. At the end there are `table.csv`, `table.md`
and figures.

With --search=tpe, Optuna proposes the points of the sweep's `space` and trials worse than the median of the others at
the same step are pruned; its storage lies in the workdir. Ray and Optuna: pip install -e '.[sweep]'.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from experiments.sweeping.backends import Backend
    from experiments.sweeping.search import Search
    from experiments.sweeping.trials import Trial, Trials
    from research.training.sweeps import Sweep

PROGRAM = cli.Program(__doc__)
CONFIG = PROGRAM.config_flag()
WORKDIR = PROGRAM.workdir_flag("Where the sweep is kept, and continued from if it is there.", required=True)
BACKEND = PROGRAM.define(flags.DEFINE_enum, "backend", "local", "Where trials run.", ["local", "ray"])
ADDRESS = PROGRAM.define(
    flags.DEFINE_string,
    "address",
    None,
    "The Ray cluster (auto, or ray://host:port); without it, one is started here.",
)
RESOURCES = PROGRAM.define(
    flags.DEFINE_list,
    "resources",
    "CPU=1",
    "What a trial takes of a Ray cluster: GPU=1, TPU-v4-8-head=1, CPU=2,GPU=1.",
)
PARALLEL = PROGRAM.define(
    flags.DEFINE_integer,
    "parallel",
    None,
    "The most trials at a time; by default as many as fit.",
    lower_bound=1,
)
RETRIES = PROGRAM.define(
    flags.DEFINE_integer,
    "retries",
    2,
    "How often a trial whose process crashed is started again.",
    lower_bound=0,
)
SEARCH = PROGRAM.define(flags.DEFINE_enum, "search", None, "Who proposes points.", ["tpe"])
POLL = 0.2  # seconds between looks at what runs
DIVERGED, MISTAKE = 3, 2  # exit codes of experiments.train


def main(arguments: list[str]) -> None:
    from experiments.sweeping import report
    from experiments.sweeping.backends import Local, Ray
    from experiments.sweeping.search import Search
    from experiments.sweeping.trials import Trials, check_same
    from research.config import load_sweep, to_json
    from research.errors import UserError
    from research.training.checkpoint_files import local_directory
    from research.training.sweeps import Sweep
    from research.training.workdir import lock_directory

    base, sweep = CONFIG.load(), load_sweep(CONFIG.value)
    if not isinstance(sweep, Sweep):
        raise UserError(f"{CONFIG.value}: get_sweep returned {type(sweep).__name__}, expected a Sweep")
    searched = SEARCH.value is not None
    if not (sweep.space if searched else sweep.points):
        need = (
            "has no space to search: leave out --search" if searched else "has no points: give --search=tpe"
        )
        raise UserError(f"{CONFIG.value}: the sweep {need}")
    sweep = dataclasses.replace(sweep, **({"points": ()} if searched else {"space": {}}))
    for point in sweep.points or [{name: _some(draw) for name, draw in sweep.space.items()}]:
        configured(base, point)  # a field that is spelled wrongly is told before anything runs
    directory = local_directory(WORKDIR.value)
    for folder in (directory, directory / "trials", directory / "configs"):
        folder.mkdir(parents=True, exist_ok=True)
    with lock_directory(directory):
        description = {"config": to_json(base), "fields": sweep.fields, "metric": sweep.metric}
        check_same(directory, description | {"points": list(sweep.points)})
        trials = Trials(directory)
        search = Search(sweep, directory) if SEARCH.value else None
        if search is None:
            for point in sweep.points[len(trials.trials) :]:
                trials.add(point)
        else:
            for number in range(len(trials.trials), len(search)):  # proposed just before an interruption
                trials.add(search.proposed(number))
        for trial in trials.trials:
            if trial.status == "running":
                trial.status = "waiting"
        trials.save()
        if all(trial.over for trial in trials.trials) and len(trials.trials) >= _total(sweep):
            print("every trial is over already")
        else:
            resources = _resources(RESOURCES.value)
            backend = (
                Local(PARALLEL.value)
                if BACKEND.value == "local"
                else Ray(ADDRESS.value, resources, PARALLEL.value)
            )
            _Driver(base, sweep, trials, backend, search).run()
        for path in report.write(directory, sweep, trials.trials):
            print(f"written: {path}")
        header, rows = report.table(sweep, trials.trials)
        print_rows(header, rows)


def configured(base: "ConfigDict", point: dict[str, Any]) -> "ConfigDict":
    """The config of a point. Raises `UserError` for a field or value that does not fit."""
    import tempfile

    from research.config import from_json, load_config, to_json

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.json"
        path.write_text(to_json(base), encoding="utf-8")
        return load_config(path, point) if point else from_json(to_json(base))


class _Driver:
    """Keeps the backend busy until every trial is over."""

    def __init__(
        self,
        base: "ConfigDict",
        sweep: "Sweep",
        trials: "Trials",
        backend: "Backend",
        search: "Search | None",
    ):
        self.base, self.sweep, self.trials, self.backend, self.search = base, sweep, trials, backend, search
        self.running: dict[int, Any] = {}
        self.began: dict[int, float] = {}
        self.stopping: dict[int, str] = {}  # why a trial was asked to end
        self.view = _View(sweep, trials)

    def run(self) -> None:
        try:
            with self.view:
                while True:
                    while len(self.running) < self.backend.slots and (trial := self._next()) is not None:
                        self._start(trial)
                    if not self.running:
                        return
                    time.sleep(POLL)
                    for number in list(self.running):
                        self._look(self.trials.trials[number])
                    self.view.show()
        finally:
            for task in self.running.values():  # interrupted: each saves, and continues next time
                self.backend.stop(task)
            until = time.monotonic() + 60
            while time.monotonic() < until and any(
                self.backend.poll(t) is None for t in self.running.values()
            ):
                time.sleep(POLL)
            self.backend.close()

    def _next(self) -> "Trial | None":
        waiting = next((trial for trial in self.trials.trials if trial.status == "waiting"), None)
        if waiting is None and self.search is not None and len(self.trials.trials) < self.sweep.trials:
            waiting = self.trials.add(self.search.propose())
        return waiting

    def _start(self, trial: "Trial") -> None:
        from research.config import to_json
        from research.training.checkpoint_files import write_atomically

        config = self.trials.config(trial)
        if not config.exists():
            write_atomically(config, to_json(configured(self.base, trial.point)))
        trial.status, trial.attempts = "running", trial.attempts + 1
        self.trials.save()
        flags_ = [f"--config={config}", f"--workdir={self.trials.workdir(trial)}", "--quiet", "--nofigures"]
        command = [sys.executable, "-m", "experiments.train", *flags_]
        self.running[trial.number] = self.backend.start(command, self.trials.log(trial))
        self.began[trial.number] = time.monotonic()
        self.view.show(f"trial {trial.name} starts: {trial.point}")

    def _look(self, trial: "Trial") -> None:
        code = self.backend.poll(self.running[trial.number])
        if self.search is not None and code is None and trial.number not in self.stopping:
            evaluations = self.trials.evaluations(trial, self.sweep.metric)
            if self.search.heard(trial.number, evaluations):
                self.stopping[trial.number] = "pruned"
                self.backend.stop(self.running[trial.number])
        if code is None:
            return
        del self.running[trial.number]
        trial.seconds += time.monotonic() - self.began.pop(trial.number)
        trial.metrics = self.trials.read_metrics(trial)
        trial.status, trial.error = self._verdict(trial, code)
        if self.search is not None and trial.over:
            self.search.finished(trial.number, trial.status, trial.metrics.get(self.sweep.metric))
        self.trials.save()
        value = trial.metrics.get(self.sweep.metric)
        shown = "" if value is None else f", {self.sweep.metric} {value:.6g}"
        self.view.show(
            f"trial {trial.name}: {trial.status}{shown}{f' ({trial.error})' if trial.error else ''}"
        )

    def _verdict(self, trial: "Trial", code: int) -> tuple[str, str]:
        """(status, last line of what it said) by the exit code of its process."""
        log = self.trials.log(trial)
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        said = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")[:300]
        if code == 0:
            if self.sweep.metric not in trial.metrics:
                known = ", ".join(name for name in trial.metrics if "/" in name) or "nothing"
                return "failed", f"the run has no metric {self.sweep.metric!r}; it measured {known}"
            return "done", ""
        if trial.number in self.stopping:
            return self.stopping.pop(trial.number), ""
        if code == DIVERGED:
            return "diverged", said
        if code == MISTAKE or trial.attempts > RETRIES.value:
            return "failed", said
        return "waiting", said


class _View:
    """A live table on a terminal, a line for each change elsewhere."""

    def __init__(self, sweep: "Sweep", trials: "Trials"):
        self._sweep, self._trials = sweep, trials
        self._live: Any = None

    def __enter__(self) -> "_View":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, line: str | None = None) -> None:
        if self._live is None:
            if line is not None:
                print(line, file=sys.stderr, flush=True)
            return
        from rich.table import Table

        from experiments.sweeping.report import table

        header, rows = table(self._sweep, self._trials.trials)
        grid = Table(*header)
        for row in rows:
            grid.add_row(*row)
        self._live.update(grid, refresh=True)


def print_rows(header: list[str], rows: list[list[str]]) -> None:
    """A plain table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _total(sweep: "Sweep") -> int:
    return len(sweep.points) or sweep.trials


def _some(draw: Any) -> Any:
    import numpy as np

    return draw.sample(np.random.default_rng(0))


def _resources(texts: list[str]) -> dict[str, float]:
    from research.errors import UserError

    try:
        pairs = [text.split("=") for text in texts]
        return {name: float(amount) if "." in amount else int(amount) for name, amount in pairs}
    except ValueError:
        raise UserError(f"--resources={','.join(texts)}: expected NAME=AMOUNT, such as GPU=1") from None


if __name__ == "__main__":
    PROGRAM.run(main)
