"""The dense product in plain jax.numpy."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import precision_of


def matmul(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    """x [M, K] times w [K, N], or w [N, K] where `transposed` -> [M, N]."""
    w = w.T if transposed else w
    return jnp.dot(x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
