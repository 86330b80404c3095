"""Tree attention in plain jnp: what the kernels must compute, and a path for every backend."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import precision_of
from kernels_pallas.tree_attention.common import NEGATIVE, grouped_mask, grouped_rows


def tree_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    length: jax.Array,
    tree: jax.Array,
    cached_mask: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """One softmax over the cached prefix and the fresh nodes, in float32. Arguments as in the api."""
    batch, heads, count, dim = query.shape
    kv_heads, slots = cached[0].shape[1:3]
    rows = grouped_rows(query, kv_heads)
    visible = jnp.arange(slots) < length[:, None, None, None]  # [B, 1, 1, S]
    if cached_mask is not None:
        visible = visible & grouped_mask(cached_mask, heads, kv_heads)

    def scores(key: jax.Array, mask: jax.Array) -> jax.Array:
        raw = jnp.einsum(
            "bhrd,bhkd->bhrk",
            rows,
            key.astype(rows.dtype),
            precision=precision_of(rows.dtype),
            preferred_element_type=jnp.float32,
        )
        raw = raw * scale
        if softcap is not None:
            raw = softcap * jnp.tanh(raw / softcap)
        return jnp.where(mask, raw, NEGATIVE)

    both = (scores(cached[0], visible), scores(fresh[0], grouped_mask(tree, heads, kv_heads)))
    probabilities = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1)
    # Slots that hold no token may hold anything, also NaN, which no weight of 0 removes.
    held = (jnp.arange(slots) < length[:, None])[:, None, :, None]
    values = jnp.concatenate([jnp.where(held, cached[1], 0).astype(query.dtype), fresh[1]], axis=2)
    out = jnp.einsum(
        "bhrk,bhkd->bhrd",
        probabilities.astype(query.dtype),
        values,
        precision=precision_of(query.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(query.dtype).reshape(batch, heads, count, dim)
