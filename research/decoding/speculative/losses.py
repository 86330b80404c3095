"""The menu of drafter losses: each a sum over places [B, T] with weights, and the sum of the weights.

Gradients flow into the first argument alone; a teacher's side is constant.
"""

import jax
import jax.numpy as jnp

Term = tuple[jax.Array, jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Term:
    """logits float32[B, T, V] against labels int32[B, T], nats."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return _weighted(jax.nn.logsumexp(logits, axis=-1) - chosen, weights)


def soft_cross_entropy(logits: jax.Array, teacher: jax.Array, weights: jax.Array) -> Term:
    """Cross-entropy of softmax(logits) under softmax(teacher), both [B, T, V], nats."""
    p = jax.nn.softmax(jax.lax.stop_gradient(teacher), axis=-1)
    return _weighted(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(p * logits, axis=-1), weights)


def kl(logits: jax.Array, teacher: jax.Array, weights: jax.Array) -> Term:
    """KL(softmax(teacher) || softmax(logits)), nats: the soft cross-entropy less the teacher's entropy."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher), axis=-1)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    return _weighted(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), weights)


def smooth_l1(states: jax.Array, teacher: jax.Array, weights: jax.Array) -> Term:
    """Huber loss with threshold 1, mean over the width of [B, T, D]."""
    gap = jnp.abs(states - jax.lax.stop_gradient(teacher))
    return _weighted(jnp.mean(jnp.where(gap < 1, 0.5 * gap * gap, gap - 0.5), axis=-1), weights)


def agreement(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Term:
    """Where the first guess is right; no gradient."""
    return _weighted((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32), weights)


def add(*terms: tuple[float, Term]) -> Term:
    """(factor, term) pairs -> the sum of factor times sum, with the weight of the first term.

    So the mean divides every sum by the places of the first, which keeps it exact over microbatches.
    """
    return sum(factor * total for factor, (total, _) in terms), terms[0][1][1]


def _weighted(x: jax.Array, weights: jax.Array) -> Term:
    return jnp.sum(x * weights), jnp.sum(weights)
