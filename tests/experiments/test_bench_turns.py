"""Turns of a benchmark by a clock that only calls and pauses advance."""

import itertools

import pytest

from experiments.bench import turns


class Clock:
    """`durations`: of the calls, one after another, the last for ever."""

    def __init__(self, *durations: float) -> None:
        self.now, self.calls, self.pauses = 0.0, 0, []
        self._durations = itertools.chain(durations, itertools.repeat(durations[-1]))

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append((self.calls, seconds))

    def call(self) -> None:
        self.now += next(self._durations)
        self.calls += 1


@pytest.mark.parametrize(
    "durations, at_least, expected, calls",
    [
        ((3.0, 1.0), 0.0, 1.0, 2),  # a slow program: one call that is not timed, one that is
        ((0.0625, 0.0625, 0.25), 0.0, 0.25, 3),  # two of 1/16 s make a tenth of a second
        ((0.125, 0.5, 0.25), 1.0, 1 / 3, 4),  # timed: 1/2, then two of 1/4, and a second is over
    ],
)
def test_a_turn_is_timed_after_a_pause_and_calls_that_warm_up(
    durations, at_least, expected, calls, monkeypatch
):
    clock = Clock(*durations)
    monkeypatch.setattr(turns, "time", clock)
    assert turns.take_turn(clock.call, at_least) == expected
    assert clock.calls == calls and clock.pauses == [(0, turns.PAUSE)]


def test_all_take_turns_in_every_round(monkeypatch):
    clock, order = Clock(0.5), []
    monkeypatch.setattr(turns, "time", clock)
    calls = {name: lambda name=name: (order.append(name), clock.call()) for name in "ab"}
    assert turns.take_turns(calls, 2) == {"a": (0.5, 0.5), "b": (0.5, 0.5)}
    assert "".join(order) == "aabb" * 2  # one that warms up, one that is timed
