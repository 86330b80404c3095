"""A tower learns to name what every patch shows, before it is frozen; for want of a tower trained on pairs."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.multimodal.connectors import shuffle_square
from research.multimodal.media import Media
from research.multimodal.tower import Tower
from research.nn.linear import Linear
from research.nn.patch import patchify
from research.training.task import Batch, Metrics, classification_metrics


class Namer(nn.Module):
    """images f32[B, h, w, 3] in [-1, 1] -> float32 logits [B, patches, num_classes]. Parameters: tower, head.

    Args:
        whole: the class token names the picture, [B, 1, num_classes].
        shrink: pictures are scaled down by this first.
        merge: squares of so many patches along each side, of a square picture, are named together.
    """

    tower: Tower
    num_classes: int
    patch: int
    whole: bool = False
    shrink: int = 1
    merge: int = 1

    def setup(self) -> None:
        self.head = Linear(self.num_classes, True)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        height, width = height // self.shrink, width // self.shrink
        images = images.reshape(batch, height, self.shrink, width, self.shrink, channels).mean(axis=(2, 4))
        grid = jnp.broadcast_to(jnp.asarray([height, width]) // self.patch, (batch, 1, 2))
        media = Media(patchify(images, self.patch)[:, None], grid, jnp.zeros((batch, 1), int))
        seen = self.tower(media)
        named = seen.taps[-1, :, 0, :1] if self.whole else seen.tokens[:, 0]
        if self.merge > 1:
            named = shuffle_square(named, self.merge)
        return self.head(named).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Naming:
    """Batches of `research.data.shapes.Cells`, whose cells are the patches. Metrics: `loss` in nats, `accuracy`, of the
    cells that are not empty and, together, as much of the others; or of the pictures, which then show one thing."""

    model: Namer
    image_shape: tuple[int, int, int]

    def init(self, key: jax.Array) -> Any:
        return self.model.init(key, jnp.zeros((1, *self.image_shape)))["params"]

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> Metrics:
        return self.evaluate(params, batch)

    def evaluate(self, params: Any, batch: Batch) -> Metrics:
        logits = self.model.apply({"params": params}, batch["images"])
        labels = jnp.max(batch["labels"], axis=1) if self.model.whole else batch["labels"].reshape(-1)
        full = (labels > 0).astype(jnp.float32) * jnp.repeat(batch["weights"], logits.shape[1])
        empty = jnp.repeat(batch["weights"], logits.shape[1]) - full
        share = jnp.sum(full) / jnp.maximum(jnp.sum(empty), 1.0)
        flat = {"labels": labels, "weights": full + empty * jnp.minimum(share, 1.0)}
        return classification_metrics(logits.reshape(-1, logits.shape[-1]), flat)

    def variants(self, params: Any) -> dict[str, Any]:
        return {"": params}
