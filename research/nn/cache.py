"""Caches of a decoder: pytrees with a contract.

A `Cache` holds one layer cache per layer and the number of committed tokens of every row. A model reads the
cache and returns the new rows (`fresh`); only `commit` writes, so a rejected draft costs nothing. Layer
caches implement `LayerCache`; keys are stored after rotary embedding, so rows stay valid when they move.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.append_rows import append_rows
from research.errors import UserError
from research.nn.cpu_kernels import use_cpu_kernels

Fresh = tuple[jax.Array, jax.Array]  # key and value rows of new tokens, each [B, Hkv, N, d]

# Up to this many rows a batch is written by one in-place update per row; above, by a scatter (a loop on CPU).
_UNROLLED_ROWS = 16


class LayerCache(Protocol):
    """A layer cache that keeps a state instead of tokens reads as its mixer wants. It has `margin`, by how many
    tokens it can be rolled back, and `reversible(margin)`, the same state with such a margin."""

    def read(self, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """-> key, value [B, Hkv, S, d], index int32[B, S] of the token in each slot, valid bool[B, S]."""

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "LayerCache":
        """Write rows 0..count[b] of fresh [B, Hkv, P, d] from position length[b] on.

        Needs length + P <= capacity.
        """

    def select(self, rows: jax.Array) -> "LayerCache":
        """The rows of the batch named by int32[B']."""


@runtime_checkable
class Rows(Protocol):
    """Keys or values of all slots that are kept in another form than an array [B, Hkv, S, d], and multiply themselves.

    A layer cache may `read` as two of these. Implementations are registered pytrees.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, Hkv, S, d)."""

    def scores(self, query: jax.Array) -> jax.Array:
        """query [B, Hkv, M, d] -> its products with the keys, float32[B, Hkv, M, S]."""

    def mix(self, weights: jax.Array) -> jax.Array:
        """weights [B, Hkv, M, S] -> the sums of values that they weight, float32[B, Hkv, M, d]."""


class CacheKind(Protocol):
    """How a layer that sees all tokens keeps them. Implementations are hashable."""

    def empty(
        self, batch: int, capacity: int, kv_heads: int, head_dim: int, margin: int, dtype: jnp.dtype
    ) -> LayerCache:
        """A cache without tokens, for `capacity` of them; `margin` is by how many it can be rolled back."""


class DenseCache(struct.PyTreeNode):
    """Slot s holds token s. key, value [B, Hkv, capacity, d]."""

    key: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "DenseCache":
        shape = (batch, kv_heads, capacity, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def read(self, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        index = jnp.broadcast_to(jnp.arange(self.key.shape[2]), (length.shape[0], self.key.shape[2]))
        return self.key, self.value, index, index < length[:, None]

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "DenseCache":
        start = _start(length, count)
        return DenseCache(_write(self.key, fresh[0], start), _write(self.value, fresh[1], start))

    def select(self, rows: jax.Array) -> "DenseCache":
        return DenseCache(self.key[rows], self.value[rows])


def _start(length: jax.Array, count: jax.Array) -> jax.Array:
    """Where rows are appended. Those beyond `count` are written too: they lie beyond the new length, and the next
    append covers them.

    The place is made to depend on `count` (which is never negative), and so on every read of the cache that decided
    it: only then may a compiler without an order of its own overwrite the buffer in place.
    """
    return (length + jnp.minimum(count, 0)).astype(jnp.int32)


def _write(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    rows = rows.astype(buffer.dtype)
    batch = buffer.shape[0]
    if batch > _UNROLLED_ROWS:
        return jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice(b, r, (0, s, 0)))(buffer, rows, start)
    for row in range(batch):
        buffer = jax.lax.dynamic_update_slice(buffer, rows[row : row + 1], (row, 0, start[row], 0))
    return buffer


def _takes(layer: LayerCache, fresh: Fresh) -> bool:
    """Whether the kernel for a CPU writes such rows."""
    return type(layer) is DenseCache and all(x.dtype == jnp.float32 for x in (layer.key, layer.value, *fresh))


def _append_together(layers: list[tuple[DenseCache, Fresh]], start: jax.Array) -> list[DenseCache]:
    """All layers by one call of the kernel for a CPU."""
    buffers = [x for layer, _ in layers for x in (layer.key, layer.value)]
    written = append_rows(buffers, [x for _, fresh in layers for x in fresh], start)
    return [DenseCache(*pair) for pair in zip(written[::2], written[1::2], strict=True)]


class RingCache(struct.PyTreeNode):
    """For windowed layers: the first `sinks` slots hold the first tokens for good, the others are a ring.

    key, value [B, Hkv, slots, d]. Slot sinks + r of a ring of R = slots - sinks holds the newest token t >= sinks with
    (t - sinks) % R == r. The ring has the window plus a margin; a roll-back of at most the margin leaves the window
    whole.
    """

    key: jax.Array
    value: jax.Array
    sinks: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def empty(
        cls, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype, sinks: int = 0
    ) -> "RingCache":
        shape = (batch, kv_heads, slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), sinks)

    def read(self, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        slot = jnp.arange(self.key.shape[2])[None]
        newest = length[:, None] - 1
        index = newest - (newest - slot) % (self.key.shape[2] - self.sinks)
        if not self.sinks:
            return self.key, self.value, index, index >= 0
        static = slot < self.sinks
        index = jnp.where(static, slot, index)
        return self.key, self.value, index, jnp.where(static, slot <= newest, index >= self.sinks)

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "RingCache":
        batch, _, slots, _ = self.key.shape
        ring = slots - self.sinks
        number = jnp.arange(fresh[0].shape[2])[None]
        token = length[:, None] + number
        # Of the ring's tokens only the last real rows survive; the others are sent out of range and dropped.
        kept = (number < count[:, None]) & ((number >= count[:, None] - ring) | (token < self.sinks))
        slot = jnp.where(token < self.sinks, token, self.sinks + (token - self.sinks) % ring)
        slot = jnp.where(kept, slot, slots)
        row = jnp.arange(batch)[:, None]

        def write(buffer: jax.Array, rows: jax.Array) -> jax.Array:
            moved = rows.astype(buffer.dtype).swapaxes(1, 2)  # [B, P, Hkv, d]
            return buffer.at[row, :, slot].set(moved, mode="drop", unique_indices=True)

        return self.replace(key=write(self.key, fresh[0]), value=write(self.value, fresh[1]))

    def select(self, rows: jax.Array) -> "RingCache":
        return self.replace(key=self.key[rows], value=self.value[rows])


class HeadGroups(struct.PyTreeNode):
    """Runs of neighbouring heads with a cache each, so that every head has the slots of its own span.

    parts: a LayerCache for each run; heads: how many key heads each run has. Attention reads the parts one by one.
    """

    parts: tuple[LayerCache, ...]
    heads: tuple[int, ...] = struct.field(pytree_node=False)

    def bounds(self) -> list[tuple[int, int]]:
        """The half-open range of key heads of every part."""
        return [(sum(self.heads[:i]), sum(self.heads[: i + 1])) for i in range(len(self.heads))]

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "HeadGroups":
        key, value = fresh
        return self.replace(
            parts=tuple(
                part.append((key[:, start:stop], value[:, start:stop]), length, count)
                for part, (start, stop) in zip(self.parts, self.bounds(), strict=True)
            )
        )

    def select(self, rows: jax.Array) -> "HeadGroups":
        return self.replace(parts=tuple(part.select(rows) for part in self.parts))


class Cache(struct.PyTreeNode):
    """The cache of a whole decoder: `layers`, one LayerCache each, and `length` int32[B] committed tokens."""

    layers: tuple[LayerCache, ...]
    length: jax.Array

    def commit(self, fresh: tuple[Fresh, ...], path: jax.Array | None, count: jax.Array) -> "Cache":
        """Append the rows `path[b, :count[b]]` of fresh. path int32[B, P], or None for the rows in order."""

        def along(x: jax.Array) -> jax.Array:
            return x if path is None else jnp.take_along_axis(x, path[:, None, :, None], axis=2)

        pairs = [(layer, jax.tree.map(along, new)) for layer, new in zip(self.layers, fresh, strict=True)]
        by_kernel = [use_cpu_kernels() and _takes(*pair) for pair in pairs]
        dense = [pair for pair, takes in zip(pairs, by_kernel, strict=True) if takes]
        written = iter(_append_together(dense, _start(self.length, count)))
        layers = tuple(
            next(written) if takes else layer.append(new, self.length, count)
            for (layer, new), takes in zip(pairs, by_kernel, strict=True)
        )
        return Cache(layers, self.length + count)

    def reversible(self, margin: int) -> "Cache":
        """The same cache, which can be rolled back by `margin` tokens where layers keep a state, too.

        Such layers then keep `margin` states more. Windowed layers have the margin that they were made with.
        """
        layers = (
            layer.reversible(margin) if hasattr(layer, "reversible") else layer for layer in self.layers
        )
        return self.replace(layers=tuple(layers))

    def rollback(self, length: jax.Array) -> "Cache":
        """Forget the tokens from `length` int32[B] on.

        Raises `UserError` where a layer keeps a state instead of tokens, and no earlier ones; and where one that keeps
        old tokens in another form can tell (not while it is traced) that they would be among them.
        """
        for layer in self.layers:
            if hasattr(layer, "check_rollback"):
                layer.check_rollback(length)
            if getattr(layer, "margin", 1) < 1:
                raise UserError(
                    f"a {type(layer).__name__} keeps a state, not tokens: it can't be rolled back unless the "
                    "cache was made `reversible`"
                )
        return self.replace(length=jnp.minimum(self.length, length))

    def select(self, rows: jax.Array) -> "Cache":
        """The rows of the batch named by int32[B'], in that order, repeats allowed."""
        return Cache(tuple(layer.select(rows) for layer in self.layers), self.length[rows])
