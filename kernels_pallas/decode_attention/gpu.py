"""Decode attention on GPU (Pallas, Triton).

FlashDecoding: the keys are cut into splits that run side by side, so that one sequence fills the device, and the
splits' results are merged by log-sum-exp outside. The gathered kernel loads the listed slots through a vector of
indices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.attention import Partial, finish, merged
from kernels_pallas.common import pad_axis
from kernels_pallas.tree_attention.common import NEGATIVE, absorb, grouped_rows, masked_scores

BLOCK = 64  # keys of a step
_ROWS = 64  # greatest number of query rows a program
_PROGRAMS = 256  # about twice as many as a large device has multiprocessors
_LEAST = 16  # a tensor core's smallest side


def _attend(query_ref, out_ref, lse_ref, load, count, *, block, blocks, scale, softcap) -> None:
    """This split's part: `load` gives key, value and the mask bool[block] of the keys from a place on."""
    rows = query_ref[...]
    first = pl.program_id(2) * blocks
    needed = jnp.clip(pl.cdiv(count, block) - first, 0, blocks)

    def step(number, carry):
        key, value, held = load((first + number) * block)
        scores = masked_scores(rows, key.astype(rows.dtype), held[None, :], scale, softcap)
        return absorb(scores, value.astype(rows.dtype), carry)

    column = jnp.zeros((rows.shape[0], 1), jnp.float32)
    carry = (column + NEGATIVE, column, jnp.zeros(rows.shape, jnp.float32))
    out_ref[...], lse = finish(jax.lax.fori_loop(0, needed, step, carry))
    lse_ref[...] = lse[:, 0]


def _dense_kernel(length_ref, query_ref, key_ref, value_ref, out_ref, lse_ref, *, block, **options):
    length = length_ref[0]

    def load(start):
        held = start + jnp.arange(block) < length
        keys = pl.ds(start, block)
        # Nothing beyond the length is read: it may be outside the array.
        key = plgpu.load(key_ref.at[keys, :], mask=held[:, None], other=0)
        return key, plgpu.load(value_ref.at[keys, :], mask=held[:, None], other=0), held

    _attend(query_ref, out_ref, lse_ref, load, length, block=block, **options)


def _gather_kernel(
    index_ref,  # int32[K]
    count_ref,  # int32[1]
    length_ref,  # int32[1]
    query_ref,  # [rows, d]
    key_ref,  # [S, d]
    value_ref,
    out_ref,  # [rows, d]
    lse_ref,  # [rows]
    *,
    page: int,
    block: int,
    **options,
):
    count, length = count_ref[0], length_ref[0]
    entries = index_ref.shape[0]

    def load(start):
        place = start + jnp.arange(block)
        entry = place // page
        slot = index_ref[jnp.minimum(entry, entries - 1)] * page + place % page
        held = (entry < count) & (slot >= 0) & (slot < length)
        # Rows that are not seen are read at a place inside the array, and their values dropped: they may be NaN.
        slot = jnp.where(held, slot, 0)
        value = jnp.where(held[:, None], value_ref[slot, :].astype(jnp.float32), 0)
        return key_ref[slot, :], value, held

    _attend(query_ref, out_ref, lse_ref, load, count * page, block=block, **options)


def _tiles(query: jax.Array, sets: int) -> tuple[jax.Array, int, int]:
    """The query rows [B, s, tiles * tile, d] of every set, padded; tile and tiles."""
    rows = grouped_rows(query, sets)
    real = rows.shape[2]
    tile = min(_ROWS, max(_LEAST, 1 << (real - 1).bit_length()))
    tiles = -(-real // tile)
    return pad_axis(rows, 2, tiles * tile), tile, tiles


def _call(kernel, rows, tile, tiles, splits, shape, specs, operands, interpret, name) -> Partial:
    """specs and operands besides the rows; grid (B, s * tiles, splits)."""
    batch, sets, size, dim = rows.shape
    before, behind = specs

    def of_split(b, program, split):
        return split, b, program // tiles, program % tiles

    parts = jax.ShapeDtypeStruct((splits, batch, sets, size), jnp.float32)
    out, lse = pl.pallas_call(
        kernel,
        grid=(batch, sets * tiles, splits),
        in_specs=[
            *before,
            pl.BlockSpec(
                (None, None, tile, dim), lambda b, program, split: (b, program // tiles, program % tiles, 0)
            ),
            *behind,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, tile, dim), lambda *at: (*of_split(*at), 0)),
            pl.BlockSpec((None, None, None, tile), of_split),
        ],
        out_shape=[jax.ShapeDtypeStruct((*parts.shape, dim), jnp.float32), parts],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=name,
    )(*operands)
    whole = merged(Partial(out, lse))
    real = shape[1] * shape[2] // sets
    return Partial(whole.out[:, :, :real].reshape(shape), whole.lse[:, :, :real].reshape(shape[:3]))


def _splits(keys: int, block: int, programs: int) -> tuple[int, int]:
    """How many splits, and the blocks of each."""
    splits = min(-(-keys // block), max(1, _PROGRAMS // programs))
    return splits, -(-keys // (block * splits))


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
    """Arguments as in the api; `block` is a power of two."""
    batch, kv_heads, slots, dim = key.shape
    rows, tile, tiles = _tiles(query, kv_heads)
    splits, blocks = _splits(slots, block, batch * kv_heads * tiles)
    whole = pl.BlockSpec((None, None, slots, dim), lambda b, program, split: (b, program // tiles, 0, 0))
    return _call(
        functools.partial(_dense_kernel, block=block, blocks=blocks, scale=scale, softcap=softcap),
        rows,
        tile,
        tiles,
        splits,
        query.shape,
        ([pl.BlockSpec((1,), lambda b, program, split: (b,))], [whole, whole]),
        (length.astype(jnp.int32), rows, key, value),
        interpret,
        "decode_attention",
    )


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
    block: int = BLOCK,
    interpret: Any = False,
) -> Partial:
    """Arguments as in the api, `count` int32[B, s]."""
    batch, kv_heads, slots, dim = key.shape
    sets, entries = indices.shape[1:]
    rows, tile, tiles = _tiles(query, sets)
    splits, blocks = _splits(entries * page, block, batch * sets * tiles)
    shared = sets // kv_heads  # lists of a key head

    def of_list(b, program, split):
        return b, program // tiles

    whole = pl.BlockSpec(
        (None, None, slots, dim), lambda b, program, split: (b, program // tiles // shared, 0, 0)
    )
    before = [
        pl.BlockSpec((None, None, entries), lambda *at: (*of_list(*at), 0)),
        pl.BlockSpec((None, 1), of_list),
        pl.BlockSpec((1,), lambda b, program, split: (b,)),
    ]
    return _call(
        functools.partial(
            _gather_kernel, page=page, block=block, blocks=blocks, scale=scale, softcap=softcap
        ),
        rows,
        tile,
        tiles,
        splits,
        query.shape,
        (before, [whole, whole]),
        (indices.astype(jnp.int32), count.astype(jnp.int32), length.astype(jnp.int32), rows, key, value),
        interpret,
        "gather_attention",
    )
