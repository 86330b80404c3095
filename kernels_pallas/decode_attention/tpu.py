"""Decode attention on TPU (Pallas, Mosaic).

Both kernels go through the keys of one row and head in order, with an online softmax in scratch memory; a TPU core
runs one program at a time, so there is nothing to gain from splits. What is not needed is neither computed nor
fetched: its block index repeats the last needed one, and a block that is there already is not copied again.

The gathered form reads pages through block indices that come from the list, several pages a step so that their
copies run at the same time. A single slot cannot be copied alone out of a cache of 16-bit numbers, whose rows lie
in tiles of 8 x 128 words: the tile around each listed slot is read and its other rows are masked. A copy that small
takes as long as its latency, whatever its size.

Rows of fewer than 128 numbers lie padded to 128 in a TPU's memory, so XLA prefers to store such a cache with the
slots along the lanes. The dense kernel takes it so, [d, S], without a copy; pages are rows, and for those XLA copies
a cache that it stored the other way: keep heads of 128 where pages are read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import Partial, finish
from kernels_pallas.common import pad_axis
from kernels_pallas.tree_attention.common import NEGATIVE, absorb, grouped_rows, masked_scores

_LANES = 128
BLOCK = 512  # keys of a step of the dense kernel
GATHERED = 256  # keys of a step of the gathered kernel, unless a page is larger
_PAGES = 16  # most pages of a step


def _begin(carry_refs) -> None:
    greatest_ref, total_ref, weighted_ref = carry_refs
    greatest_ref[...] = jnp.full(greatest_ref.shape, NEGATIVE, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)


def _absorb(rows, key, value, seen, scale, softcap, carry_refs, key_axis: int = 0) -> None:
    """`seen(axis)` is the mask of the keys along that axis of two."""
    greatest_ref, total_ref, weighted_ref = carry_refs
    scores = masked_scores(rows, key.astype(rows.dtype), seen(1), scale, softcap, key_axis)
    # What is not held may be NaN. In 32 bits, because not every TPU selects among 16-bit values.
    value = jnp.where(seen(key_axis), value.astype(jnp.float32), 0).astype(rows.dtype)
    greatest, total, weighted_ref[...] = absorb(
        scores, value, (greatest_ref[:, :1], total_ref[:, :1], weighted_ref[...]), key_axis
    )
    greatest_ref[...] = jnp.broadcast_to(greatest, greatest_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)


def _end(out_ref, lse_ref, carry_refs) -> None:
    greatest_ref, total_ref, weighted_ref = carry_refs
    out_ref[...], lse_ref[...] = finish((greatest_ref[:, :1], total_ref[:, :1], weighted_ref[...]))


def _dense_kernel(
    length_ref,  # int32[B], in scalar memory
    query_ref,  # [R, d]
    key_ref,  # [block, d], or [d, block] with key_axis=1
    value_ref,
    out_ref,  # [R, d]
    lse_ref,  # [R, 1]
    *carry_refs,  # scratch: [R, 128] twice and [R, d]
    key_axis: int,
    block: int,
    scale: float,
    softcap: float | None,
):
    step = pl.program_id(2)
    start = step * block
    length = length_ref[pl.program_id(0)]
    pl.when(step == 0)(lambda: _begin(carry_refs))

    def held(axis: int) -> jax.Array:
        shape = tuple(block if i == axis else 1 for i in range(2))
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < length

    @pl.when(start < length)
    def _():
        _absorb(query_ref[...], key_ref[...], value_ref[...], held, scale, softcap, carry_refs, key_axis)

    pl.when(step == pl.num_programs(2) - 1)(lambda: _end(out_ref, lse_ref, carry_refs))


def _gather_kernel(
    index_ref,  # int32[B * s * K], in scalar memory like the next two
    count_ref,  # int32[B * s]
    length_ref,  # int32[B]
    query_ref,  # [R, d]
    *refs,  # keys and values of `pages` pages [tile, d]; out [R, d], lse [R, 1]; scratch as above
    entries: int,
    pages: int,
    page: int,
    tile: int,
    scale: float,
    softcap: float | None,
):
    keys, values, (out_ref, lse_ref, *carry_refs) = refs[:pages], refs[pages : 2 * pages], refs[2 * pages :]
    step = pl.program_id(2)
    list_of = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    count, length = count_ref[list_of], length_ref[pl.program_id(0)]
    pl.when(step == 0)(lambda: _begin(carry_refs))

    def seen(axis: int) -> jax.Array:
        """Which of this step's keys are listed and held: bool [1, K] or [K, 1]."""
        shape = tuple(pages * tile if i == axis else 1 for i in range(2))
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        number, inside = jax.lax.div(place, tile), jax.lax.rem(place, tile)
        slot = jnp.full(shape, length)  # not seen
        for i in range(pages):
            entry = step * pages + i
            index = index_ref[list_of * entries + jnp.minimum(entry, entries - 1)]
            mine = (number == i) & (entry < count)
            if page == 1:  # of the tile only the slot's own row
                mine = mine & (inside == jax.lax.rem(index, tile))
                index = jax.lax.div(index, tile)
            slot = jnp.where(mine, index * tile + inside, slot)
        return (slot >= 0) & (slot < length)

    @pl.when(step * pages < count)
    def _():
        key = jnp.concatenate([ref[...] for ref in keys], axis=0)
        value = jnp.concatenate([ref[...] for ref in values], axis=0)
        _absorb(query_ref[...], key, value, seen, scale, softcap, carry_refs)

    pl.when(step == pl.num_programs(2) - 1)(lambda: _end(out_ref, lse_ref, carry_refs))


