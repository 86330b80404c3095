"""EVE: a decoder that takes patches directly, taught where they stand by a frozen encoder (arXiv 2406.11832).

Patch embedding layer, of width c, over a picture whose long side is `side` pixels and whose short side is a multiple of
two patches; F [H, W, c] are its patches after a linear map without bias:

    mean_ij = the mean of the 2 x 2 patches of window (i, j)
    P_ij = mean_ij + W_o softmax(W_q LN(mean_ij) . W_k LN(F) c^-1/2) W_v LN(F)        over the 4 patches of the window
    <CLS> = the same of a learned vector over all of P
    [<CLS>; P_00 ... P_0w <SPL>; P_10 ... <SPL>; ...]     1 + h (w + 1) tokens, h = H / 2, w = W / 2; then an MLP

The scale is of the full width c, not of a head's. Patches get no positions but the decoder's own, and <SPL>.

Patch aligning layer, in training alone: with h_j the decoder's states at the image's windows behind layers L (after the
final norm), L - 4, ..., 0, u_j = W_j LN(h_j), and for every token, with heads, over the layers j below the top one

    p = W_in h_L + W_out sum_j softmax_j(u_L . u_j c^-1/2) u_j          L_v = 1 - mean cos(p, z)

where z are the frozen encoder's features of the same places; the mean is over the windows of a picture, then over
pictures. It joins the loss with the weight 1. Without the layer and the encoder the logits are the same.

Scale and norms of the aligning layer are taken to be those of the embedding layer.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.multimodal.connectors import Projection, read, split_heads
from research.multimodal.media import Crop, Media, Planner
from research.multimodal.model import VLM, Pictures
from research.multimodal.tower import Seen, patch_mask
from research.nn.attention import Context
from research.nn.cache import Fresh
from research.nn.linear import Linear, parameter
from research.nn.norm import LayerNorm
from research.nn.reports import LOSSES, report_loss
from research.nn.transformer import Hook


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyAspect(Planner):
    """The picture as it is, its long side `side` pixels; view 1 is the same at half the size, for the teacher."""

    side: int

    def __post_init__(self):
        if self.side % (2 * self.patch):
            raise UserError(f"AnyAspect: side={self.side} is not a multiple of two patches of {self.patch}")

    @property
    def views(self) -> int:
        return 2

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def rows(self) -> int:
        windows = self.side // self.patch // 2
        return 1 + windows * (windows + 1)

    def plan(self, width: int, height: int) -> tuple[Crop, ...]:
        unit, long = 2 * self.patch, max(width, height)
        w, h = (max(-(-length * self.side // (long * unit)), 1) * unit for length in (width, height))
        return Crop.whole(w, h), Crop.whole(w // 2, h // 2)

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        rows, columns = self.grid(crops[1])
        return list(range(1 + rows * (columns + 1)))


class PatchEmbeddingLayer(nn.Module):
    """Media -> Seen of one view of 1 + h (w + 1) tokens and what is behind them, c = `width` wide."""

    width: int
    num_heads: int = 8

    @nn.compact
    def __call__(self, media: Media) -> Seen:
        batch, images, _, patches, pixels = media.patches.shape
        count, n = batch * images, patches // 4
        grid = media.grid[:, :, 0].reshape(count, 2) // 2  # of windows
        w = jnp.maximum(grid[:, 1:], 1)
        patch = Linear(self.width, name="projection")(media.patches[:, :, 0].reshape(count, patches, pixels))
        row, column = jnp.arange(n) // w, jnp.arange(n) % w  # [count, n]
        corner = 4 * row * w + 2 * column  # rows of patches are 2 w long
        index = corner[..., None] + jnp.stack([0 * w, 0 * w + 1, 2 * w, 2 * w + 1], axis=-1)  # [count, n, 4]
        index = jnp.minimum(index, patches - 1).reshape(count, -1, 1)
        window = jnp.take_along_axis(patch, index, axis=1).reshape(count * n, 4, self.width)
        mean = jnp.mean(window, axis=1, keepdims=True)
        pooled = self._pool("local", mean, window).reshape(count, n, self.width)
        init = nn.initializers.normal(0.02)
        token, split = (
            parameter(self, name, init, (1, self.width)) for name in ("class_token", "split_token")
        )
        there = patch_mask(grid, n)
        start = jnp.broadcast_to(token.astype(patch.dtype), (count, 1, self.width))
        start = self._pool("global", start, pooled, there[:, None])
        # Behind <CLS>, place j is column j % (w + 1) of row j // (w + 1); column w is <SPL>.
        sides = round(n**0.5)
        place = jnp.arange(sides * (sides + 1))
        row, column = place // (w + 1), place % (w + 1)
        chosen = jnp.minimum(row * w + column, n - 1)[..., None]
        body = jnp.where(
            (column < w)[..., None], jnp.take_along_axis(pooled, chosen, axis=1), split.astype(patch.dtype)
        )
        tokens = jnp.concatenate([start, body], axis=1)
        mask = jnp.arange(tokens.shape[1]) < 1 + grid[:, :1] * (grid[:, 1:] + 1)
        shape = batch, images, 1, tokens.shape[1]
        return Seen(
            tokens.reshape(*shape, -1), mask.reshape(shape), media.grid, tokens[None].reshape(1, *shape, -1)
        )

    def _pool(self, name: str, query: jax.Array, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """query [N, Q, c] + what it reads of x [N, S, c]."""
        normed = LayerNorm(name=f"{name}_norm")(x)
        q = Linear(self.width, name=f"{name}_query")(LayerNorm(name=f"{name}_query_norm")(query))
        k, v = jnp.split(Linear(2 * self.width, name=f"{name}_key_value")(normed), 2, axis=-1)
        heads = [split_heads(y, self.num_heads) for y in (q, k, v)]
        out = read(*heads, mask, scale=self.width**-0.5).reshape(query.shape)
        return query + Linear(self.width, name=f"{name}_output")(out)


class PatchAligningLayer(nn.Module):
    """states: the decoder's behind its levels, top first, [B, T, D] each -> p [B, T, width]."""

    width: int
    num_heads: int = 8

    @nn.compact
    def __call__(self, states: Sequence[jax.Array]) -> jax.Array:
        shape = states[0].shape[:2]
        levels = [
            Linear(self.width, name=f"level_{j}")(LayerNorm(name=f"norm_{j}")(x)).reshape(-1, 1, self.width)
            for j, x in enumerate(states)
        ]
        below = jnp.concatenate(levels[1:], axis=1)  # [B * T, levels - 1, width]
        query, keys = (split_heads(x, self.num_heads) for x in (levels[0], below))
        mixed = read(query, keys, keys, scale=self.width**-0.5).reshape(*shape, self.width)
        top = Linear(self.width, name="input")(states[0])
        return top + Linear(self.width, name="output")(mixed)


