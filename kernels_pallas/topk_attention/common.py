"""Scores as integers of the same order, and the k-th largest by bisection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

LOWEST = jnp.iinfo(jnp.int32).min  # below every score: what is not held
_MAGNITUDE = jnp.iinfo(jnp.int32).max


def ordered(scores: jax.Array) -> jax.Array:
    """float32 -> int32 of the same order, -0 as 0. A negative float's magnitude grows with its bits: they turn."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ _MAGNITUDE, bits)


def kth_largest(
    count_from: Callable[[jax.Array], jax.Array], k: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """int32 of `shape`, the greatest threshold that at least k integers reach: the k-th largest of them.

    `count_from` maps thresholds to the number of integers that reach them, as k int32 or float32. One bit a step,
    from the highest. With k = 0 it is the greatest int32.
    """

    def step(number, threshold):
        # Flipping the sign bit turns the order of int32 into that of its bits.
        raised = threshold ^ jnp.left_shift(jnp.int32(1), 31 - number)
        return jnp.where(count_from(raised) >= k, raised, threshold)

    return jax.lax.fori_loop(0, 32, step, jnp.full(shape, LOWEST, jnp.int32))
