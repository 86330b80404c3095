"""A ternary matrix as words of the dictionary, and its values again."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.qmoe_decode.dictionary import decode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """Weights [out, in]: row r has the words codes[offsets[r] : offsets[r + 1]] and the values 0 and ends[r].

    codes uint16[n], offsets int32[out + 1], ends floating [out, 2]. What is behind the last offset is padding.
    """

    codes: jax.Array
    offsets: jax.Array
    ends: jax.Array
    width: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        return self.ends.shape[0], self.width


def dense(weights: Coded) -> jax.Array:
    """The matrix, float32[out, in]."""
    rows, width = weights.shape
    symbols = decode(weights.codes, weights.offsets[-1], rows, width)
    low, high = (weights.ends[:, i, None].astype(jnp.float32) for i in range(2))
    return jnp.where(symbols == 2, high, jnp.where(symbols == 1, low, 0.0))
