"""The cache of layers that hold only tokens which were not dropped."""

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.cache import DenseCache
from research.sparse.tokens import compact

_NEVER = jnp.iinfo(jnp.int32).max


class PrunedCache(struct.PyTreeNode):
    """A `LayerCache` of the tokens that are kept: fewer than are committed.

    key, value [B, Hkv, S, d]; index int32[B, S] the token in each slot, ascending, and then `_NEVER`. Fresh rows have a
    third array, int32 [B, 1, N, 1]: by how much a row's token lies behind the committed ones, -1 where it is dropped.
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array

    @classmethod
    def of(cls, empty: DenseCache, dropped: int) -> "PrunedCache":
        """With as many slots fewer. Raises UserError for another cache than a dense one."""
        if not isinstance(empty, DenseCache):
            raise UserError(
                f"a layer that drops tokens keeps the others as they are, not in a {type(empty).__name__}"
            )
        slots = empty.key.shape[2] - dropped
        index = jnp.full((empty.key.shape[0], slots), _NEVER, jnp.int32)
        return cls(empty.key[:, :, :slots], empty.value[:, :, :slots], index)

    def read(self, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        return self.key, self.value, self.index, self.index < length[:, None]

    def append(self, fresh: tuple[jax.Array, ...], length: jax.Array, count: jax.Array) -> "PrunedCache":
        key, value, place = fresh
        place = place[:, 0, :, 0]
        real = jnp.arange(place.shape[1]) < count[:, None]
        keep = real & (place >= 0) & (place < count[:, None])
        order, there = compact(keep, place.shape[1])
        # Tokens of a roll-back are forgotten here, and what is behind the kept rows is covered by the next.
        index = jnp.where(self.index < length[:, None], self.index, _NEVER)
        held = jnp.sum(index < _NEVER, axis=1)
        place = jnp.where(there, jnp.take_along_axis(place, order, axis=1) + length[:, None], _NEVER)

        def write(buffer: jax.Array, rows: jax.Array) -> jax.Array:
            moved = jnp.take_along_axis(rows, order[:, None, :, None], axis=2).astype(buffer.dtype)
            return jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice(b, r, (0, s, 0)))(
                buffer, moved, held
            )

        index = jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice(b, r, (s,)))(index, place, held)
        return PrunedCache(write(self.key, key), write(self.value, value), index)

    def select(self, rows: jax.Array) -> "PrunedCache":
        return PrunedCache(self.key[rows], self.value[rows], self.index[rows])
