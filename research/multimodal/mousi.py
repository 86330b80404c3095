"""MouSi: several frozen vision experts read one picture, and its tokens share positions (arXiv 2401.17221).

Expert i gives V_i [n_i, d_i]. Fusion by MLP: m_i neighbouring patches side by side on the channels, a first layer of
the expert's own, GELU, and a second layer that all experts share, n_i / m_i tokens; or by queries: a small
cross-attention of the expert's own, and a linear map. The experts' tokens stand one after the other. Of r x c patches
positions are spent:

    "none"    one for each      "image"   one for all      "row"   one for a row      "row" with `columns`   one for a
    row, and a learned embedding of the column is added to the token

The text goes on with the position behind the last. Experts read the same patches here: theirs is one patch size.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.multimodal.connectors import Resampler
from research.multimodal.media import Crop, Media, Square
from research.multimodal.tower import Seen
from research.nn.linear import Linear, parameter
from research.nn.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(Square):
    """A `Square` of which every expert makes its own tokens. Args: counts, tokens of each expert."""

    counts: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.counts:
            raise UserError("Experts: counts, the tokens of each expert, are expected")

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def group(self, row: int) -> int | None:
        if self.share != "row":
            return super().group(row)
        expert = 0
        while row >= self.counts[expert]:
            row -= self.counts[expert]
            expert += 1
        return expert * self.patches + row // round(self.counts[expert] ** 0.5)

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        return list(range(self.rows))


class Panel(nn.Module):
    """A tower of towers: media -> what each expert sees."""

    experts: tuple[nn.Module, ...]

    def __call__(self, media: Media) -> tuple[Seen, ...]:
        return tuple(expert(media) for expert in self.experts)


def grouped(x: jax.Array, count: int) -> jax.Array:
    """[..., P, d] -> [..., P / count, count * d]: neighbours of a row side by side."""
    if x.shape[-2] % count:
        raise UserError(f"{x.shape[-2]} patches do not divide into groups of {count}")
    return x.reshape(*x.shape[:-2], x.shape[-2] // count, -1)


class ExpertFusion(nn.Module):
    """What each expert sees -> [B, I, sum of n_i / m_i, width].

    Args:
        groups: m_i of each expert.
        hidden_dim: between the two layers; None: `width`.
        queries: for fusion by queries, how many an expert has; groups are then not used. heads: of their attention.
        columns: whether tokens get an embedding of their column.
    """

    width: int
    groups: tuple[int, ...]
    hidden_dim: int | None = None
    queries: int | None = None
    num_heads: int = 8
    columns: bool = False

    @nn.compact
    def __call__(self, seen: tuple[Seen, ...], media: Media) -> jax.Array:
        if len(seen) != len(self.groups):
            raise UserError(
                f"ExpertFusion: groups={self.groups} are of {len(self.groups)} experts, not {len(seen)}"
            )
        second = Linear(self.width, True, name="second")
        parts = []
        for i, (own, count) in enumerate(zip(seen, self.groups, strict=True)):
            if self.queries is not None:
                resampler = Resampler(
                    self.queries, self.width, self.num_heads, 4 * own.tokens.shape[-1], name=f"resampler_{i}"
                )
                x = resampler(own, media)
            else:
                x = grouped(own.tokens.reshape(*own.tokens.shape[:2], -1, own.tokens.shape[-1]), count)
                first = Linear(self.hidden_dim or self.width, True, name=f"first_{i}")
                x = second(ACTIVATIONS["gelu"](first(x)))
            if self.columns:
                side = round(x.shape[2] ** 0.5)
                table = parameter(self, f"columns_{i}", nn.initializers.normal(0.02), (side, self.width))
                x = x + jnp.tile(table, (side, 1)).astype(x.dtype)
            parts.append(x)
        return jnp.concatenate(parts, axis=2)
