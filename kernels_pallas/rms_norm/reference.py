"""RMSNorm in plain jnp."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, groups: int = 1) -> jax.Array:
    """x [..., D], scale [D] -> x / rms(x) * scale, the root mean square over each of the equal `groups` of D."""
    parts = x.reshape(*x.shape[:-1], groups, -1)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + epsilon)
    return (parts * inverse).reshape(x.shape) * scale
