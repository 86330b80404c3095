"""The quantized product in plain jnp: what the kernels must compute, and a path for every backend."""

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.packing import Packed, dequantize


def quantized_matmul(x: jax.Array, weights: Packed) -> jax.Array:
    """x [M, K] -> [M, N]: dequantized to float32 and multiplied as such; gradients reach x alone."""
    weights = jax.lax.stop_gradient(dequantize(weights))
    product = jnp.matmul(x.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    return product.astype(x.dtype)