def alignment_loss(p: jax.Array, z: jax.Array, picture: jax.Array, pictures: int) -> jax.Array:
    """1 - mean cos(p, z), float32[], in [0, 2]: over the tokens of a picture, then over pictures.

    p, z [B, T, c]; picture int32[B, T], the picture that a token belongs to, -1 for none.
    """
    p, z = (x.astype(jnp.float32) for x in (p, z))
    norms = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(z, axis=-1)
    cosine = jnp.sum(p * z, axis=-1) / jnp.maximum(norms, 1e-12)
    member = jax.nn.one_hot(picture, pictures)  # -1 is none
    count = jnp.sum(member, axis=1)
    mean = jnp.einsum("bt,bti->bi", cosine, member) / jnp.maximum(count, 1.0)
    some = (count > 0).astype(jnp.float32)
    return jnp.sum(some * (1.0 - mean)) / jnp.maximum(jnp.sum(some), 1.0)


class EVE(VLM):
    """A VLM whose tower is a `PatchEmbeddingLayer` and whose planner is an `AnyAspect`.

    Args:
        teacher: a frozen Tower of flexible grids, or None: nothing is aligned.
        every: layers from level to level.
        align_heads: of the aligning layer.

    Its parameters add teacher/... and align/....
    """

    teacher: nn.Module | None = None
    every: int = 4
    align_heads: int = 8

    def setup(self) -> None:
        if self.teacher is not None:
            self.align = PatchAligningLayer(self.teacher.width, self.align_heads)

    def features(
        self,
        tokens: jax.Array,
        pictures: Pictures | None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """As of `VLM`; reports the loss `alignment` where losses are asked for."""
        wanted = self.is_mutable_collection(LOSSES) or self.is_initializing()
        if self.teacher is None or pictures is None or not wanted:
            return super().features(tokens, pictures, segments, prefix)
        x, _, positions = self.enter(tokens, pictures)
        states: dict[int, jax.Array] = {}
        hooks = {place: (_keep(states, place),) for place in self.levels()}
        hidden, fresh = self.decoder.run(x, Context(positions, segments, prefix), hooks)
        p = self.align([hidden, *(states[place] for place in self.levels())])
        media = pictures.media
        # The teacher reads view 1 alone, and is never learned from.
        half = jax.tree.map(lambda y: y[:, :, 1:], media)
        z = jax.lax.stop_gradient(self.teacher(half).tokens)
        batch, images, _, patches, width = z.shape
        picture, window = self.windows(pictures)
        index = jnp.maximum(picture, 0) * patches + window
        z = jnp.take_along_axis(z.reshape(batch, images * patches, width), index[..., None], axis=1)
        report_loss(self, "alignment", alignment_loss(p, z, picture, images))
        return hidden, fresh

    @nn.nowrap
    def levels(self) -> list[int]:
        """Before which layers states are taken, from above: L - every, ..., 0."""
        return list(range(self.decoder.num_layers - self.every, -1, -self.every))

    @nn.nowrap
    def windows(self, pictures: Pictures) -> tuple[jax.Array, jax.Array]:
        """int32[B, T] each: the picture that a token is a window of, -1 for none, and which window of it."""
        picture = jnp.where(pictures.slot >= 0, pictures.slot // self.planner.rows, -1)
        grid = jnp.take_along_axis(pictures.media.grid[:, :, 1], jnp.maximum(picture, 0)[..., None], axis=1)
        place = pictures.slot % self.planner.rows - 1
        columns = jnp.maximum(grid[..., 1], 1)
        row, column = place // (columns + 1), place % (columns + 1)
        inside = (picture >= 0) & (place >= 0) & (column < columns)
        return jnp.where(inside, picture, -1), jnp.where(inside, row * columns + column, 0)


def _keep(states: dict[int, jax.Array], place: int) -> Hook:
    def hook(x: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Context, None]:
        states[place] = x
        return x, context, None

    return hook


class SequenceProjection(nn.Module):
    """Every token of the embedding layer through the two-layer MLP: [B, I, 1, M, c] -> [B, I, M, width]."""

    width: int

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        return Projection(self.width, name="projection")(seen.tokens[:, :, 0])
