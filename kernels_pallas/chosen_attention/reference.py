"""Attention that chooses, and over what was chosen, in plain jnp: what the kernels must compute."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.common import precision_of
from kernels_pallas.tree_attention import reference
from kernels_pallas.tree_attention.common import NEGATIVE, grouped_mask, grouped_rows, masked_scores


def select_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    length: jax.Array,
    tree: jax.Array,
    cached_mask: jax.Array | None,
    *,
    k: int,
    per: str,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in the api."""
    out = reference.tree_attention(
        query, cached, fresh, length, tree, cached_mask, scale=scale, softcap=softcap
    )
    batch, heads, count, _ = query.shape
    kv_heads, slots = cached[0].shape[1:3]
    held = (jnp.arange(slots) < length[:, None])[:, None, None]
    masks = (held if cached_mask is None else held & cached_mask, tree)
    of_head = jax.vmap(jax.vmap(functools.partial(masked_scores, scale=scale, softcap=softcap)))
    rows = grouped_rows(query, kv_heads)

    def scores(key: jax.Array, mask: jax.Array) -> jax.Array:
        mask = jnp.broadcast_to(mask, (batch, heads, count, key.shape[2]))
        found = of_head(rows, key.astype(rows.dtype), grouped_mask(mask, heads, kv_heads))
        return found.reshape(batch, heads, count, -1)

    itself = jnp.eye(count, dtype=bool)
    new = jnp.where(itself, jnp.inf, scores(fresh[0], masks[1]))
    joint = jnp.concatenate([scores(cached[0], masks[0]), new], axis=-1)
    if per == "group":
        joint = jnp.max(joint.reshape(batch, kv_heads, -1, *joint.shape[2:]), axis=2)
    visible = joint > NEGATIVE
    greatest, index = jax.lax.top_k(jnp.where(visible, joint, -jnp.inf), k)
    nobody = slots + count  # behind all
    index = jnp.sort(jnp.where(greatest > -jnp.inf, index, nobody), axis=-1)
    return out, jnp.where(index == nobody, -1, index)


def listed_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    choice: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Arguments as in the api."""
    batch, heads, count, dim = query.shape
    kv_heads, slots = cached[0].shape[1:3]
    sets, precision = choice.shape[1], precision_of(query.dtype)
    # Oneself once, at the end.
    itself = jnp.broadcast_to(slots + jnp.arange(count)[:, None], (batch, sets, count, 1))
    there = (choice >= 0) & (choice < slots + count) & (choice != itself)
    listed = jnp.concatenate([jnp.where(there, choice, itself), itself], axis=-1)
    there = jnp.concatenate([there, jnp.ones_like(itself, bool)], axis=-1)

    def rows(old: jax.Array, new: jax.Array) -> jax.Array:
        table = jnp.concatenate([old.astype(query.dtype), new], axis=2)
        index = listed.reshape(batch, kv_heads, -1, 1)  # the sets of a key head side by side
        return jnp.take_along_axis(table, index, axis=2).reshape(batch, sets, count, -1, dim)

    key, value = (rows(old, new) for old, new in zip(cached, fresh, strict=True))
    query = query.reshape(batch, sets, heads // sets, count, dim)
    numbers = dict(precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.einsum("bsgnd,bsnkd->bsgnk", query, key, **numbers) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(there[:, :, None], scores, NEGATIVE), axis=-1)
    out = jnp.einsum("bsgnk,bsnkd->bsgnd", weights.astype(query.dtype), value, **numbers)
    return out.astype(query.dtype).reshape(batch, heads, count, dim)
