"""Images as sequences: patches, their embedding, learned positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.linear import Linear, parameter


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """[B, h, w, c] -> [B, h / p * w / p, p * p * c], row-major patches of row-major pixels."""
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise UserError(f"images of {height}x{width} pixels don't divide into patches of {patch}x{patch}")
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


class PatchEmbedding(nn.Module):
    """Linear embedding of patches plus a learned position table, [B, h, w, c] -> [B, N (+ 1), width].

    `class_token` puts one learned token in front; the position table covers it too.
    """

    patch: int
    width: int
    class_token: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = Linear(self.width, use_bias=True, name="projection")(patchify(images, self.patch))
        if self.class_token:
            token = parameter(self, "class_token", nn.initializers.zeros, (1, self.width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        table = parameter(self, "positions", nn.initializers.normal(0.02), (x.shape[1], self.width))
        if table.shape[0] != x.shape[1]:
            raise UserError(
                f"the position table holds {table.shape[0]} positions, the image has {x.shape[1]}"
            )
        return x + table.astype(x.dtype)
