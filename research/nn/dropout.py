"""Dropout on the inputs of one kernel."""

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn import weights
from research.nn.weights import Wrapped


class Dropping(Wrapped):
    """A kernel that drops inputs at random while a step runs. key: typed keys [..], one for each of a stack."""

    key: jax.Array
    rate: float = struct.field(pytree_node=False)

    def dot(self, x: jax.Array) -> jax.Array:
        return weights.dot(dropped(x, self.rate, self.key), self.kernel)

    def materialize(self) -> jax.Array:
        raise UserError("a kernel with dropout is not multiplied out: it belongs to one step")

    def narrow(self, inputs: int | None, outputs: int | None) -> "Dropping":
        return self.replace(kernel=weights.narrow(self.kernel, inputs, outputs))


def dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """x with a share of its elements 0 and the others larger, so that the mean stays."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
