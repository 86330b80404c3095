"""The product with coded ternary weights in plain jnp: decoded to float32 and multiplied as such."""

import jax
import jax.numpy as jnp

from kernels_pallas.qmoe_decode.coded import Coded, dense


def qmoe_matmul(x: jax.Array, weights: Coded) -> jax.Array:
    """x [M, in] -> [M, out]."""
    product = jnp.matmul(x.astype(jnp.float32), dense(weights).T, precision=jax.lax.Precision.HIGHEST)
    return product.astype(x.dtype)
