"""silu(gate) * up in plain jax.numpy."""

import jax


def silu_product(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up
