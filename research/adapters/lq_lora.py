"""LQ-LoRA: every kernel as a rounded and a low-rank part, W ~ Q + L, with bits that follow a budget (arXiv 2311.12023).

    y = x Q + scale (x down) up        scale down up = L at the beginning; Q frozen, down and up trained

Q and L are fitted in turns (algorithm 2), the low rank first: L to what Q leaves, Q to what L leaves, as long as the
error falls; the best turn is returned, where the reference code returns the last. Weighted by the diagonal empirical
Fisher F of a kernel, L minimises

    | diag(a) (W - Q - L) diag(b) |_F      a_i = sqrt(mean_j F_ij) over inputs, b_j = sqrt(mean_i F_ij) over outputs

and the error that turns and the integer program watch is | sqrt(F) * (W - Q - L) |_F. Rounding itself is not weighted.

Q is NormalFloat with double quantization (section 2.3): b bits a weight, B0 weights a scale, b0 bits a scale, B1
scales a second scale of type b1, which takes b + b0 / B0 + bits(b1) / (B0 B1) bits a weight. Which of such
configurations a kernel gets is the integer program of section 3.2 under a budget for all Q together; the low-rank
parts come on top, in float32 or, once trained, in NormalFloat of 8 bits (`research.compression.factors`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from research.adapters.lora import LoRA, Split, as_array, by_matrix, calibration, in_turns, scaled
from research.errors import UserError
from research.nn.allocation import allocate
from research.nn.lowrank import Fit
from research.nn.normal_float import BlockNormal
from research.nn.weights import Kernel, Weight
from research.training.feed import Dataset
from research.training.observe import collect_fisher

PyTree = Any

CANDIDATES = tuple(
    BlockNormal(b, b0, b1, group, block)
    for b in (2, 3, 4, 8)
    for b0 in (2, 3, 4, 8)
    for b1 in ("bfloat16", "float16", "float32")
    for group in (16, 32, 64)
    for block in (16, 64, 256)
)
"""The paper's 432 configurations."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decomposition:
    """W ~ weight + fit, and its error: weighted by Fisher where that is given, in Frobenius' norm."""

    weight: Weight
    fit: Fit
    error: float
    errors: tuple[float, ...]


def decompose(
    w: np.ndarray, rank: int, quantizer: BlockNormal, steps: int, fisher: np.ndarray | None = None
) -> Decomposition:
    """One matrix w [in, out] in at most `steps` turns; fisher [in, out], of any scale."""
    if fisher is None:
        weight, fit, errors = in_turns(w, rank, quantizer, steps)
    else:
        fisher = np.asarray(fisher, np.float64)
        inputs, outputs = np.sqrt(fisher.mean(axis=1)), np.sqrt(fisher.mean(axis=0))
        root = np.sqrt(fisher)
        weight, fit, errors = in_turns(
            w,
            rank,
            quantizer,
            steps,
            inputs=inputs,
            outputs=outputs,
            error=lambda rest: float(np.linalg.norm(root * rest)),
        )
    return Decomposition(weight, fit, min(errors), tuple(errors))


def plan(
    shapes: Mapping[str, tuple[int, ...]],
    errors: Mapping[str, Sequence[float | None]],
    candidates: Sequence[BlockNormal],
    budget: float,
) -> dict[str, BlockNormal]:
    """The configuration of every kernel: least sum of squared errors within `budget` bits a weight of all kernels.

    errors[path]: of each candidate, None where its blocks do not fit the kernel. Raises `UserError` where a kernel has
    no candidate, or none fits the budget.
    """
    paths = list(shapes)
    possible = {path: [i for i, error in enumerate(errors[path]) if error is not None] for path in paths}
    for path in paths:
        if not possible[path]:
            raise UserError(f"no candidate's blocks divide {path} of {tuple(shapes[path])}")
    sizes = {path: float(np.prod(shapes[path])) for path in paths}
    options = [
        [(candidates[i].bits_per_weight * sizes[path], errors[path][i] ** 2) for i in possible[path]]
        for path in paths
    ]
    try:
        chosen, _, _ = allocate(options, budget * sum(sizes.values()))
    except UserError as error:
        raise UserError(f"budget={budget:g} bits a weight: {error}") from None
    return {path: candidates[possible[path][i]] for path, i in zip(paths, chosen, strict=True)}


@dataclasses.dataclass(frozen=True)
class LQLoRA(LoRA):
    """LQ-LoRA as an adapter.

    Args:
        budget: bits a weight of all rounded parts together; None: every kernel gets the first candidate that fits.
        candidates: what a kernel may get.
        steps: most turns of a decomposition.
        fisher: the data whose loss weighs the fits; None: they are not weighted.
        samples: rows of it.
    """

    rank: int = 64
    budget: float | None = None
    candidates: tuple[BlockNormal, ...] = CANDIDATES
    steps: int = 100
    fisher: Dataset | None = None
    samples: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.quantizer is not None:
            raise UserError("LQLoRA rounds by its candidates: leave `quantizer` out")
        if not self.candidates:
            raise UserError("LQLoRA needs at least one candidate")

    def split(
        self, model: nn.Module, params: PyTree, kernels: Mapping[str, Kernel], key: jax.Array
    ) -> dict[str, Split]:
        arrays = {path: as_array(path, kernel, "LQ-LoRA") for path, kernel in kernels.items()}
        fisher: dict[str, np.ndarray] = {}
        if self.fisher is not None:
            rows = calibration(self.fisher, self.samples)
            fisher = collect_fisher(model, params, rows, lambda path: path in arrays)

        @functools.cache
        def found(path: str, quantizer: BlockNormal) -> tuple[PyTree, float]:
            errors = []

            def one(w: np.ndarray, *own: np.ndarray) -> PyTree:
                result = decompose(w, self.rank, quantizer, self.steps, *own)
                errors.append(result.error)
                return result.weight, scaled(result.fit, self.scale)

            parts = by_matrix(one, arrays[path], *([fisher[path]] if fisher else []))
            return parts, float(np.linalg.norm(errors))

        if self.budget is None:
            chosen = {path: self._first(path, array.shape) for path, array in arrays.items()}
        else:
            errors = {
                path: [found(path, c)[1] if c.fits(array.shape) else None for c in self.candidates]
                for path, array in arrays.items()
            }
            shapes = {path: array.shape for path, array in arrays.items()}
            chosen = plan(shapes, errors, self.candidates, self.budget)
        return {path: Split(found(path, c)[0][1], kernel=found(path, c)[0][0]) for path, c in chosen.items()}

    def _first(self, path: str, shape: tuple[int, ...]) -> BlockNormal:
        fitting = next((candidate for candidate in self.candidates if candidate.fits(shape)), None)
        if fitting is None:
            raise UserError(f"no candidate's blocks divide {path} of {tuple(shape)}")
        return fitting
