"""The pipeline of MoA (arXiv 2406.14909, section 4.2): calibrate, profile, optimise, select.

1. Answers of the dense model to the calibration data of every length, its own greedy ones.
2. Attention influence of every head at every length, of the loss on those answers alone.
3. The Pareto front over the profiled lengths of plans with the density asked for at all lengths.
4. Of the front, the plan with the least loss at a length that was not profiled.

No weight changes.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from research.data.pipeline import Dataset
from research.errors import UserError
from research.nn.transformer import LayerStack
from research.sparse.moa.calibration import draw_rows, own_answers
from research.sparse.moa.influence import profile
from research.sparse.moa.plan import Plan, Shape
from research.sparse.moa.rules import Grid, candidates, densities, losses
from research.sparse.moa.solve import Program, pareto_front
from research.training.model_directory import fingerprint

PyTree = Any
Tell = Callable[[str], None]
FRACTIONS = tuple(i / 8 for i in range(9))


@dataclasses.dataclass(frozen=True)
class Profile:
    """Attention influence float64[layers, Hkv, nb, nb] at `length` tokens, and the loss on the answers, in nats."""

    length: int
    influence: np.ndarray
    loss: float


@dataclasses.dataclass(frozen=True)
class Front:
    """What the search found: the front's losses float64[plans, lengths], and those at the validation length."""

    losses: np.ndarray
    validation: np.ndarray
    chosen: int
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Planner:
    """What is static in making a plan.

    Args:
        calibration: one dataset for each profiled length, whose rows have answers: targets with weight.
        validation: the same at a length that is not profiled, by which a plan of the front is selected.
        constrained: further lengths at which the density is held, up to which the plan may be used.
        density: the greatest mean share of keys and values kept, at every profiled and constrained length.
        lower: the least one, as a share of `density`.
        grid: sinks and blocks.
        step: between the a of the candidates a + b N, in tokens; fractions: their b.
        max_rules: of a layer; each is a ring of its own.
        points: of the grid over each length's loss in the search for the front.
        samples, batch_size: rows profiled of each dataset, and how many at a time.
        time_limit: seconds for one integer program.
    """

    calibration: tuple[Dataset, ...]
    validation: Dataset
    constrained: tuple[int, ...] = ()
    density: float = 0.5
    lower: float = 0.9
    grid: Grid = Grid()
    step: int = 1024
    fractions: tuple[float, ...] = FRACTIONS
    max_rules: int = 2
    points: int = 5
    samples: int = 50
    batch_size: int = 8
    time_limit: float = 60.0

    def __post_init__(self):
        if not self.calibration:
            raise UserError("Planner.calibration: at least one dataset is expected")
        if not 0.0 < self.density <= 1.0 or not 0.0 <= self.lower <= 1.0:
            raise UserError(
                f"Planner: density={self.density}, lower={self.lower}: shares in (0, 1] and [0, 1]"
            )
        if min(self.step, self.max_rules, self.samples, self.batch_size) < 1 or self.points < 2:
            raise UserError(
                "Planner: step, max_rules, samples and batch_size are at least 1, points at least 2"
            )
        if wrong := [b for b in self.fractions if not 0.0 <= b <= 1.0] or not self.fractions:
            raise UserError(f"Planner.fractions: {wrong}; at least one, all from 0 to 1, is expected")
        for length in (*self.profiled, length_of(self.validation), *self.constrained):
            self.grid.blocks(length)

    @property
    def profiled(self) -> tuple[int, ...]:
        return tuple(length_of(data) for data in self.calibration)

    def profile(self, model: LayerStack, params: PyTree, data: Dataset) -> Profile:
        """The influence of the model's own answers to `data`."""
        rows = own_answers(model, params, draw_rows(data, self.samples), self.batch_size)
        influence, loss = profile(model, params, rows, self.grid.block, self.batch_size)
        return Profile(length_of(data), influence, loss)

    def profiles(self, model: LayerStack, params: PyTree, tell: Tell = lambda line: None) -> list[Profile]:
        """Of every calibration dataset, then of the validation data."""
        found = []
        for number, data in enumerate((*self.calibration, self.validation)):
            start = time.monotonic()
            found.append(self.profile(model, params, data))
            what = "validation" if number == len(self.calibration) else "calibration"
            tell(
                f"{what} at {found[-1].length} tokens: {self.samples} rows, {found[-1].loss:.4f} nats an answer, "
                f"{time.monotonic() - start:.1f} s"
            )
        return found

    def search(
        self, model: LayerStack, params: PyTree, profiles: list[Profile], tell: Tell = lambda line: None
    ) -> Front:
        """The front and the plan selected, from what `profiles` gave."""
        *calibrated, unseen = profiles
        lengths = tuple(sorted({*self.profiled, *self.constrained}))
        every = (*lengths, unseen.length)
        rules = candidates(self.profiled, every, self.step, self.fractions, self.grid)
        if not rules:
            raise UserError(f"no candidate span fits lengths {every} with step={self.step}")
        layers, kv_heads = unseen.influence.shape[:2]

        def table(profile: Profile) -> np.ndarray:
            """float64[heads of all layers, rules]."""
            lost = losses(profile.influence, rules, profile.length, self.grid)
            return lost.reshape(layers * kv_heads, len(rules))

        program = Program(
            loss=np.stack([table(profile) for profile in calibrated]),
            density=np.stack([densities(rules, length, self.grid) for length in lengths]),
            layer=np.repeat(np.arange(layers), kv_heads),
            rho=self.density,
            lower=self.lower,
            max_rules=self.max_rules,
            time_limit=self.time_limit,
        )
        start = time.monotonic()
        tell(f"{len(rules)} candidate rules for {layers * kv_heads} heads")
        front = pareto_front(program, self.points, lambda done, of: tell(f"integer program {done} of {of}"))
        validation = table(unseen)
        at_unseen = np.array([validation[np.arange(len(chosen)), chosen].sum() for chosen in front])
        best = int(np.argmin(at_unseen))
        tell(
            f"{len(front)} plans on the front, {time.monotonic() - start:.1f} s; plan {best + 1} is selected"
        )
        chosen = [tuple(rules[r] for r in layer) for layer in front[best].reshape(layers, kv_heads)]
        plan = Plan(
            tuple(chosen),
            self.grid,
            Shape.of(model),
            fingerprint(params),
            tuple(sorted({*every})),
            self.density,
        )
        return Front(np.stack([program.losses(chosen) for chosen in front]), at_unseen, best, plan)


def length_of(data: Dataset) -> int:
    """Tokens of a row."""
    return data.element_spec()["tokens"].shape[0]
