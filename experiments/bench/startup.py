"""Time from the start of the process to the end of the first training step, cold and with a warm compilation
cache, of `experiments.train` on a shipped config in new processes.

The data is prepared before. Cold is an empty compilation cache; files that the system has cached stay so.
"""

import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.systems import ROOT
from research.errors import UserError

CONFIG = "configs/matlm.py:tiny"  # 1.6M parameters, nested, Muon
ONE_STEP = ("--config.stages.0.steps=1", "--config.stages.0.optimizer.schedule.warmup=0")
_FIRST_STEP = re.compile(
    r"\b1/1 "
)  # the line that reports the step, flushed before evaluation and checkpoint


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of every round."""

    config: str
    cold: list[float]
    warm: list[float]

    def as_dict(self) -> dict[str, Any]:
        medians = {"cold_median": statistics.median(self.cold), "warm_median": statistics.median(self.warm)}
        return dataclasses.asdict(self) | medians


def run(
    config: str = CONFIG,
    overrides: tuple[str, ...] = ONE_STEP,
    rounds: int = 5,
    report: Callable[[str], None] = print,
) -> Row:
    """Measures `rounds` pairs of a cold and a warm start, reports a line.

    overrides: what makes it a config of one step.
    """
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder:
        first_step(config, overrides, Path(folder) / "prepare", Path(folder) / "cache")
        for number in range(rounds):
            cache = Path(folder) / f"cache{number}"
            for kind, seconds in (("cold", cold), ("warm", warm)):
                seconds.append(first_step(config, overrides, Path(folder) / f"{kind}{number}", cache))
    row = Row(config, cold, warm)
    report(
        f"start of the process to the end of its first step, {config}: "
        f"{statistics.median(warm):.2f} s with a warm compilation cache (best {min(warm):.2f}), "
        f"{statistics.median(cold):.2f} s cold (best {min(cold):.2f}), {rounds} rounds"
    )
    return row


def first_step(config: str, overrides: tuple[str, ...], workdir: Path, cache: Path) -> float:
    """Seconds until a new process that trains `config` has reported step 1 of 1; the process then ends itself.

    Raises UserError if it ends without having done so.
    """
    command = [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}"]
    environment = {**os.environ, "LATHE_COMPILATION_CACHE": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--nofigures", *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds, line = None, ""
    with process:
        for line in process.stderr:
            if seconds is None and _FIRST_STEP.search(line):
                seconds = time.perf_counter() - start
    if seconds is None or process.returncode != 0:
        raise UserError(f"experiments.train ended with {process.returncode} on {config}: {line.strip()}")
    return seconds