def _outputs(batch: int, sets: int, size: int, dim: int):
    """Shapes and blocks of the two results, and the scratch memory."""
    shapes = [
        jax.ShapeDtypeStruct((batch, sets, size, dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, sets, size, 1), jnp.float32),
    ]
    specs = [pl.BlockSpec((None, None, size, width), _whole) for width in (dim, 1)]
    scratch = [pltpu.VMEM((size, width), jnp.float32) for width in (_LANES, _LANES, dim)]
    return shapes, specs, scratch


def _whole(b, s, step, *scalars):
    return b, s, 0, 0


def _padded_rows(query: jax.Array, sets: int) -> jax.Array:
    """[B, s, R, d] with R a multiple of the sublanes."""
    rows = grouped_rows(query, sets)
    sublanes = 32 // query.dtype.itemsize
    return pad_axis(rows, 2, -(-rows.shape[2] // sublanes) * sublanes)


def _partial(out: jax.Array, lse: jax.Array, shape: tuple[int, ...]) -> Partial:
    real = shape[1] * shape[2] // out.shape[1]
    return Partial(out[:, :, :real].reshape(shape), lse[:, :, :real].reshape(shape[:3]))


_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = BLOCK,
    interpret: Any = False,
) -> Partial:
    """Arguments as in the api; `block` is a multiple of 128."""
    batch, kv_heads, slots, dim = key.shape
    block = min(block, -(-slots // _LANES) * _LANES)
    rows = _padded_rows(query, kv_heads)
    key_axis = int(dim % _LANES != 0)
    if key_axis:
        key, value = key.swapaxes(2, 3), value.swapaxes(2, 3)

    def needed(b, h, step, lengths):
        number = jnp.minimum(step, jnp.maximum(pl.cdiv(lengths[b], block) - 1, 0))
        return (b, h, 0, number) if key_axis else (b, h, number, 0)

    keys = pl.BlockSpec((None, None, *((dim, block) if key_axis else (block, dim))), needed)

    shapes, specs, scratch = _outputs(batch, kv_heads, rows.shape[2], dim)
    out, lse = pl.pallas_call(
        functools.partial(_dense_kernel, key_axis=key_axis, block=block, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, -(-slots // block)),
            in_specs=[
                pl.BlockSpec((None, None, rows.shape[2], dim), _whole),
                keys,
                keys,
            ],
            out_specs=specs,
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="decode_attention",
    )(length.astype(jnp.int32), rows, key, value)
    return _partial(out, lse, query.shape)


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
    interpret: Any = False,
) -> Partial:
    """Arguments as in the api, `count` int32[B, s]."""
    batch, kv_heads, slots, dim = key.shape
    sets, entries = indices.shape[1:]
    tile = 32 // key.dtype.itemsize if page == 1 else page  # rows of a copy
    pages = max(1, min(_PAGES, GATHERED // tile, entries))
    shared = sets // kv_heads  # lists of a key head
    rows = _padded_rows(query, sets)
    last_tile = -(-slots // tile) - 1

    def page_of(i: int):
        def index_map(b, s, step, index, counts, lengths):
            list_of = b * sets + s
            entry = jnp.clip(step * pages + i, 0, jnp.maximum(counts[list_of] - 1, 0))
            number = index[list_of * entries + entry]
            number = jax.lax.div(number, tile) if page == 1 else number
            return b, jax.lax.div(s, shared), jnp.clip(number, 0, last_tile), 0

        return pl.BlockSpec((None, None, tile, dim), index_map)

    shapes, specs, scratch = _outputs(batch, sets, rows.shape[2], dim)
    out, lse = pl.pallas_call(
        functools.partial(
            _gather_kernel, entries=entries, pages=pages, page=page, tile=tile, scale=scale, softcap=softcap
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, sets, -(-entries // pages)),
            in_specs=[
                pl.BlockSpec((None, None, rows.shape[2], dim), _whole),
                *(page_of(i) for _ in range(2) for i in range(pages)),
            ],
            out_specs=specs,
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="gather_attention",
    )(
        indices.astype(jnp.int32).reshape(-1),
        count.astype(jnp.int32).reshape(-1),
        length.astype(jnp.int32),
        rows,
        *[key] * pages,
        *[value] * pages,
    )
    return _partial(out, lse, query.shape)
