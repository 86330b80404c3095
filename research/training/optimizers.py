"""Optimizers and learning-rate schedules by config: thin functions over optax.

A config writes `of(adamw, schedule=of(cosine, peak=3e-3, warmup=100), weight_decay=0.1)`. How many steps
there are is the stage's business: a `Schedule` receives them when the stage starts, so no number is written
twice. Clipping by the global norm is the trainer's (`Trainer.clip`), since the norm is also logged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax import contrib

from research.errors import UserError
from research.training.paths import first_match, is_stacked, map_named, named_leaves

PyTree = Any
Rates = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule whose length is given later. `over(steps)` is the optax schedule."""

    over: Callable[[int], optax.Schedule]


def _warm(warmup: int, peak: float, rest: Callable[[int], optax.Schedule]) -> Schedule:
    """Linearly from `peak / warmup` to `peak` in the first `warmup` updates, then `rest(steps - warmup)`."""
    if warmup < 0:
        raise UserError(f"schedule.warmup: {warmup} is negative")

    def over(steps: int) -> optax.Schedule:
        if warmup >= steps:
            raise UserError(
                f"{warmup} warm-up steps do not fit in a stage of {steps} steps: change the stage's steps or its "
                "optimizer.schedule.warmup"
            )
        if not warmup:
            return rest(steps)
        # The first update already moves: count 0 has rate peak / warmup, count warmup - 1 has the peak.
        ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        return optax.join_schedules([ramp, rest(steps - warmup)], [warmup])

    return Schedule(over)


def constant(peak: float, warmup: int = 0) -> Schedule:
    """`peak` throughout, after a linear warm-up."""
    return _warm(warmup, peak, lambda steps: optax.constant_schedule(peak))


def linear(peak: float, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """From `peak` on a straight line to `floor * peak` at the end of the stage."""
    return _warm(warmup, peak, lambda steps: optax.linear_schedule(peak, floor * peak, steps))


def cosine(peak: float, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """From `peak` on half a cosine to `floor * peak` at the end of the stage (arXiv:1608.03983)."""
    return _warm(warmup, peak, lambda steps: optax.cosine_decay_schedule(peak, steps, alpha=floor))


def wsd(peak: float, warmup: int = 0, decay: float = 0.2, floor: float = 0.0) -> Schedule:
    """Warm-up, stable, decay (arXiv:2404.06395): the last `decay` of the stage falls to `floor * peak`."""
    if not 0.0 < decay <= 1.0:
        raise UserError(f"wsd.decay: {decay} is not a fraction of the stage in (0, 1]")

    def rest(steps: int) -> optax.Schedule:
        falling = max(round(decay * steps), 1)
        down = optax.linear_schedule(peak, floor * peak, falling)
        return optax.join_schedules([optax.constant_schedule(peak), down], [steps - falling])

    return _warm(warmup, peak, rest)


@dataclass(frozen=True)
class Optimizer:
    """An optimizer whose length and parameters are given later.

    schedule: the learning rate.
    update_rule: maps an optax schedule to the transformation.
    rates: ((pattern, factor), ...): learning-rate factors; the first pattern found in a path counts.
    """

    schedule: Schedule
    update_rule: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: Rates = ()

    def transformation(self, steps: int, params: PyTree, where: str) -> optax.GradientTransformation:
        """The transformation of a stage of `steps` updates over `params` (the trainable; shapes suffice).

        Raises `UserError` if the schedule is longer, or a pattern of `rates` matches none of them; `where` names the
        stage.
        """
        try:
            schedule = self.schedule.over(steps)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        rule = self.update_rule(schedule)
        if not self.rates:
            return rule
        factors = self._factors(list(named_leaves(params)), where)
        scale = optax.stateless(
            lambda updates, _: map_named(
                lambda path, u: u if factors[path] == 1.0 else u * factors[path], updates
            )
        )
        # After the rule: adaptive rules would divide an earlier factor out again. Decay is scaled too.
        return optax.chain(rule, scale)

    def _factors(self, paths: Sequence[str], where: str) -> dict[str, float]:
        found = first_match(paths, [pattern for pattern, _ in self.rates], f"{where}.optimizer.rates")
        return {path: 1.0 if i is None else self.rates[i][1] for path, i in zip(paths, found, strict=True)}


def matrices(params: PyTree) -> PyTree:
    """True where a leaf is a matrix (or a stack of them) and so decays: no scale, bias or class token."""
    return map_named(lambda path, leaf: _rank(path, leaf) >= 2, params)


def _rank(path: str, leaf: jax.Array) -> int:
    # A bias of experts is stacked, [E, features], and still not a matrix.
    return 0 if path.split("/")[-1] in ("class_token", "bias") else leaf.ndim - is_stacked(path)


def adamw(
    schedule: Schedule,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    rates: Rates = (),
) -> Optimizer:
    """AdamW (arXiv:1711.05101); the decay, times the learning rate, acts on matrices only."""
    return Optimizer(
        schedule,
        lambda rate: optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices),
        rates,
    )


def sgd(schedule: Schedule, momentum: float = 0.0, nesterov: bool = False, rates: Rates = ()) -> Optimizer:
    """Stochastic gradient descent; no momentum memory when `momentum` is 0."""
    return Optimizer(
        schedule, lambda rate: optax.sgd(rate, momentum=momentum or None, nesterov=nesterov), rates
    )


def lion(
    schedule: Schedule, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.99, rates: Rates = ()
) -> Optimizer:
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum; half of Adam's memory."""
    return Optimizer(
        schedule, lambda rate: optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=matrices), rates
    )


def muon(
    schedule: Schedule,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.95,
    rates: Rates = (),
) -> Optimizer:
    """Muon (arXiv:2502.16982) for hidden matrices; Adam without decay for embeddings, the head and vectors.

    Updates have root mean square 0.2 times the learning rate, like AdamW's: its rates and decay carry over.
    """

    def rule(rate: optax.Schedule) -> optax.GradientTransformation:
        return contrib.muon(
            rate,
            beta=momentum,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,
        )

    return Optimizer(schedule, rule, rates)


def _muon_axes(params: PyTree) -> PyTree:
    """The [in, out] axes of hidden matrices, `None` where Adam is used. Leading axes are a batch of them."""

    def axes(path: str, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        parts = path.split("/")
        outer = "head" in parts or any("embedding" in part for part in parts)
        if outer or _rank(path, leaf) < 2:
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return map_named(axes, params)
