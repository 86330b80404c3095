"""A channel from every token to the one before it, as a mixer: y_t = W x_{t-1}.

In the first block it sees embeddings alone, and so adds a second embedding, of the previous token, to the input. With
it recall of a value by its key is a circuit of one attention layer (the keys of a layer know what came before), where
plain transformers need two that learn together (arXiv 2209.11895, smeared keys).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.attention import Context
from research.nn.cache import Fresh, RingCache
from research.nn.linear import Linear


class PreviousToken(nn.Module):
    """Takes the place of a block's `attention`. x is [B, T, width] or [B * T, width]; so is the output.

    The first token of a segment gets 0. Behind a cache the previous token of a node is its parent in the tree, that of
    the root the last committed one. Parameters: output/kernel [width, width]. The rows it returns are x itself,
    [B, 1, T, width], and nothing beside it.
    """

    width: int

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: RingCache | None = None
    ) -> tuple[jax.Array, Fresh]:
        rows = x.reshape(*context.positions.shape, self.width)
        before = _shifted(rows, context.segments) if cache is None else _parents(rows, context, cache)
        return Linear(self.width, name="output")(before.reshape(x.shape)), (
            rows[:, None],
            rows[:, None, :, :0],
        )

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> RingCache:
        """The last token, and `margin` more to roll back to."""
        shape = (batch, 1, min(1 + margin, capacity))
        return RingCache(jnp.zeros((*shape, self.width), dtype), jnp.zeros((*shape, 0), dtype))


def _shifted(rows: jax.Array, segments: jax.Array | None) -> jax.Array:
    before = jnp.pad(rows, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    if segments is None:
        return before
    same = segments == jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(same[..., None], before, 0)


def _parents(rows: jax.Array, context: Context, cache: RingCache) -> jax.Array:
    batch, count, _ = rows.shape
    depth = context.positions - context.length[:, None]
    tree = jnp.broadcast_to(context.tree, (batch, count, count))
    parent = tree & (depth[:, None, :] == depth[:, :, None] - 1)  # a path has one node at each depth
    found = jnp.einsum("bji,biw->bjw", parent.astype(rows.dtype), rows)
    key, _, index, valid = cache.read(context.length)
    newest = (valid & (index == context.length[:, None] - 1)).astype(rows.dtype)
    last = jnp.einsum("bs,bsw->bw", newest, key[:, 0].astype(rows.dtype))
    return found + jnp.where((depth == 0)[..., None], last[:, None], 0)
