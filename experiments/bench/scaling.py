"""Training on 1, 2, 4 and 8 devices: tokens a second, the share of collectives, the parallel efficiency.

The same global batch on all of them (strong scaling), `data` or `fsdp` over the devices, each number of devices in a
process of its own. Where there are no accelerators the devices are simulated: parts of one CPU, whose cores they
share. Then what a table can show is the price of dividing a program, not a speed-up, and it says so.

The share is of the time that a profiler's trace counts in operations of a step: those whose names are collectives'.
"""

import dataclasses
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.contender import Contender
from experiments.bench.shapes import Shape, find_shape, make_decoder
from research import runtime

DEVICES = (1, 2, 4, 8)
LENGTH, BATCH = 256, 16
TRACED = 3  # steps
COLLECTIVE = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of devices. seconds: of a step, one for each round; collectives: their share of its operations'
    time."""

    devices: int
    axis: str
    kind: str
    seconds: list[float]
    collectives: float

    @property
    def tokens_per_second(self) -> float:
        return LENGTH * BATCH / statistics.median(self.seconds)

    def efficiency(self, one: "Row") -> float:
        """Tokens a second against as many times those of one device."""
        return self.tokens_per_second / (self.devices * one.tokens_per_second)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"tokens_per_second": self.tokens_per_second}


def run(
    size: str = "1M",
    devices: Sequence[int] = DEVICES,
    axes: Sequence[str] = ("data", "fsdp"),
    rounds: int = 5,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measures every number of devices that there is, and reports a table."""
    shape, rows = find_shape(size), []
    for axis in axes:
        for count in devices:
            if count == 1 and rows:
                continue
            row = _measure(shape, count, axis, rounds)
            if row is not None:
                rows.append(row)
    report(table(size, rows))
    return rows


def _measure(shape: Shape, count: int, axis: str, rounds: int) -> Row | None:
    flags = os.environ.get("XLA_FLAGS", "")
    kept = " ".join(flag for flag in flags.split() if "device_count" not in flag)
    os.environ["XLA_FLAGS"] = f"{kept} --xla_force_host_platform_device_count={count}".strip()
    try:
        with Contender(Trained, shape, count, axis) as contender:
            kind = contender("kind")
            if kind is None:
                return None
            seconds = [contender("turn") for _ in range(rounds)]
            return Row(count, axis, kind, seconds, contender("collectives"))
    finally:
        os.environ["XLA_FLAGS"] = flags


class Trained:
    """The trainer's own step on some devices."""

    def __init__(self, shape: Shape, count: int, axis: str):
        runtime.prepare()  # as every program does, before jax is imported
        import jax

        from experiments.bench.train import Repeated, random_batch
        from research.training.feed import batch_spec, feed
        from research.training.loop import Trainer
        from research.training.optimizers import adamw, constant
        from research.training.stages import Stage
        from research.training.task import LanguageModelling

        self._kind = None
        if len(jax.devices()) < count:
            return
        self._kind = jax.devices()[0].device_kind
        data = Repeated(random_batch(shape.vocab, BATCH, LENGTH))
        trainer = Trainer(
            LanguageModelling(make_decoder(shape, LENGTH, tied_head=True)),
            data,
            (Stage("train", 1_000_000, BATCH, adamw(constant(1e-3))),),
            mesh={axis: count},
        )
        self._step, self._state, mesh = trainer.compile_first_stage(jax.devices()[:count])
        self._batch = next(feed(data, 0, BATCH, mesh, batch_spec(data, BATCH)))
        self.turn(2)

    def kind(self) -> str | None:
        """Of the devices; None where there are too few."""
        return self._kind

    def turn(self, steps: int = 5) -> float:
        """Seconds a step."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps

    def collectives(self) -> float:
        """Their share of the time of all operations, in a trace of a few steps."""
        import jax

        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.turn(TRACED)
            (path,) = Path(folder).rglob("*.xplane.pb")
            return share(jax.profiler.ProfileData.from_file(str(path)))


def share(profile: Any) -> float:
    """Of a profile's operations (events that name their HLO operation): the time of collectives over that of all."""
    total = collective = 0.0
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats or plane.name.startswith("/device:") and line.name == "XLA Ops":
                    total += event.duration_ns
                    collective += event.duration_ns if COLLECTIVE.search(event.name) else 0.0
    return collective / total if total else 0.0


def table(size: str, rows: Sequence[Row]) -> str:
    """The table, and what kind of devices it is about."""
    one = rows[0]
    lines = [f"scaling of {size}, batch {BATCH} x {LENGTH} tokens, {one.kind}"]
    if "cpu" in one.kind.lower():
        lines[0] += f": SIMULATED devices, which share the {os.cpu_count()} cores of this machine"
    lines.append("devices  axis  tokens/s  efficiency  collectives")
    for row in rows:
        lines.append(
            f"{row.devices:7}  {row.axis if row.devices > 1 else '-':4}  {row.tokens_per_second:8.0f}  "
            f"{row.efficiency(one):10.0%}  {row.collectives:11.0%}"
        )
    return "\n".join(lines)
