"""Dropping tokens: what systems that prune a sequence share. Shapes are static, and order is kept."""

import jax
import jax.numpy as jnp


def keep_best(scores: jax.Array, valid: jax.Array, count: jax.Array | int) -> jax.Array:
    """bool [..., n]: the `count` [...] valid tokens with the greatest scores [..., n]; of equals the first ones."""
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return valid & (rank < jnp.asarray(count)[..., None])


def compact(keep: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """keep bool [..., n] -> the indices of the first `budget` kept tokens in their order, int32 [..., budget], and
    which of them there are, bool [..., budget]. Where fewer are kept, others stand behind them."""
    index = jnp.argsort(~keep, axis=-1, stable=True)[..., :budget].astype(jnp.int32)
    return index, jnp.take_along_axis(keep, index, axis=-1)


def select_tokens(
    scores: jax.Array, budget: int, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The `budget` best of scores [B, n] -> their indices, ascending, int32 [B, budget], and whether they are valid."""
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    return compact(keep_best(scores, valid, budget), budget)


def take_tokens(x: jax.Array, positions: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tokens x [B, n, d] and positions [B, n] at index [B, k]; positions are not renumbered."""
    taken = jnp.take_along_axis(x, index[..., None], axis=1)
    return taken, jnp.take_along_axis(positions, index, axis=1)


def hard_gumbel_keep(logits: jax.Array, temperature: jax.Array | float, key: jax.Array) -> jax.Array:
    """logits [..., 2], 0 keep and 1 drop -> 0 or 1, float32 [...], drawn with probability softmax(logits)[0].

    Straight through: the gradient is that of the relaxed draw, softmax((log p + Gumbel noise) / temperature)[0].
    """
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    noisy = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) + noise
    soft = jax.nn.softmax(noisy / temperature, axis=-1)[..., 0]
    hard = (noisy[..., 0] > noisy[..., 1]).astype(jnp.float32)
    return jax.lax.stop_gradient(hard - soft) + soft
