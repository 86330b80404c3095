"""Where trials run: processes on this machine, or tasks of a Ray cluster. Both start the same command.

A backend has `slots`, how many run at a time, and starts a command that writes into a log; `poll` gives its exit code,
or None while it runs, and `stop` asks it to save and end.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from kernels_pallas.cores import cores
from research.errors import UserError

GPUS = Path("/proc/driver/nvidia/gpus")


class Backend(Protocol):
    slots: int

    def start(self, command: Sequence[str], log: Path) -> Any: ...

    def poll(self, task: Any) -> int | None: ...

    def stop(self, task: Any) -> None: ...

    def close(self) -> None: ...


class Local:
    """Processes here. Each has its share of the cores, or one of the GPUs; a TPU host runs one at a time.

    parallel: how many; by default one for every GPU, or for every two cores.
    """

    def __init__(self, parallel: int | None):
        self._gpus = len(list(GPUS.iterdir())) if GPUS.is_dir() else 0
        tpu = os.path.exists("/dev/accel0")
        self.slots = parallel or (1 if tpu else self._gpus or max(1, cores() // 2))
        if self._gpus and self.slots > self._gpus:
            raise UserError(f"--parallel={self.slots}: there are {self._gpus} GPUs, and each trial has one")
        if tpu and self.slots > 1:
            raise UserError(f"--parallel={self.slots}: all of a TPU host's chips belong to one process")
        self._threads = max(1, cores() // self.slots)
        self._free = list(range(self.slots))

    def start(self, command: Sequence[str], log: Path) -> tuple[subprocess.Popen, int]:
        slot = self._free.pop(0)
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot)
        else:
            if environment.get("NPROC") in (None, str(cores())):  # the latter for all of them, under a quota
                environment["NPROC"] = str(self._threads)
            environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        return _start(command, log, environment), slot

    def poll(self, task: tuple[subprocess.Popen, int]) -> int | None:
        process, slot = task
        code = process.poll()
        if code is not None and slot not in self._free:
            self._free.append(slot)
        return code

    def stop(self, task: tuple[subprocess.Popen, int]) -> None:
        task[0].terminate()

    def close(self) -> None:
        pass


class Ray:
    """Tasks of a Ray cluster whose machines all see the sweep's workdir.

    address: of the cluster; None starts one of this machine. resources: what a trial takes, such as {"CPU": 1},
    {"GPU": 1} or {"TPU-v5litepod-16-head": 1} for a whole slice.
    """

    def __init__(self, address: str | None, resources: dict[str, float], parallel: int | None):
        try:
            import ray
        except ImportError:
            raise UserError("--backend=ray: Ray is not installed; pip install -e '.[sweep]'") from None
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--address={address}: {str(error).splitlines()[0]}") from error
        there = ray.cluster_resources()
        fits = [int(there.get(name, 0) // amount) for name, amount in resources.items()]
        if not min(fits):
            known = {name: there[name] for name in sorted(there) if ":" not in name}
            ray.shutdown()
            raise UserError(f"--resources: a trial takes {resources}, the cluster has {known}")
        self.slots = min([*fits, *([parallel] if parallel else [])])
        named = {"CPU": "num_cpus", "GPU": "num_gpus"}
        options = {named[name]: amount for name, amount in resources.items() if name in named}
        rest = {name: amount for name, amount in resources.items() if name not in named}
        self._run = ray.remote(max_retries=0, resources=rest, **({"num_cpus": 0} | options))(_run)

    def start(self, command: Sequence[str], log: Path) -> Any:
        # What Ray itself says of the machine (visible GPUs) stays; these say where this project and its data are.
        names = ("PYTHONPATH", "JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
        given = {k: v for k, v in os.environ.items() if k in names or k.startswith("LATHE_")}
        return self._run.remote(list(command), str(log), given, os.getcwd())

    def poll(self, task: Any) -> int | None:
        ready, _ = self._ray.wait([task], timeout=0)
        if not ready:
            return None
        try:
            return self._ray.get(task)
        except (self._ray.exceptions.TaskCancelledError, self._ray.exceptions.RayTaskError):
            return 75
        except self._ray.exceptions.RayError:
            return 1  # the machine was lost; a retry may find another

    def stop(self, task: Any) -> None:
        self._ray.cancel(task, force=False)

    def close(self) -> None:
        self._ray.shutdown()


def _start(command: Sequence[str], log: Path | str, environment: dict[str, str]) -> subprocess.Popen:
    with open(log, "ab") as file:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _run(command: list[str], log: str, given: dict[str, str], directory: str) -> int:
    """On a machine of the cluster: the command to its end. A cancelled task lets it save first."""
    os.chdir(directory)
    process = _start([sys.executable, *command[1:]], log, {**os.environ, **given})
    try:
        return process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        process.kill()
        raise
