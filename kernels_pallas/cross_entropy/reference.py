"""Cross-entropy in plain jnp."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits float32[N, V], labels int[N] -> (nats [N], logsumexp [N], correct [N]), all float32."""
    partition = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    best = jax.lax.stop_gradient(logits).max(axis=-1)
    return partition - chosen, partition, (jax.lax.stop_gradient(chosen) >= best).astype(jnp.float32)
