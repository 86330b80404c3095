"""Two hosts, as two processes of one device each: the same run, stopped together, continued by one host."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CHILD = """
import os, signal, sys
import jax
process, address, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, process)
import conftest

class Terminates(conftest.Tokens):
    '''Host 1 alone is asked to stop, while it reads its fourth batch.'''
    def batches(self, *args, **kwargs):
        for number, batch in enumerate(super().batches(*args, **kwargs)):
            if number == 3 and process == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

conftest.hosts_trainer(Terminates()).run(directory, progress=False)
"""


def test_two_hosts_train_as_one_and_stop_together(toy, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f)
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(process), address, str(tmp_path)],
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    # Signals are compared at logged steps: 1, 2, 4, 6, ...; the fourth batch is read after step 3 began.
    stopped = [re.search(r"stopped by SIGTERM after step (\d+)", text)[1] for text in errors]
    assert stopped == ["4", "4"]

    two = jax.devices()[:2]
    continued, metrics = toy.hosts_trainer().train(tmp_path, progress=False, devices=two)
    whole, expected = toy.hosts_trainer().train(progress=False, devices=two)
    # Each host holds every second row of a batch, so rows are summed in another order than on one host: equal
    # to rounding, as in test_partitioning.
    assert metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-6)
    assert metrics["validation/loss"] == pytest.approx(expected["validation/loss"], rel=2e-6)
    for a, b in zip(jax.tree.leaves(continued.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
