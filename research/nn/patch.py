"""Images as sequences: patches, their embedding, learned positions. Windows of grids of any dimension."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.linear import Linear, parameter


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """[B, h, w, c] -> [B, h / p * w / p, p * p * c], row-major patches of row-major pixels."""
    batch, height, width, channels = images.shape
    if patch < 1 or height % patch or width % patch:
        raise UserError(f"images of {height}x{width} pixels don't divide into patches of {patch}x{patch}")
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def window_counts(shape: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """How many windows fit along each axis, floor((n - size) / stride) + 1: what is left over is in none.

    Raises `UserError` unless a window fits.
    """
    if not len(shape) == len(size) == len(stride) or min((*size, *stride), default=0) < 1:
        raise UserError(
            f"windows of {size} every {stride} of a grid of {shape}: as many positive numbers are expected"
        )
    if any(n < s for n, s in zip(shape, size, strict=True)):
        raise UserError(f"a window of {size} does not fit into a grid of {shape}")
    return tuple((n - s) // t + 1 for n, s, t in zip(shape, size, stride, strict=True))


def windows(x: jax.Array, size: tuple[int, ...], stride: tuple[int, ...]) -> jax.Array:
    """[B, n_1, ..., n_d, c] -> [B, windows, size_1 ... size_d c]: all windows that fit, they may overlap.

    Windows are in row-major order, and so are their places. A `Linear` of them is a convolution without padding;
    `patchify` is this with square windows side by side.
    """
    axes = len(size)
    counts = window_counts(x.shape[1:-1], size, stride)
    for axis in range(axes):  # axis 1 + 2 axis becomes two: which window, and where in it
        places = jnp.arange(counts[axis])[:, None] * stride[axis] + jnp.arange(size[axis])
        x = jnp.take(x, places, axis=1 + 2 * axis)
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.transpose(order).reshape(x.shape[0], math.prod(counts), math.prod(size) * x.shape[-1])


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
