"""CorDA: adapters of the components that a context's inputs choose (arXiv 2406.05223).

With G = X^T X of the inputs X [tokens, in] that a kernel W [in, out] sees in the context, damped to G~:

    W^T G~ = U S V^T,   W^T = U S (V^T G~^-1)       as [out, in], the paper's layout

Of these components r are trained and the rest, W' = W - scale down up, is frozen. Knowledge-preserved adaptation (KPA)
takes the r smallest in the context of what shall be kept, instruction-previewed adaptation (IPA) the r largest in that
of the task. The weighting is by G~ itself, not by its root: that would be the best fit of the outputs (EoRA).

Damping (section 3.2): d = 0.01 times the mean of G's diagonal is added to the diagonal; while | G~ G~^-1 - I |_F is at
least 0.05, d is doubled. A factor of G changes no component, but how much of it each factor gets, which Adam feels: the
paper's code divides every sample's inputs by their largest value, here G has a mean diagonal of 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from research.adapters.lora import LoRA, Split, as_array, by_matrix, calibration, scaled
from research.errors import UserError
from research.nn.lowrank import Root, low_rank, root
from research.nn.weights import Kernel, LowRank
from research.training.feed import Dataset
from research.training.observe import collect_grams

PyTree = Any


def damped(gram: np.ndarray) -> tuple[Root, float]:
    """gram [in, in] -> the weighting by the damped matrix of mean diagonal 1 + d, and d."""
    gram = np.asarray(gram, np.float64)
    mean, one, damping = np.trace(gram) / len(gram), np.eye(len(gram)), 0.01
    if not mean > 0:
        return root(gram, "whole"), damping  # which says what is wrong
    gram = gram / mean
    while np.linalg.norm((gram + damping * one) @ np.linalg.inv(gram + damping * one) - one) >= 0.05:
        damping *= 2
    return root(gram, "whole", ridge=damping), damping


@dataclasses.dataclass(frozen=True)
class CorDA(LoRA):
    """CorDA as an adapter.

    Args:
        mode: "knowledge" (KPA) or "instruction" (IPA).
        context: the data whose inputs orient the decomposition: what shall be kept, or the task.
        samples: rows of it.
    """

    rank: int = 128
    mode: Literal["knowledge", "instruction"] = "knowledge"
    context: Dataset | None = None
    samples: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.quantizer is not None:
            raise UserError("CorDA's frozen kernels are arrays; for rounded ones take LoftQ or LQLoRA")
        if self.context is None:
            raise UserError("CorDA needs a context: the data whose inputs orient the decomposition")

    def split(
        self, model: nn.Module, params: PyTree, kernels: Mapping[str, Kernel], key: jax.Array
    ) -> dict[str, Split]:
        arrays = {path: as_array(path, kernel, "CorDA") for path, kernel in kernels.items()}
        rows = calibration(self.context, self.samples)
        grams = collect_grams(model, params, rows, lambda path: path in arrays)
        weightings: dict[int, list[Root]] = {}  # kernels of the same inputs share one

        def chosen(path: str, w: np.ndarray) -> LowRank:
            total = grams[path].total
            if id(grams[path]) not in weightings:
                weightings[id(grams[path])] = [damped(g)[0] for g in total.reshape(-1, *total.shape[-2:])]
            of_matrix = iter(weightings[id(grams[path])])
            which = "bottom" if self.mode == "knowledge" else "top"
            return by_matrix(
                lambda w: scaled(low_rank(w, self.rank, next(of_matrix), which=which), self.scale), w
            )

        return {path: Split(chosen(path, w), taken=True) for path, w in arrays.items()}
