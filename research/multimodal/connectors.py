"""Connectors: what a tower sees -> rows of the decoder's width, which prompts then place among their tokens.

A connector is any module (what the tower gives, Media) -> [B, I, M, D]. Which of the M rows of an image are real is the
planner's knowledge: it spells only those.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.multimodal.media import Media
from research.multimodal.tower import Seen
from research.nn.linear import Linear, parameter
from research.nn.mlp import ACTIVATIONS
from research.nn.norm import LayerNorm


class Projection(nn.Module):
    """x [..., dv] -> [..., width]: a linear map, or two with GELU between (LLaVA-1.5's mlp2x_gelu)."""

    width: int
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])  # see `LayerStack.token_layout`
        x = Linear(self.width, use_bias=True, name="linear_1")(x)
        for layer in range(2, self.layers + 1):
            x = Linear(self.width, use_bias=True, name=f"linear_{layer}")(ACTIVATIONS["gelu"](x))
        return x.reshape(*shape, -1)


class PatchProjection(nn.Module):
    """Every patch by itself: rows are the patches of view 0, of view 1, ... (LLaVA: linear; 1.5: two layers)."""

    width: int
    layers: int = 2

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        tokens = seen.tokens.reshape(*seen.tokens.shape[:2], -1, seen.tokens.shape[-1])
        return Projection(self.width, self.layers, name="projection")(tokens)


class StepProjection(nn.Module):
    """Of sounds: the windows of a step in time are averaged over frequency (LTU, arXiv 2305.10790), `merge` steps
    stand side by side (SLAM-ASR, arXiv 2402.08846), and two layers follow: [B, I, 1, P, dv] -> [B, I, M, width], M
    being steps / merge, rounded up.

    Args:
        bands: windows along frequency; P is steps times bands.
    """

    width: int
    bands: int
    merge: int = 1

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        *leading, _, patches, dim = seen.tokens.shape
        if patches % self.bands:
            raise UserError(f"StepProjection: {patches} windows are no steps of bands={self.bands}")
        # Steps behind a sound's last share a row with it, so they are nothing.
        tokens = jnp.where(seen.mask[..., None], seen.tokens, 0)
        steps = jnp.mean(tokens.reshape(*leading, -1, self.bands, dim), axis=-2)
        short = -steps.shape[-2] % self.merge
        steps = jnp.pad(steps, [(0, 0)] * len(leading) + [(0, short), (0, 0)])
        return Projection(self.width, name="projection")(steps.reshape(*leading, -1, self.merge * dim))


class Read(nn.Module):
    """Multi-head attention of queries to keys of another kind: q [N, Q, d], k and v [N, S, .] -> [N, Q, d].

    mask bool[N or 1, Q, S]: a query that sees nothing gets 0 (before the output's bias). slot: every query also sees
    one learned key and value (torch's add_bias_kv), the parameters key_slot and value_slot [d].
    """

    num_heads: int
    use_bias: bool = True
    output: bool = True
    slot: bool = False

    @nn.compact
    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        width = query.shape[-1]
        parts = {"query": query, "key": key, "value": value}
        heads = [
            split_heads(
                Linear(width, self.use_bias, name=name)(x.reshape(-1, x.shape[-1])).reshape(
                    *x.shape[:2], width
                ),
                self.num_heads,
            )
            for name, x in parts.items()
        ]
        if self.slot:
            heads[1:] = [
                self._with_slot(x, name) for x, name in zip(heads[1:], ("key", "value"), strict=True)
            ]
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (0, 0), (0, 1)), constant_values=True)
        out = read(*heads, mask).reshape(*query.shape[:2], width)
        return Linear(width, self.use_bias, name="output")(out) if self.output else out

    def _with_slot(self, x: jax.Array, name: str) -> jax.Array:
        """x [N, S, H, d / H] -> [N, S + 1, H, d / H]."""
        own = parameter(self, f"{name}_slot", nn.initializers.normal(0.02), (x.shape[2] * x.shape[3],))
        return jnp.concatenate([x, jnp.broadcast_to(own.reshape(x.shape[2:]), x[:, :1].shape)], axis=1)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[..., width] -> [..., num_heads, width / num_heads]. Raises UserError where heads don't divide the width."""
    if x.shape[-1] % num_heads:
        raise UserError(f"num_heads={num_heads} does not divide the width of {x.shape[-1]}")
    return x.reshape(*x.shape[:-1], num_heads, -1)


