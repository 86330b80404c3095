"""What a sweep varies: points in the space of a config's fields, listed or drawn. A config file defines it beside
itself:

    def get_sweep(preset="tiny"):
        return Sweep(
            points=product(grid({"seed": (0, 1, 2)}), zipped({"clip": (1.0, 0.5), "ema": (None, 0.99)})),
            metric="validation/XL/loss",
        )

Fields are named as on the command line, without `config.`. `experiments.sweep` runs what comes of it.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError

Point = dict[str, Any]  # {field: value}


@dataclasses.dataclass(frozen=True)
class Draw:
    """A field's values: numbers between `low` and `high`, or one of `choices`.

    log: even in the logarithm. integer: whole numbers, `high` among them.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self):
        if not self.choices and not self.low < self.high:
            raise UserError(
                f"sweep: a field is drawn between {self.low} and {self.high}; the first must be less"
            )
        if self.log and self.low <= 0:
            raise UserError(f"sweep: low={self.low} of a logarithmic field; it must be above 0")

    def sample(self, random: np.random.Generator) -> Any:
        """One value."""
        if self.choices:
            return self.choices[int(random.integers(len(self.choices)))]
        # A whole number has all of its unit, half of it on each side.
        margin = 0.5 if self.integer else 0.0
        low, high = self.low - margin, self.high + margin
        if self.log:
            low = max(low, self.low / 2)
            value = math.exp(random.uniform(math.log(low), math.log(high)))
        else:
            value = random.uniform(low, high)
        return int(min(max(round(value), self.low), self.high)) if self.integer else float(value)


def uniform(low: float, high: float) -> Draw:
    """Evenly between two numbers."""
    return Draw(low, high)


def log_uniform(low: float, high: float) -> Draw:
    """Evenly in the logarithm, as rates are."""
    return Draw(low, high, log=True)


def integers(low: int, high: int, *, log: bool = False) -> Draw:
    """Whole numbers from `low` to `high`."""
    return Draw(low, high, log=log, integer=True)


def choice(*values: Any) -> Draw:
    """One of these."""
    return Draw(choices=values)


def grid(fields: Mapping[str, Sequence[Any]]) -> tuple[Point, ...]:
    """Every combination of the fields' values, the last field varying fastest."""
    return tuple(dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values()))


def zipped(fields: Mapping[str, Sequence[Any]]) -> tuple[Point, ...]:
    """The first values together, the second ones, and so on. Raises `UserError` for unequal lengths."""
    lengths = {name: len(values) for name, values in fields.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"sweep: zipped fields have as many values each, not {lengths}")
    return tuple(dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True))


def product(*parts: Sequence[Point]) -> tuple[Point, ...]:
    """Every combination of a point of each part. Raises `UserError` if two parts set the same field."""
    points = []
    for combination in itertools.product(*parts):
        merged: Point = {}
        for point in combination:
            if twice := merged.keys() & point.keys():
                raise UserError(f"sweep: two parts set {', '.join(sorted(twice))}")
            merged |= point
        points.append(merged)
    return tuple(points)


def drawn(fields: Mapping[str, Draw], count: int, seed: int = 0) -> tuple[Point, ...]:
    """`count` points drawn at random; the same for the same seed, and the first ones of more."""
    return tuple(
        {
            name: draw.sample(np.random.default_rng([seed, i, j]))
            for j, (name, draw) in enumerate(fields.items())
        }
        for i in range(count)
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is tried, and what counts.

    points: trials, in order (`grid`, `zipped`, `product`, `drawn`, or a list). space: what a searcher draws from
    instead (`--search=tpe`), `trials` times. metric: a final metric of the run, as `<evaluator>/<variant>/<metric>`,
    without a variant that has no name; the smaller the better unless `maximize`. pareto: two metrics, both to be
    small, whose front is drawn. seed: of the searcher.
    """

    points: Sequence[Point] = ()
    space: Mapping[str, Draw] = dataclasses.field(default_factory=dict)
    trials: int = 20
    metric: str = "validation/loss"
    maximize: bool = False
    pareto: tuple[str, str] | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.points and not self.space:
            raise UserError("sweep: it has neither points nor a space to search")
        if self.trials < 1:
            raise UserError(f"sweep: trials is {self.trials}; it must be at least 1")
        shown = [repr(sorted(point.items())) for point in self.points]
        if again := {text for text in shown if shown.count(text) > 1}:
            raise UserError(f"sweep: the point {min(again)} is there twice")

    @property
    def fields(self) -> list[str]:
        """The swept fields in the order in which they first appear."""
        return list(dict.fromkeys(name for point in [*self.points, self.space] for name in point))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats in both numbers (at least as small in both, smaller in one), by the first
    number."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front, best = [], math.inf
    for i in order:
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front
