"""Values that several operations read, computed once on CPU."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import target_platform

LARGEST = 64  # of an identity


def compute_once(x: jax.Array) -> jax.Array:
    """x [..., n], finite, of any float dtype; on CPU it lies in memory before anything reads it.

    XLA:CPU fuses what x is made of into everything that reads it, and computes it anew there: the rotary tables of
    every head of every layer cost a twentieth of a training step, and Mamba-2's convolution, four times computed, half
    of a prefill. It fuses nothing into a product, and one with the identity is exact; optimization barriers it drops
    before it fuses. Elsewhere x is returned as it is.
    """
    if target_platform() != "cpu":
        return x
    size = next(size for size in range(min(LARGEST, x.shape[-1]), 0, -1) if x.shape[-1] % size == 0)
    rows = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return jnp.dot(rows, jnp.eye(size, dtype=x.dtype), precision="highest").reshape(x.shape)
