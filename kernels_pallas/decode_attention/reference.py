"""Decode attention in plain jnp: what the kernels must compute, and a path for every backend."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Partial
from kernels_pallas.common import precision_of
from kernels_pallas.tree_attention.common import grouped_rows


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> Partial:
    """query [B, H, N, d]; key and value [B, s, K, d], s dividing H; visible bool [B, s or 1, K]."""
    rows = grouped_rows(query, key.shape[1])
    scores = jnp.einsum(
        "bsrd,bskd->bsrk",
        rows,
        key.astype(rows.dtype),
        precision=precision_of(rows.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0, top)
    exponentials = jnp.exp(scores - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    # Slots that are not seen may hold anything, also NaN, which no weight of 0 removes.
    value = jnp.where(visible[..., None], value, 0).astype(rows.dtype)
    out = jnp.einsum(
        "bsrk,bskd->bsrd",
        exponentials.astype(rows.dtype),
        value,
        precision=precision_of(rows.dtype),
        preferred_element_type=jnp.float32,
    )
    out = out / jnp.where(total == 0, 1, total)
    lse = (top + jnp.log(total))[..., 0]
    return Partial(out.reshape(query.shape), lse.reshape(query.shape[:3]))


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Arguments as in the api."""
    visible = (jnp.arange(key.shape[2]) < length[:, None])[:, None]
    return _attend(query, key, value, visible, scale=scale, softcap=softcap)


def gather_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    count: jax.Array,
    length: jax.Array,
    *,
    page: int = 1,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Arguments as in the api, `count` int32[B, s]."""
    batch, sets, entries = indices.shape
    kv_heads, slots = key.shape[1:3]
    slot = (indices[..., None] * page + jnp.arange(page)).reshape(batch, sets, entries * page)
    listed = jnp.repeat(jnp.arange(entries) < count[..., None], page, axis=-1)
    visible = listed & (slot >= 0) & (slot < length[:, None, None])
    slot = jnp.clip(slot, 0, slots - 1)

    def gathered(x: jax.Array) -> jax.Array:
        of_head = slot.reshape(batch, kv_heads, -1, 1)  # the sets of a key head side by side
        return jnp.take_along_axis(x, of_head, axis=2).reshape(batch, sets, entries * page, -1)

    return _attend(query, gathered(key), gathered(value), visible, scale=scale, softcap=softcap)
