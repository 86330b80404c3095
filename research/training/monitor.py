"""Watching the loss without waiting for the device.

Steps are dispatched ahead of the device; their metrics stay on it until a later step is on its way. So the
device never idles, and yet every single step's loss is looked at.
"""

import math
from collections import deque
from dataclasses import dataclass

import jax

from research.errors import UserError
from research.training.evaluators import means, non_finite
from research.training.task import Metrics

AHEAD = 2  # steps that may be unfinished: one in work, one queued
WINDOW = 100  # losses that say what is usual
SETTLED = 20  # losses before that means anything
SMALL = 0.1  # of the first losses: what is below is no explosion


class Diverged(UserError):
    """The loss became NaN or infinite, or exploded."""

    exit_code = 3


@dataclass(frozen=True)
class Pending:
    """A dispatched step: its number, where it came from, and its metrics still on the device.

    source names the records for messages, such as "records 32..63 of stage 'main'". wanted: whether the step
    is to be logged.
    """

    step: int
    source: str
    metrics: Metrics
    wanted: bool


class Monitor:
    """Holds metrics back until they are there, and checks every loss.

    watched: the metric to check. explode: a loss above `explode` times what nine in ten of the last `WINDOW`
    losses stay below (once there are `SETTLED`) counts as exploding; `None` checks for NaN and infinity only.
    A median would not do: near zero, the losses of a well-trained classifier scatter over a factor of ten. Nor does a
    loss explode that is below `SMALL` of the highest of the first `SETTLED`, however low the last ones were.
    """

    def __init__(self, watched: str, explode: float | None):
        self._watched, self._explode = watched, explode
        self._pending: deque[Pending] = deque()
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._first = -math.inf  # the highest of the first losses

    def add(self, pending: Pending) -> None:
        """Takes a dispatched step and waits until at most `AHEAD` are unfinished."""
        self._pending.append(pending)
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD].metrics[self._watched])

    def settle(self, keep: int = AHEAD) -> list[tuple[int, dict[str, float | list[float]]]]:
        """[(step, {metric: mean})] of the wanted steps among all but the `keep` youngest, which it checks.

        Raises `Diverged`, naming the step and its records.
        """
        logged = []
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            total, weight = jax.device_get(pending.metrics[self._watched])
            if weight == 0:
                raise UserError(f"step {pending.step} ({pending.source}): no target has any weight")
            self._check(float(total) / float(weight), pending)
            if pending.wanted:
                logged.append((pending.step, means(jax.device_get(pending.metrics), pending.source)))
        return logged

    def _check(self, loss: float, pending: Pending) -> None:
        where = f"at step {pending.step} ({pending.source})"
        if not math.isfinite(loss):
            cause = non_finite(jax.device_get(pending.metrics))
            raise Diverged(f"the {self._watched} is {loss} {where}" + (f": {cause}" if cause else ""))
        if self._explode is not None and len(self._losses) >= SETTLED:
            usual = sorted(self._losses)[len(self._losses) * 9 // 10]
            if loss > SMALL * self._first and 0 < usual * self._explode < loss:
                raise Diverged(
                    f"the {self._watched} exploded {where}: {loss:.6g}, over {self._explode:g} times what nine in "
                    f"ten of the last {len(self._losses)} stayed below, {usual:.6g}"
                )
        if len(self._losses) < SETTLED:  # it never shrinks
            self._first = max(self._first, loss)
        self._losses.append(loss)
