"""Span attention in plain jnp: what the kernels must compute, and a path for every backend."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import precision_of
from kernels_pallas.tree_attention.common import grouped_rows


def visible_keys(
    length: int, window: jax.Array, sink: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """bool [B or 1, H, L, L], which keys (last axis) each query of each head sees."""
    place = jnp.arange(length)
    distance = place[:, None] - place
    near = distance < window[:, None, None]
    visible = ((distance >= 0) & (near | (place < sink[:, None, None])))[None]
    if segments is not None:
        same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
        visible = visible & same[:, None]
    return visible


def span_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    segments: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Scores of all pairs, softmax in float32. Arguments as in the api, `window` and `sink` int32[H]."""
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    visible = visible_keys(length, window, sink, segments)
    visible = visible.reshape(visible.shape[0], kv_heads, -1, length)  # rows as in `grouped_rows`
    scores = jnp.einsum(
        "bhrd,bhkd->bhrk",
        grouped_rows(query, kv_heads),
        key,
        precision=precision_of(query.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    some = jnp.any(visible, axis=-1, keepdims=True)
    # A row that sees nothing: finite scores, so that its gradient is 0 and not NaN.
    scores = jnp.where(visible, scores, jnp.where(some, -jnp.inf, 0))
    probabilities = jnp.where(some, jax.nn.softmax(scores, axis=-1), 0)
    out = jnp.einsum(
        "bhrk,bhkd->bhrd",
        probabilities.astype(value.dtype),
        value,
        precision=precision_of(value.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(query.dtype).reshape(query.shape)
