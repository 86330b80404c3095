"""Top-k selection on TPU (Pallas, Mosaic), which has neither sort nor top_k.

The keys of one row and key head are read once, in blocks; their scores stay in vector memory as integers of the same
order, 128 a chunk: [chunks, 128] for each selection. Behind the last block, for each:

1. The k-th largest by bisection: 32 counts over the scores.
2. Which slots are selected: those above it, and of those equal to it the first ones. Ranks are sums, taken as
   products with triangular matrices.
3. The place of the p-th selected slot, for 128 p at a time: its chunk is the one whose first rank is at most p, found
   by comparison; a product with that comparison, as a matrix of ones, brings every p the 128 slots of its chunk; the
   slot is the one whose rank among them fits.

All sums are of whole numbers below 2**24 and exact in float32. Keys of fewer than 128 numbers, which XLA prefers to
store with the slots along the lanes, are taken so, [d, S].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import precision_of
from kernels_pallas.topk_attention.common import LOWEST, kth_largest, ordered
from kernels_pallas.tree_attention.common import grouped_rows

_LANES = 128
_PIECE = 128 * _LANES  # slots of a square of chunks
BLOCK = 1024  # keys of a step


def scratch_bytes(group: int, slots: int, per: str) -> int:
    """Vector memory for scores and for the first rank of each chunk."""
    selections = group if per == "head" else 1
    return 4 * (selections + 1) * -(-slots // _PIECE) * _PIECE


def _ones(mask: jax.Array) -> jax.Array:
    # Through int32: not every TPU converts a mask into 16 bits.
    return mask.astype(jnp.int32).astype(jnp.float32).astype(jnp.bfloat16)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _square(compare) -> jax.Array:
    """bfloat16 [128, 128]: `compare` of the row's and the column's number."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), axis) for axis in (0, 1))
    return _ones(compare(row, column))


