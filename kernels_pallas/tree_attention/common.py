"""What the reference and the kernels share: checks, the layout of rows, one step of the online softmax."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported, precision_of

NEGATIVE = (
    -1e30
)  # finite: a fully masked block gets weight exp(NEGATIVE - real) = 0 once a real score is seen


Pair = tuple[jax.Array, jax.Array]


def check_rows(query: jax.Array, cached: Pair, fresh: Pair) -> None:
    """Raises Unsupported unless keys and values belong to the queries, as `tree_attention` says."""
    batch, heads, count, dim = query.shape
    kv_heads, slots = cached[0].shape[1:3]
    if heads % kv_heads:
        raise Unsupported(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    shapes = {"cached": (batch, kv_heads, slots, dim), "fresh": (batch, kv_heads, count, dim)}
    for name, pair in {"cached": cached, "fresh": fresh}.items():
        for part in pair:
            if part.shape != shapes[name]:
                raise Unsupported(f"{name} has shape {part.shape}, expected {shapes[name]}")


def check_masks(
    query: jax.Array, slots: int, length: jax.Array, tree: jax.Array, cached_mask: jax.Array | None
) -> None:
    """Raises Unsupported unless lengths and masks belong to the queries and a cache of so many slots."""
    batch, heads, count, _ = query.shape
    if length.shape != (batch,):
        raise Unsupported(f"length has shape {length.shape}, expected {(batch,)}")
    for name, mask, keys in (("tree", tree, count), ("cached_mask", cached_mask, slots)):
        if mask is None:
            continue
        places = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if mask.dtype != bool or not places or mask.shape[2:] != (count, keys):
            expected = f"bool [{batch} or 1, 1 or {heads}, {count}, {keys}]"
            raise Unsupported(f"{name} is {mask.dtype}{list(mask.shape)}, expected {expected}")


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
