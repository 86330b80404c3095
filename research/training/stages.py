"""Stages: for a span of steps, what is trainable, the data, the optimizer and the loss weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError, nearest
from research.training.optimizers import Optimizer
from research.training.paths import first_match, named_leaves

PyTree = Any


@dataclass(frozen=True)
class Stage:
    """A span of steps.

    steps: optimizer updates. A stage starts with a fresh optimizer state and its schedule spans these steps.
    batch_size: records per update over all hosts and microbatches.
    data: the stage's own dataset, read from its record 0. `None` reads the trainer's on from where the last
        stage that read it stopped.
    trainable, frozen: patterns (see `paths`). A parameter is trained if a pattern of `trainable` and none of
        `frozen` is found in its path. The others get no gradient and no optimizer memory and keep their bits.
        Leaves that are not floating point (codes of a quantized kernel) are never trained.
    loss_weights: {metric of the task: weight}; the objective is the weighted sum of their means. Empty means
        `loss` alone.
    accumulate: microbatches per update, each `batch_size / accumulate` records.
    """

    name: str
    steps: int
    batch_size: int
    optimizer: Optimizer
    data: Any = None
    trainable: tuple[str, ...] = (".*",)
    frozen: tuple[str, ...] = ()
    loss_weights: dict[str, float] = field(default_factory=dict)
    accumulate: int = 1

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"stage {self.name!r}: {name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"stage {self.name!r}: batch_size {self.batch_size} does not divide into "
                f"accumulate={self.accumulate} equal microbatches"
            )

    def weights(self) -> dict[str, float]:
        """{metric: weight} of the objective."""
        return dict(self.loss_weights) or {"loss": 1.0}

    def check_metrics(self, reported: Sequence[str]) -> None:
        """Raise `UserError` if a loss weight names none of the metrics (the scalar ones) that the task reports."""
        for name in self.weights():
            if name not in reported:
                close = nearest(name, reported) or ", ".join(sorted(reported))
                raise UserError(
                    f"stage {self.name!r}: loss_weights names {name!r}, which the task does not report; "
                    f"it reports {close}"
                )

    def mask(self, params: PyTree) -> PyTree:
        """The tree of bools: True where a parameter (shapes suffice) is trained.

        Raises `UserError` if a pattern matches no parameter or if nothing is left to train.
        """
        leaves = named_leaves(params)
        paths = list(leaves)
        wanted = first_match(paths, self.trainable, f"stage {self.name!r}.trainable")
        held = first_match(paths, self.frozen, f"stage {self.name!r}.frozen")
        flags = [
            w is not None and h is None and jnp.issubdtype(leaf.dtype, jnp.floating)
            for w, h, leaf in zip(wanted, held, leaves.values(), strict=True)
        ]
        if not any(flags):
            raise UserError(f"stage {self.name!r}: trainable and frozen leave no parameter to train")
        return jax.tree.unflatten(jax.tree.structure(params), flags)


def split(params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """(trainable, frozen): the tree twice, each with `None` (no leaf at all) in the places of the other."""
    trainable = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, params)
    frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, params)
    return trainable, frozen


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None
    )
