"""Top-k slots in plain jnp: what the kernels must compute, and a path for every backend."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import pad_axis, precision_of
from kernels_pallas.topk_attention.common import LOWEST, ordered
from kernels_pallas.tree_attention.common import grouped_rows


def topk_attention(
    query: jax.Array, key: jax.Array, length: jax.Array, k: int, *, per: str
) -> tuple[jax.Array, jax.Array]:
    """All scores, then `jax.lax.top_k`, which takes the first of equals. Arguments as in the api."""
    batch, heads, _ = query.shape
    slots = key.shape[2]
    scores = jnp.einsum(
        "bhrd,bhkd->bhrk",
        grouped_rows(query[:, :, None], key.shape[1]),
        key.astype(query.dtype),
        precision=precision_of(query.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(batch, heads, slots) if per == "head" else jnp.max(scores, axis=2)
    held = jnp.arange(slots) < length[:, None, None]
    _, indices = jax.lax.top_k(jnp.where(held, ordered(scores), LOWEST), min(k, slots))
    count = jnp.minimum(length, k).astype(jnp.int32)
    listed = jnp.arange(indices.shape[2]) < count[:, None, None]
    indices = jnp.sort(jnp.where(listed, indices, slots), axis=-1)
    return pad_axis(jnp.where(listed, indices, 0), 2, k), count
