"""What the reference and the kernels share: the layout of rows, one step of the online softmax."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import precision_of

NEGATIVE = (
    -1e30
)  # finite: a fully masked block gets weight exp(NEGATIVE - real) = 0 once a real score is seen


def grouped_rows(query: jax.Array, kv_heads: int) -> jax.Array:
    """[B, H, N, d] -> [B, Hkv, H / Hkv * N, d]: queries that share a key head become rows of one matrix."""
    batch, heads, count, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * count, dim)


def grouped_mask(mask: jax.Array, heads: int, kv_heads: int) -> jax.Array:
    """bool [b, 1 or H, N, K] -> bool [b, 1 or Hkv, H / Hkv * N, K], the rows as in `grouped_rows`."""
    batch, masked_heads, count, keys = mask.shape
    groups = heads // kv_heads
    if masked_heads == 1:
        mask = jnp.broadcast_to(mask, (batch, groups, count, keys))
        return mask.reshape(batch, 1, groups * count, keys)
    return mask.reshape(batch, kv_heads, groups * count, keys)


def masked_scores(
    rows: jax.Array,
    key: jax.Array,
    visible: jax.Array,
    scale: float,
    softcap: float | None,
    key_axis: int = 0,
) -> jax.Array:
    """rows [R, d], key [K, d], or [d, K] with key_axis=1, visible bool [R or 1, K] -> float32 scores [R, K]."""
    scores = jax.lax.dot_general(
        rows,
        key,
        (((1,), (1 - key_axis,)), ((), ())),
        precision=precision_of(rows.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(visible, scores, NEGATIVE)


def absorb(
    scores: jax.Array, value: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array], key_axis: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One block of the online softmax (FlashAttention, arXiv 2205.14135, algorithm 1).

    scores float32 [R, K]; value [K, d], or [d, K] with key_axis=1; carry: greatest score so far [R, 1], sum of
    exponentials [R, 1], weighted values [R, d], all float32 and relative to the greatest score.
    """
    greatest, total, weighted = carry
    raised = jnp.maximum(greatest, jnp.max(scores, axis=1, keepdims=True))
    shrink = jnp.exp(greatest - raised)
    exponentials = jnp.exp(scores - raised)
    product = jax.lax.dot_general(
        exponentials.astype(value.dtype),
        value,
        (((1,), (key_axis,)), ((), ())),
        precision=precision_of(value.dtype),
        preferred_element_type=jnp.float32,
    )
    total = shrink * total + jnp.sum(exponentials, axis=1, keepdims=True)
    return raised, total, shrink * weighted + product
