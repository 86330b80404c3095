"""Contenders in turns, and the row that compares two of them."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments.bench.contender import PAUSE


class Ratios:
    """Base of rows with the `seconds` of both sides, one of each for every round.

    `ratio` compares medians and `best_ratio` the best rounds, baseline over ours: above 1 ours is faster.
    """

    seconds: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.baseline) / statistics.median(self.seconds)

    @property
    def best_ratio(self) -> float:
        return min(self.baseline) / min(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "best_ratio": self.best_ratio}


@dataclasses.dataclass(frozen=True)
class Row(Ratios):
    """One measurement beside that of a peer."""

    kind: str
    length: int
    seconds: tuple[float, ...]
    baseline: tuple[float, ...]

    def line(self, other: str) -> str:
        ours, theirs = (1e3 * statistics.median(x) for x in (self.seconds, self.baseline))
        ratios = f"{self.ratio:.2f}x (best turns {self.best_ratio:.2f}x)"
        return f"{self.kind} {self.length:>6}: {ours:9.2f} ms, {other} {theirs:9.2f} ms: {ratios}"


WARM = 0.1  # seconds of calls before those that are timed, one at least


def take_turn(call: Callable[[], Any], at_least: float = 0.0) -> float:
    """Seconds a call, after a pause and calls that are not timed; it is called for `at_least` seconds, once if that is
    0.

    The pause lets the other side's threads go to sleep. After it, and after another's work, nothing of a process is in
    the caches: a program of a millisecond takes many times that for a while, a slow one hardly longer.
    """
    time.sleep(PAUSE)
    _call_for(WARM, call)
    return _call_for(at_least, call)


def _call_for(seconds: float, call: Callable[[], Any]) -> float:
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
        call()
        count += 1
    return (time.perf_counter() - start) / count


def take_turns(
    calls: dict[Any, Callable[[], Any]], rounds: int, at_least: float = 0.0
) -> dict[Any, tuple[float, ...]]:
    """`take_turn` of each, in every round."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(take_turn(call, at_least))
    return {name: tuple(times) for name, times in seconds.items()}
