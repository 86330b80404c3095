"""Training of models that read images: next-token prediction over texts with images among them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.multimodal.media import Media
from research.multimodal.model import VLM, Pictures
from research.nn.reports import apply_reporting
from research.training.checkpoint_files import mismatches
from research.training.paths import named_leaves
from research.training.task import (
    Batch,
    FromDirectory,
    LanguageModelling,
    Metrics,
    cast_floats,
    dropout_rngs,
    language_metrics,
)
from research.training.workdir import load_model


def batch_pictures(batch: Batch, dtype: str = "float32") -> Pictures:
    """The images of a batch of `Conversations`; towers compute in the dtype of their patches."""
    media = Media(batch["patches"].astype(dtype), batch["grid"], batch["marks"], batch.get("words"))
    return Pictures(media, batch["slot"], batch["positions"])


class FromParts(FromDirectory):
    """Base of tasks with a field `parts`: ((subtree, run or model directory, subtree there), ...), what a run begins
    with, as ("decoder", "runs/lm", "") and ("tower", "runs/tower", "tower"); subtrees are paths, "" is all, the rest is
    drawn. Without any a run begins as `FromDirectory` says."""

    @property
    def start(self) -> Callable[[jax.Array], Any]:
        if not self.parts:
            return super().start
        name = type(self).__name__
        if self.start_from is not None:
            raise UserError(f"{name}: start_from and parts are both given")

        def begin(key: jax.Array) -> Any:
            params = jax.jit(self.init)(key)
            for path, directory, inner in self.parts:
                part = saved_part(directory, inner, f"{name}.parts")
                params = with_part(params, list(filter(None, path.split("/"))), part, path, f"{name}.parts")
            return params

        return begin


@dataclasses.dataclass(frozen=True)
class VisionLanguage(FromParts, LanguageModelling):
    """Batches of `research.multimodal.conversations.Conversations`, text-only ones among them.

    Metrics: those of `LanguageModelling`, and `answers`, the share of rows whose tokens with weight are all right.

    Args:
        parts: what a run begins with, see `FromParts`.
    """

    parts: tuple[tuple[str, str, str], ...] = ()

    def _metrics(
        self, params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Metrics, jax.Array, dict[str, jax.Array]]:
        if isinstance(self.model, VLM):
            self.model.check_steps("step_ends" in batch)
        logits, losses, measured = apply_reporting(
            self.model,
            {"params": cast_floats(params, self.compute_dtype)},
            batch["tokens"],
            batch_pictures(batch, self.compute_dtype),
            segments=batch["segments"],
            prefix=batch.get("step_ends"),
            rngs=dropout_rngs(key),
        )
        metrics, partition = language_metrics(logits, batch)
        return metrics | {"answers": answers(logits, batch)} | measured, partition, losses


def answers(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(rows whose tokens with weight are all the most probable ones, rows with any)."""
    wanted = batch["weights"] > 0
    right = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == batch["targets"]
    rows = jnp.any(wanted, axis=1)
    whole = rows & jnp.all(right | ~wanted, axis=1)
    return jnp.sum(whole, dtype=jnp.float32), jnp.sum(rows, dtype=jnp.float32)


def saved_part(directory: str, inner: str, where: str) -> Any:
    """The parameters of a run or model directory below the path `inner`, "" for all. where: for the `UserError`."""
    tree = load_model(directory).params
    for name in filter(None, inner.split("/")):
        if name not in tree:
            raise UserError(f"{where}: {directory} has no {inner!r}; there it has {', '.join(tree)}")
        tree = tree[name]
    return tree


def with_part(tree: Any, names: list[str], part: Any, path: str, where: str) -> Any:
    """The tree with another subtree at a path, `names` joined. Raises `UserError` unless it has the same shapes."""
    if not names:
        if difference := mismatches(named_leaves(part), named_leaves(tree), path, dtypes=False):
            raise UserError(f"{where}: what is saved does not fit the model: {difference}")
        return part
    name, *rest = names
    if not isinstance(tree, dict) or name not in tree:
        known = ", ".join(tree) if isinstance(tree, dict) else "nothing"
        raise UserError(f"{where}: the model has no {path!r}; there it has {known}")
    return tree | {name: with_part(tree[name], rest, part, path, where)}