def read(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """query [N, Q, H, d], key and value [N, S, H, d], mask bool[N or 1, Q, S] -> [N, Q, H, d].

    Softmax in float32 of products times `scale`, by default d^-1/2; a query without a key gets exactly 0.
    """
    scores = jnp.einsum("nqhd,nshd->nhqs", query, key, preferred_element_type=jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        weights = jnp.where(mask[:, None], weights, 0.0)
    out = jnp.einsum(
        "nhqs,nshd->nqhd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return out.astype(query.dtype)


class Resampler(nn.Module):
    """Learned queries read all patches of an image, however many: [B, I, V, P, dv] -> [B, I, queries, width].

    Blocks of q + Read(norm q, norm x) and q + MLP(norm q), then a linear map (Flamingo's perceiver, arXiv 2204.14198,
    without the queries among the keys).
    """

    queries: int
    width: int
    num_heads: int
    hidden_dim: int
    layers: int = 1

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        batch, images, *_, dim = seen.tokens.shape
        x = seen.tokens.reshape(batch * images, -1, dim)
        mask = seen.mask.reshape(batch * images, 1, -1)
        table = parameter(self, "queries", nn.initializers.normal(0.02), (self.queries, dim))
        q = jnp.broadcast_to(table.astype(x.dtype), (x.shape[0], *table.shape))
        for i in range(self.layers):
            keys = LayerNorm(name=f"layer_{i}_key_norm")(x)
            queries = LayerNorm(name=f"layer_{i}_query_norm")(q)
            q = q + Read(self.num_heads, name=f"layer_{i}_read")(queries, keys, keys, mask)
            hidden = Linear(self.hidden_dim, True, name=f"layer_{i}_up")(
                LayerNorm(name=f"layer_{i}_mlp_norm")(q)
            )
            q = q + Linear(dim, True, name=f"layer_{i}_down")(ACTIVATIONS["gelu"](hidden))
        return Linear(self.width, True, name="output")(q).reshape(batch, images, self.queries, self.width)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """[..., h, w, c] -> [..., h / f, w / f, f * f * c], the channels of f x f neighbours, row-major, side by side."""
    *leading, height, width, channels = x.shape
    x = x.reshape(*leading, height // factor, factor, width // factor, factor, channels)
    return jnp.moveaxis(x, -4, -3).reshape(*leading, height // factor, width // factor, -1)


def pixel_unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """The inverse of `pixel_shuffle`."""
    *leading, height, width, channels = x.shape
    x = x.reshape(*leading, height, width, factor, factor, channels // factor**2)
    return jnp.moveaxis(x, -3, -4).reshape(*leading, height * factor, width * factor, -1)


def shuffle_square(x: jax.Array, factor: int) -> jax.Array:
    """[..., P, c], a square of patches -> [..., P / f^2, f^2 * c]: `pixel_shuffle`, row-major."""
    *leading, patches, channels = x.shape
    side = math.isqrt(patches)
    shuffled = pixel_shuffle(x.reshape(*leading, side, side, channels), factor)
    return shuffled.reshape(*leading, patches // factor**2, -1)


class ShuffledProjection(nn.Module):
    """Pixel shuffle of every view, then two layers: [B, I, V, P, dv] -> [B, I, 2 + V * P / factor^2, width].

    Views are squares. The first two rows are learned: `<img>` and `</img>`, which stand around a picture (InternVL,
    arXiv 2404.16821). Parameters: marks [2, width], projection/...
    """

    width: int
    factor: int = 2

    def setup(self) -> None:
        self.marks = parameter(self, "marks", nn.initializers.normal(0.02), (2, self.width))
        self.projection = Projection(self.width)

    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        rows = self.projection(shuffle_square(seen.tokens, self.factor))
        rows = rows.reshape(*rows.shape[:2], -1, self.width)
        marks = jnp.broadcast_to(self.marks.astype(rows.dtype), (*rows.shape[:2], 2, self.width))
        return jnp.concatenate([marks, rows], axis=2)
