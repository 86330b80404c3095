"""Vision transformer encoder (arXiv 2010.11929) with any block of the project."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.attention import Context
from research.nn.linear import Linear
from research.nn.norm import LayerNorm
from research.nn.patch import PatchEmbedding
from research.nn.transformer import LayerStack


class ViT(LayerStack, kw_only=True):
    """Patches, a stack of blocks (attention rule `Full()`), a final norm, pooling and a linear head.

    Args:
        num_classes, width, patch: outputs, D, side of a patch in pixels.
        pool: "mean" over patches, or "class" for a class token.
        final_norm: template of the last norm.
    """

    num_classes: int
    width: int
    patch: int
    pool: Literal["mean", "class"] = "mean"
    final_norm: nn.Module = LayerNorm()

    def setup(self) -> None:
        self.patch_embedding = PatchEmbedding(self.patch, self.width, self.pool == "class")
        self.make_layers()
        self.head = Linear(self.num_classes, use_bias=True)

    def features(self, images: jax.Array) -> jax.Array:
        """images [B, h, w, c] -> tokens after the final norm [B, N (+ 1), D]."""
        x = self.patch_embedding(images)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self.final_norm(self.run_layers(x, Context(positions))[0])

    def __call__(self, images: jax.Array) -> jax.Array:
        """images [B, h, w, c] -> float32 logits [B, num_classes]."""
        x = self.features(images)
        pooled = x[:, 0] if self.pool == "class" else jnp.mean(x, axis=1)
        return self.head(pooled).astype(jnp.float32)
