"""What a model does with long contexts: recall, needles by depth and length, loss against position.

Each is an ordinary evaluation of a language-modelling task, so a trainer's `Evaluate` over the same data gives the
same numbers; these functions are for claims, notebooks and programs that hold a model and its parameters.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.data.recall import Recall, needle
from research.errors import UserError
from research.nn.reports import apply_reporting
from research.training.evaluators import means
from research.training.feed import Dataset
from research.training.task import Batch, LanguageModelling, Metrics, cross_entropy, language_metrics

PyTree = Any


@dataclass(frozen=True)
class ByPosition(LanguageModelling):
    """Language modelling whose evaluation also has `loss_at_<p>`, the nats per token at positions p .. p + block - 1.

    Positions are those of the batch, so packed documents count from their own beginnings.
    """

    block: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.block < 1:
            raise UserError(f"ByPosition.block: {self.block}; at least 1 position is expected")

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        places = dict(positions=batch["positions"], segments=batch["segments"])
        logits, _, measured = apply_reporting(self.model, {"params": params}, batch["tokens"], **places)
        metrics, _ = language_metrics(logits, batch)
        nats, _, _ = cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["targets"].reshape(-1))
        weights, positions = batch["weights"].reshape(-1), batch["positions"].reshape(-1)
        for start in range(0, batch["tokens"].shape[1], self.block):
            inside = weights * ((positions >= start) & (positions < start + self.block))
            metrics[f"loss_at_{start}"] = (jnp.sum(inside * nats), jnp.sum(inside))
        return metrics | measured


@functools.lru_cache(maxsize=32)
def _evaluation(task: LanguageModelling):
    """Compiled once for a task and a shape."""
    return jax.jit(task.evaluate)


def measure(
    task: LanguageModelling, params: PyTree, data: Dataset, batch_size: int = 32, batches: int | None = None
) -> dict[str, float]:
    """{metric: mean} over one pass of `data`, or its first `batches`. Raises UserError as `Evaluate` does."""
    totals: dict[str, Any] = {}
    for number, batch in enumerate(data.batches(0, batch_size, epochs=1)):
        if number == batches:
            break
        metrics = jax.tree.map(lambda x: np.asarray(x, np.float64), _evaluation(task)(params, batch))
        totals = jax.tree.map(np.add, totals, metrics) if totals else metrics
    if not totals:
        raise UserError("measure: the data has no records")
    return means(totals, "measure")


def recall_accuracy(
    model: nn.Module,
    params: PyTree,
    lengths: Sequence[int],
    records: int = 64,
    batch_size: int = 32,
    **fields,
) -> dict[int, float]:
    """{length: share of right answers} of `Recall` rows of each length; `fields` are its others."""
    held_out = dict(split="test", size=records) | fields
    task = LanguageModelling(model)
    return {n: measure(task, params, Recall(n, **held_out), batch_size)["accuracy"] for n in lengths}


def needle_accuracy(
    model: nn.Module,
    params: PyTree,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    records: int = 32,
    batch_size: int = 32,
    **fields,
) -> np.ndarray:
    """float64[lengths, depths]: the share of needles found; `fields` are further ones of `needle`."""
    held_out = dict(split="test", size=records) | fields
    task = LanguageModelling(model)

    def found(length: int, depth: float) -> float:
        return measure(task, params, needle(length, depth, **held_out), batch_size)["accuracy"]

    return np.array([[found(length, depth) for depth in depths] for length in lengths])


def loss_by_position(
    model: nn.Module,
    params: PyTree,
    data: Dataset,
    block: int = 64,
    batch_size: int = 16,
    batches: int | None = None,
) -> dict[int, float]:
    """{first position: nats per token of its block}; blocks without a target are left out. exp is the perplexity."""
    measured = measure(ByPosition(model, block=block), params, data, batch_size, batches)
    prefix = "loss_at_"
    return {int(name.removeprefix(prefix)): x for name, x in measured.items() if name.startswith(prefix)}
