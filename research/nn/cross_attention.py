"""Attention from a decoder to an encoded source, and the decoder block that has it.

The keys and values of the source are computed once: they lie in the cache of each layer beside its own rows,
and nothing that commits, rolls back or drafts touches them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.attention import Context
from research.nn.attention_kernels import NEGATIVE, group_queries
from research.nn.cache import Fresh, LayerCache
from research.nn.linear import Linear
from research.nn.mlp import feed_forward
from research.nn.rotary import Rotary, rotate
from research.nn.transformer import Block


class CrossContext(Context):
    """Where the decoder's tokens are, and what they read.

    source bool[B, S] or [B, T, S]: which places of the source are real, or which of them each token sees; states
    [B, S, width]: the source encoded, None where its keys and values are there already.
    """

    source: jax.Array | None = None
    states: jax.Array | None = None


class MemoryCache(struct.PyTreeNode):
    """A layer's cache of a decoder with a source: `own` of its tokens, and `memory`, the keys and values of
    the source [B, Hkv, S, d] each, which no length and no roll-back concerns."""

    own: LayerCache
    memory: Fresh

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "MemoryCache":
        return self.replace(own=self.own.append(fresh, length, count))

    def select(self, rows: jax.Array) -> "MemoryCache":
        return MemoryCache(self.own.select(rows), jax.tree.map(lambda x: x[rows], self.memory))


class CrossAttention(nn.Module):
    """Multi-head attention to a source, every real place of which is visible, or those that each token's row names.

    Args:
        num_heads, num_kv_heads, head_dim: H, Hkv (None: H) and d.
        rotary: rotates queries by their place in the output and keys by theirs in the source, so that a head
            can follow a source that runs alongside; None for attention by content alone.

    Parameters: query, output and memory/{key,value}.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rotary: Rotary | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, context: CrossContext, memory: Fresh | None = None
    ) -> tuple[jax.Array, Fresh]:
        """x [B, T, width] or [B * T, width], and either context.states or the memory computed from them ->
        the same shape, and the memory. A token that sees no place of the source gets the output's zero."""
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise UserError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={kv_heads}")
        batch, count = context.positions.shape
        query = Linear(self.num_heads * self.head_dim, name="query")(x)
        query = query.reshape(batch, count, self.num_heads, self.head_dim)
        if self.rotary is not None:
            query = rotate(query, *self.rotary(context.positions, self.head_dim))
        if memory is None:
            memory = Memory(kv_heads, self.head_dim, self.rotary, name="memory")(context.states)
        key, value = (y.astype(x.dtype) for y in memory)
        rows = group_queries(query.swapaxes(1, 2), kv_heads)  # [B, Hkv, H / Hkv * T, d]
        scores = jnp.einsum("bhqd,bhkd->bhqk", rows, key, preferred_element_type=jnp.float32)
        seen = context.source[:, None, None, :]
        if context.source.ndim == 3:  # each group's rows are T tokens for every query head of it
            seen = jnp.tile(context.source[:, None], (1, 1, self.num_heads // kv_heads, 1))
        probabilities = jax.nn.softmax(jnp.where(seen, scores * self.head_dim**-0.5, NEGATIVE), axis=-1)
        probabilities = jnp.where(seen, probabilities, 0.0).astype(x.dtype)
        out = jnp.einsum("bhqk,bhkd->bhqd", probabilities, value, preferred_element_type=jnp.float32)
        out = out.astype(x.dtype).reshape(batch, self.num_heads, count, self.head_dim).swapaxes(1, 2)
        out = out.reshape(*x.shape[:-1], self.num_heads * self.head_dim)
        return Linear(x.shape[-1], name="output")(out), memory


class Memory(nn.Module):
    """states [B, S, width] -> keys and values [B, Hkv, S, d]."""

    heads: int
    head_dim: int
    rotary: Rotary | None = None

    @nn.compact
    def __call__(self, states: jax.Array) -> Fresh:
        batch, places, _ = states.shape
        flat = states.reshape(batch * places, -1)
        key, value = (
            Linear(self.heads * self.head_dim, name=name)(flat).reshape(batch, places, -1, self.head_dim)
            for name in ("key", "value")
        )
        if self.rotary is not None:
            positions = jnp.broadcast_to(jnp.arange(places), (batch, places))
            key = rotate(key, *self.rotary(positions, self.head_dim))
        return key.swapaxes(1, 2), value.swapaxes(1, 2)


class CrossBlock(Block, kw_only=True):
    """The block of a decoder with a source: self-attention, `cross_attention`, mlp, each pre-norm residual.

    Returns the fresh rows of the tokens and the memory of the source.
    """

    cross_attention: nn.Module

    @nn.compact
    def __call__(
        self, x: jax.Array, context: CrossContext, cache: MemoryCache | None = None
    ) -> tuple[jax.Array, tuple[Fresh, Fresh]]:
        own, memory = (None, None) if cache is None else (cache.own, cache.memory)
        y, fresh = self.attention(self.norm.copy(name="attention_norm")(x), context, own)
        x = x + self._branch(y, "attention")
        y, memory = self.cross_attention(self.norm.copy(name="cross_attention_norm")(x), context, memory)
        x = x + self._branch(y, "cross_attention")
        y = feed_forward(self.mlp, self.norm.copy(name="mlp_norm")(x), context)
        return x + self._branch(y, "mlp"), (fresh, memory)
