"""Pooling over an axis."""

import jax
import jax.numpy as jnp


def largest(x: jax.Array, axis: int) -> jax.Array:
    """The maximum along an axis, with the gradient at the first of the largest.

    That of `jnp.max` divides by how many entries equal the maximum. Where XLA computes x twice, once for each side of
    that comparison, and rounds it otherwise, there may be none: 0 / 0.
    """
    place = jnp.expand_dims(jnp.argmax(jax.lax.stop_gradient(x), axis=axis), axis)
    return jnp.squeeze(jnp.take_along_axis(x, place, axis=axis), axis)
