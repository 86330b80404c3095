"""eP-ALM: one token in the middle of a frozen decoder, overwritten by deeper features (arXiv 2303.11403).

Of a frozen encoder's last m blocks the class tokens c_1 .. c_m, each after the encoder's final norm, are mapped to
v_i = W_i c_i + b_i, with a map for each (or one `shared` by all). The decoder's layers below `start` run on the soft
prompt and the text alone. Before layer l in [start, stop) the token in front of the text is set to v_i,

    i = min((l - start) // ((stop - start) // m), m - 1)

so that it is there from `start` on, and what it computed is overwritten at every layer up to `stop` - 1. Only the maps
and the prompt are trained. The reference lets the added token see the whole text, future included, so that layers from
`stop` on leak labels; here it stands in front under the causal rule and sees itself alone.

Its place is one before the first token's. Layers from `start` on have one row more than those below in their caches
(`LateCache`); decoding a token never sets it again. A prompt without an image has one of nothing.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.multimodal.media import Media
from research.multimodal.model import VLM, PictureCache, Pictures
from research.multimodal.tower import Seen
from research.nn.attention import Context
from research.nn.cache import Fresh, LayerCache
from research.nn.linear import Linear, parameter


class SoftPrompt(nn.Module):
    """A connector that looks at nothing: `count` learned rows, [B, I, count, width]."""

    count: int
    width: int

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        table = parameter(self, "prompt", nn.initializers.normal(0.02), (self.count, self.width))
        return jnp.broadcast_to(table, (*media.patches.shape[:2], *table.shape))


class LateToken(nn.Module):
    """The hook. start, stop, levels: see the head of this file; num_layers: the decoder's; shared: one map for all.

    Parameters: map_i/{kernel,bias}, or map_0 alone.
    """

    start: int
    stop: int
    levels: int
    num_layers: int
    shared: bool = False

    @property
    def places(self) -> tuple[int, ...]:
        return (*range(self.start, self.stop), self.num_layers)

    def level(self, place: int) -> int:
        """Which class token is set before a layer."""
        return min((place - self.start) // ((self.stop - self.start) // self.levels), self.levels - 1)

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None, *, place: int, seen: Seen | None
    ) -> tuple[jax.Array, Context, None]:
        if not 0 <= self.start < self.stop <= self.num_layers or self.stop - self.start < self.levels:
            raise UserError(
                f"LateToken: start={self.start}, stop={self.stop}, levels={self.levels}: at least as many layers as "
                f"levels are expected within {self.num_layers}"
            )
        if seen is None:
            return x, context, None  # a token is decoded: the row is in the caches
        if place == self.num_layers:
            return x[:, 1:], _without_first(context), None
        level = self.level(place)
        token = seen.taps[level - self.levels, :, 0, 0, 0]  # [B, dv] of the first image
        row = Linear(x.shape[-1], True, name=f"map_{0 if self.shared else level}")(token)[:, None]
        row = row.astype(x.dtype)
        if place > self.start:
            return jnp.concatenate([row, x[:, 1:]], axis=1), context, None
        return jnp.concatenate([row, x], axis=1), _with_first(context), None

    def init_cache(
        self, place: int, batch: int, capacity: int, margin: int, dtype: jnp.dtype
    ) -> LayerCache | None:
        return None


def _with_first(context: Context) -> Context:
    """The context with one place more in front, of the segment of the first token behind padding."""
    positions, segments = context.positions, context.segments
    before = positions[:, :1] - 1
    if segments is not None:
        first = jnp.argmax(segments > 0, axis=1, keepdims=True)
        before = jnp.take_along_axis(positions, first, axis=1) - 1
        segments = jnp.concatenate([jnp.take_along_axis(segments, first, axis=1), segments], axis=1)
    return context.replace(positions=jnp.concatenate([before, positions], axis=1), segments=segments)


def _without_first(context: Context) -> Context:
    segments = None if context.segments is None else context.segments[:, 1:]
    return context.replace(positions=context.positions[:, 1:], segments=segments)


class LateCache(struct.PyTreeNode):
    """A `LayerCache` with one row in front of the tokens, which comes with the prompt's; its index is -1."""

    inner: LayerCache

    def read(self, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        key, value, index, valid = self.inner.read(length + 1)
        return key, value, index - 1, valid

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "LateCache":
        first = length == 0
        start, more = jnp.where(first, 0, length + 1), first.astype(count.dtype)
        return LateCache(self.inner.append(fresh, start, count + more))

    def select(self, rows: jax.Array) -> "LateCache":
        return LateCache(self.inner.select(rows))


class EPALM(VLM):
    """A VLM with one `LateToken` as its hook; without it, the decoder with its soft prompt."""

    def enter(self, tokens: jax.Array, pictures: Pictures | None) -> tuple:
        return super().enter(tokens, self.blank(*tokens.shape) if pictures is None else pictures)

    def init_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, margin: int = 64
    ) -> PictureCache:
        cache = super().init_cache(batch, capacity, dtype, margin)
        if not self.hooks:
            return cache
        late = self.decoder.init_layer_caches(batch, capacity + 1, margin, dtype)
        start = self.hooks[0].start
        layers = (LateCache(late[i]) if i >= start else own for i, own in enumerate(cache.layers))
        return cache.replace(layers=tuple(layers))