def _lane_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _kernel(
    length_ref,  # int32[B], in scalar memory
    query_ref,  # [R, d]
    key_ref,  # [block, d], or [d, block] with key_axis=1
    out_ref,  # int32 [selections, k in lines of 128, 128]
    score_ref,  # scratch: int32 [selections, chunks, 128]
    first_ref,  # scratch: float32 [chunks, 128], the first rank of a chunk, in all lanes
    *,
    k: int,
    block: int,
    key_axis: int,
):
    step = pl.program_id(2)
    length = length_ref[pl.program_id(0)]
    selections = score_ref.shape[0]

    @pl.when(step == 0)
    def _():
        score_ref[...] = jnp.full(score_ref.shape, LOWEST, jnp.int32)

    @pl.when(step * block < length)
    def _():
        rows = query_ref[...]
        scores = jax.lax.dot_general(
            rows,
            key_ref[...].astype(rows.dtype),
            (((1,), (1 - key_axis,)), ((), ())),
            precision=precision_of(rows.dtype),
            preferred_element_type=jnp.float32,
        )
        if selections == 1:
            scores = jnp.max(scores, axis=0, keepdims=True)  # rows behind the last are copies of one
        held = step * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < length
        scores = jnp.where(held, ordered(scores), LOWEST)
        for number in range(selections):
            for chunk in range(block // _LANES):
                part = scores[number : number + 1, chunk * _LANES : (chunk + 1) * _LANES]
                score_ref[number, pl.ds(step * (block // _LANES) + chunk, 1), :] = part

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        def select(number, nothing):
            _select(number, length, out_ref, score_ref, first_ref, k)
            return nothing

        jax.lax.fori_loop(0, selections, select, 0)


def _select(number, length, out_ref, score_ref, first_ref, k: int) -> None:
    count = jnp.minimum(length, k)
    pieces = pl.cdiv(length, _PIECE)
    zero = jnp.zeros((1, 1), jnp.float32)

    def piece_of(piece) -> jax.Array:
        return pl.ds(pl.multiple_of(piece * _LANES, _LANES), _LANES)

    def count_from(threshold: jax.Array) -> jax.Array:
        def add(piece, sums):
            return sums + (score_ref[number, piece_of(piece), :] >= threshold).astype(jnp.int32)

        sums = jax.lax.fori_loop(0, pieces, add, jnp.zeros((_LANES, _LANES), jnp.int32)).astype(jnp.float32)
        return jnp.sum(_lane_sum(sums), axis=0, keepdims=True)

    threshold = kth_largest(count_from, count.astype(jnp.float32), (1, 1))
    # How many of those equal to the threshold: all above it are taken. Nothing is above the greatest integer.
    above = count_from(threshold + 1)
    taken = jnp.where(count > 0, count.astype(jnp.float32) - above, 0)

    up_to_lane = _square(lambda row, column: row <= column)
    earlier = _square(lambda row, column: column < row)

    def ranks(mask: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of the ones of a piece, in order of the slots: how many up to each slot, and before each chunk
        [chunks, 1]; and how many with this piece, [1, 1]."""
        ones = _ones(mask)
        first = before + _lane_sum(_product(earlier, ones))
        inside = _product(ones, up_to_lane)
        here = jnp.sum(_lane_sum(ones.astype(jnp.float32)), axis=0, keepdims=True)
        return first + inside, first, before + here

    def mark(piece, before):
        equal_before, selected_before = before
        scores = score_ref[number, piece_of(piece), :]
        equal = scores == threshold
        rank, _, equal_before = ranks(equal, equal_before)
        selected = (scores > threshold) | (equal & (rank <= taken))
        _, first, selected_before = ranks(selected, selected_before)
        score_ref[number, piece_of(piece), :] = selected.astype(jnp.int32)
        first_ref[piece_of(piece), :] = jnp.broadcast_to(first, (_LANES, _LANES))
        return equal_before, selected_before

    jax.lax.fori_loop(0, pieces, mark, (zero, zero))

    up_to_row = _square(lambda row, column: column <= row)

    def place(line, nothing):
        wanted = line * _LANES + jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
        position = wanted.astype(jnp.float32)

        def find(piece, found):
            slots, chunk_start, first_rank = found
            selected = score_ref[number, piece_of(piece), :].astype(jnp.float32)
            first = first_ref[piece_of(piece), :]
            here = (first <= position) & (position < first + _lane_sum(selected))  # [chunks, positions]
            slots = slots + _product(jnp.transpose(selected).astype(jnp.bfloat16), _ones(here))
            start = piece * _PIECE + _LANES * jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0)
            start = start.astype(jnp.float32)
            chunk_start = chunk_start + jnp.sum(jnp.where(here, start, 0), axis=0, keepdims=True)
            first_rank = first_rank + jnp.sum(jnp.where(here, first, 0), axis=0, keepdims=True)
            return slots, chunk_start, first_rank

        row = jnp.zeros((1, _LANES), jnp.float32)
        slots, chunk_start, first_rank = jax.lax.fori_loop(
            0, pieces, find, (jnp.zeros((_LANES, _LANES), jnp.float32), row, row)
        )
        rank = _product(up_to_row, slots.astype(jnp.bfloat16))  # [slots of the chunk, positions], from 1
        before = jnp.sum(jnp.where(rank <= position - first_rank, 1.0, 0.0), axis=0, keepdims=True)
        found = (chunk_start + before).astype(jnp.int32)
        out_ref[number, pl.ds(line, 1), :] = jnp.where(wanted < count, found, 0)
        return nothing

    jax.lax.fori_loop(0, out_ref.shape[1], place, 0)


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
    """Arguments as in the api; `block` is a multiple of 128 that divides 16384."""
    batch, kv_heads, slots, dim = key.shape
    rows = grouped_rows(query[:, :, None], kv_heads)
    group = rows.shape[2]
    sublanes = 32 // query.dtype.itemsize
    size = -(-group // sublanes) * sublanes
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, size - group), (0, 0)), mode="edge")
    selections = group if per == "head" else 1
    chunks = -(-slots // _PIECE) * _LANES
    lines = -(-k // _LANES)
    vmem = scratch_bytes(group, slots, per) + 8 * 2**20

    key_axis = int(dim % _LANES != 0)
    if key_axis:
        key = key.swapaxes(2, 3)

    def needed(b, h, step, lengths):
        number = jnp.minimum(step, jnp.maximum(pl.cdiv(lengths[b], block) - 1, 0))
        return (b, h, 0, number) if key_axis else (b, h, number, 0)

    def whole(b, h, step, lengths):
        return b, h, 0, 0

    indices = pl.pallas_call(
        functools.partial(_kernel, k=k, block=block, key_axis=key_axis),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, -(-slots // block)),
            in_specs=[
                pl.BlockSpec((None, None, size, dim), whole),
                pl.BlockSpec((None, None, *((dim, block) if key_axis else (block, dim))), needed),
            ],
            out_specs=pl.BlockSpec((None, None, selections, lines, _LANES), lambda *at: (*whole(*at), 0)),
            scratch_shapes=[
                pltpu.VMEM((selections, chunks, _LANES), jnp.int32),
                pltpu.VMEM((chunks, _LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, selections, lines, _LANES), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
        interpret=interpret,
        name="topk_attention",
    )(length.astype(jnp.int32), rows, key)
    indices = indices.reshape(batch, kv_heads * selections, lines * _LANES)[:, :, :k]
    return indices, jnp.minimum(length, k).astype(jnp.int32)
