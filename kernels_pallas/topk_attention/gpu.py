"""Top-k selection on GPU (Pallas, Triton, which has neither sort nor top_k).

The cache is cut into splits that run side by side. A program goes through the keys of its split once and appends
those whose score is above its threshold to a list of candidates of about 2k, in order of the slots. When the list is
full, it finds the k-th largest of it by bisection, drops what is below, and takes that score as its threshold: a later
slot must be above it, because of equals the earlier ones are taken. The candidates of all splits, k each at most, go
through `jax.lax.top_k`. Scores are sums of products in float32 without tensor cores: there is one query a key, and
reading the keys takes longer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.topk_attention.common import LOWEST, kth_largest, ordered

BLOCK = 64  # keys of a step
_PROGRAMS = 256  # about twice as many as a large device has multiprocessors


def _kernel(
    length_ref,  # int32[1]
    query_ref,  # [queries, d], each with one selection or all with one
    key_ref,  # [S, d]
    score_ref,  # int32[capacity + block]: candidates' scores; what is behind the capacity is written and not read
    index_ref,  # int32[capacity + block]: their slots
    count_ref,  # int32[1]
    *,
    k: int,
    capacity: int,
    block: int,
    blocks: int,
    synchronize: bool,
):
    length = length_ref[0]
    first = pl.program_id(2) * blocks
    needed = jnp.clip(pl.cdiv(length, block) - first, 0, blocks)

    def barrier():
        if synchronize:  # what one thread wrote, others read
            plgpu.debug_barrier()

    def append(scores, slots, mask, filled):
        """Where the mask is, behind the first `filled` candidates. Others are written where nothing is read."""
        place = jnp.where(mask, filled + jnp.cumsum(mask.astype(jnp.int32)) - 1, capacity)
        score_ref[place] = scores
        index_ref[place] = slots
        return filled + jnp.sum(mask.astype(jnp.int32))

    def shrink(filled):
        """Keeps the k largest, in order; gives their number and the smallest."""
        barrier()
        listed = jnp.arange(capacity) < filled
        scores = jnp.where(listed, score_ref[pl.ds(0, capacity)], LOWEST)
        slots = index_ref[pl.ds(0, capacity)]
        kept = jnp.minimum(filled, k)

        def count_from(threshold):
            return jnp.sum((scores >= threshold).astype(jnp.int32))

        threshold = kth_largest(count_from, kept, ())
        above, equal = scores > threshold, listed & (scores == threshold)
        taken = kept - jnp.sum(above.astype(jnp.int32))
        keep = above | (equal & (jnp.cumsum(equal.astype(jnp.int32)) <= taken))
        barrier()
        append(scores, slots, keep, 0)
        barrier()
        return kept, threshold

    def step(number, carry):
        filled, threshold = carry
        start = (first + number) * block
        slots = start + jnp.arange(block)
        held = slots < length
        key = plgpu.load(key_ref.at[pl.ds(start, block), :], mask=held[:, None], other=0).astype(jnp.float32)
        scores = jnp.full((block,), -jnp.inf, jnp.float32)
        for query in range(query_ref.shape[0]):
            scores = jnp.maximum(scores, jnp.sum(key * query_ref[query, :].astype(jnp.float32)[None], axis=1))
        scores = ordered(scores)
        filled = append(scores, slots, held & (scores > threshold), filled)
        return jax.lax.cond(filled > capacity - block, shrink, lambda filled: (filled, threshold), filled)

    filled, _ = jax.lax.fori_loop(0, needed, step, (jnp.int32(0), jnp.int32(LOWEST)))
    filled, _ = shrink(filled)
    count_ref[0] = filled


def topk_attention(
    query: jax.Array,
    key: jax.Array,
    length: jax.Array,
    k: int,
    *,
    per: str,
    block: int = BLOCK,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in the api; `block` is a power of two."""
    batch, kv_heads, slots, dim = key.shape
    heads = query.shape[1]
    sets = heads if per == "head" else kv_heads
    queries = query.reshape(batch, sets, heads // sets, dim)
    capacity = 1 << (k + max(k, 4 * block) - 1).bit_length()
    total = -(-slots // block)
    # A split should be long against its list, which it sorts at least once.
    splits = max(1, min(_PROGRAMS // (batch * sets), total * block // (4 * capacity)))
    blocks = -(-total // splits)

    def of_split(b, program, split):
        return b, program, split, 0

    lists = jax.ShapeDtypeStruct((batch, sets, splits, capacity + block), jnp.int32)
    list_spec = pl.BlockSpec((None, None, None, capacity + block), of_split)
    shared = sets // kv_heads  # selections that read the same keys
    scores, indices, counts = pl.pallas_call(
        functools.partial(
            _kernel, k=k, capacity=capacity, block=block, blocks=blocks, synchronize=not interpret
        ),
        grid=(batch, sets, splits),
        in_specs=[
            pl.BlockSpec((1,), lambda b, program, split: (b,)),
            pl.BlockSpec((None, None, heads // sets, dim), lambda b, program, split: (b, program, 0, 0)),
            pl.BlockSpec((None, None, slots, dim), lambda b, program, split: (b, program // shared, 0, 0)),
        ],
        out_specs=[list_spec, list_spec, pl.BlockSpec((None, None, None, 1), of_split)],
        out_shape=[lists, lists, jax.ShapeDtypeStruct((batch, sets, splits, 1), jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=8 if capacity > 2048 else 4, num_stages=2),
        interpret=interpret,
        name="topk_attention",
    )(length.astype(jnp.int32), queries, key)

    def candidates(x: jax.Array) -> jax.Array:
        return x[..., :k].reshape(batch, sets, splits * k)

    # Splits and candidates are in order of the slots, so that of equals the lower slot comes first here too.
    scores = candidates(jnp.where(jnp.arange(capacity + block) < counts, scores, LOWEST))
    _, place = jax.lax.top_k(scores, k)
    count = jnp.minimum(length, k).astype(jnp.int32)
    listed = jnp.arange(k) < count[:, None, None]
    chosen = jnp.take_along_axis(candidates(indices), place, axis=2)
    return jnp.where(listed, jnp.sort(jnp.where(listed, chosen, slots), axis=-1), 0), count
