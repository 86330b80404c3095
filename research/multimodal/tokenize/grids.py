"""Data on grids: images, spectrograms, video, the bands of a hyperspectral window (arXiv 2307.10802)."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.multimodal.tokenize.contract import Tokens
from research.nn.linear import Linear
from research.nn.patch import window_counts, windows


class GridTokens(nn.Module):
    """Windows of a grid, flattened and projected: a convolution of any dimension without padding.

    An image is a grid of (height, width, channels) with windows of 16 x 16 side by side; a log-mel spectrogram one of
    (frames, 128, 1) with overlapping windows of 16 x 16 every 10 (AST, arXiv 2104.01778), floor((T - 16) / 10) + 1 of
    them along time; a clip one of (frames, height, width, channels).

    Args:
        width: D.
        shape: of a record, with channels.
        size, stride: of the windows along every axis but the channels; what is left over at the end is not seen.
        key: the array's name in a record.

    Parameters: projection/{kernel [prod(size) c, D], bias}.
    """

    width: int
    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    key: str = "images"

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {self.key: jax.ShapeDtypeStruct(self.shape, jnp.float32)}

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows along each axis."""
        return window_counts(self.shape[:-1], self.size, self.stride)

    @property
    def count(self) -> int:
        return math.prod(self.counts)

    @nn.compact
    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens:
        cut = windows(record[self.key], self.size, self.stride)
        return Tokens(Linear(self.width, use_bias=True, name="projection")(cut))


class BandTokens(nn.Module):
    """Groups of neighbouring bands of a window f32[h, w, bands], each flattened and projected: a token a group.

    Args:
        width: D.
        shape: (h, w, bands).
        group, stride: bands of a token, and how far the next one's lie from them (1: overlapping groups, as in
            SpectralFormer, arXiv 2107.02988).

    Parameters: projection/{kernel [group h w, D], bias}.
    """

    width: int
    shape: tuple[int, int, int]
    group: int
    stride: int

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"images": jax.ShapeDtypeStruct(self.shape, jnp.float32)}

    @property
    def count(self) -> int:
        return window_counts(self.shape[-1:], (self.group,), (self.stride,))[0]

    @nn.compact
    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens:
        x = record["images"]
        bands = x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)  # [B, bands, h w]
        cut = windows(bands, (self.group,), (self.stride,))
        return Tokens(Linear(self.width, use_bias=True, name="projection")(cut))
