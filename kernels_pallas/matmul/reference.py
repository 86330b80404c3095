"""The dense product in plain jax.numpy."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    """x [M, K] times w [K, N], or w [N, K] where `transposed` -> [M, N]."""
    return jnp.dot(x, w.T if transposed else w, preferred_element_type=jnp.float32).astype(x.dtype)
