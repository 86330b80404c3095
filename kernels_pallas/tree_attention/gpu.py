"""Tree attention on GPU (Pallas, Triton).

Flash-decoding: the cached prefix is cut into splits that run side by side, so that one sequence fills the
device. Split 0 also attends to the tree itself. Every split gives its greatest score, its sum of exponentials
and its weighted values; they are merged by log-sum-exp outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.common import pad_axis
from kernels_pallas.tree_attention.common import (
    NEGATIVE,
    absorb,
    grouped_mask,
    grouped_rows,
    masked_scores,
)

BLOCK = 64  # keys of a prefix block
_ROWS = 64  # greatest number of query rows a program
_PROGRAMS = 128  # about as many as a large device has multiprocessors
_LEAST = 16  # a tensor core's smallest side


def _kernel(
    length_ref,  # int32[1]
    query_ref,  # [rows, d]
    key_ref,  # [S, d]
    value_ref,
    fresh_key_ref,  # [F, d]
    fresh_value_ref,
    tree_ref,  # int8[rows, F]
    *refs,  # int8[rows, S] if the prefix is masked; greatest, total [rows] and weighted [rows, d]
    block: int,
    blocks: int,
    scale: float,
    softcap: float | None,
):
    *mask_ref, greatest_ref, total_ref, weighted_ref = refs
    rows = query_ref[...]
    split = pl.program_id(2)
    length = length_ref[0]
    first = split * blocks  # of this split's blocks
    needed = jnp.clip(pl.cdiv(length, block) - first, 0, blocks)

    def prefix_block(number, carry):
        start = (first + number) * block
        held = start + jnp.arange(block) < length
        visible = held[None, :]
        keys = pl.ds(start, block)
        if mask_ref:
            seen = plgpu.load(
                mask_ref[0].at[:, keys], mask=jnp.broadcast_to(visible, (rows.shape[0], block)), other=0
            )
            visible = visible & (seen != 0)
        # Nothing beyond the length is read: it may be outside the array.
        key = plgpu.load(key_ref.at[keys, :], mask=held[:, None], other=0).astype(rows.dtype)
        value = plgpu.load(value_ref.at[keys, :], mask=held[:, None], other=0).astype(rows.dtype)
        return absorb(masked_scores(rows, key, visible, scale, softcap), value, carry)

    column = jnp.zeros((rows.shape[0], 1), jnp.float32)
    nothing = (column + NEGATIVE, column, jnp.zeros(rows.shape, jnp.float32))

    def with_tree():
        scores = masked_scores(rows, fresh_key_ref[...], tree_ref[...] != 0, scale, softcap)
        return absorb(scores, fresh_value_ref[...], nothing)

    carry = jax.lax.cond(split == 0, with_tree, lambda: nothing)
    greatest, total, weighted_ref[...] = jax.lax.fori_loop(0, needed, prefix_block, carry)
    greatest_ref[...] = greatest[:, 0]
    total_ref[...] = total[:, 0]


def _power_of_two(count: int) -> int:
    return max(_LEAST, 1 << (count - 1).bit_length())


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
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """Arguments as in the api; `block` is a power of two and `interpret` runs it anywhere, slowly."""
    batch, heads, count, dim = query.shape
    kv_heads, slots = cached[0].shape[1:3]
    rows = grouped_rows(query, kv_heads)
    real = rows.shape[2]
    tile = min(_ROWS, _power_of_two(real))
    tiles = -(-real // tile)
    size = tiles * tile
    fresh_size = _power_of_two(count)
    splits = min(-(-slots // block), max(1, _PROGRAMS // (batch * kv_heads * tiles)))
    blocks = -(-slots // (block * splits))

    rows = pad_axis(rows, 2, size)
    fresh_key, fresh_value = (pad_axis(x, 2, fresh_size) for x in fresh)
    tree = pad_axis(grouped_mask(tree, heads, kv_heads), 3, fresh_size, False)
    tree = pad_axis(tree, 2, size, True).astype(jnp.int8)  # padded rows see something, so that none is 0 / 0

    def of_head(b, program, split):
        return b, program // tiles, 0, 0

    def of_tile(b, program, split):
        return b, program // tiles, program % tiles, 0

    def of_mask(mask: jax.Array):
        """Masks that all rows of the batch or all heads share have an axis of 1 there."""
        shared_batch, shared_head = (axis == 1 for axis in mask.shape[:2])
        return lambda b, program, split: (
            0 if shared_batch else b,
            0 if shared_head else program // tiles,
            program % tiles,
            0,
        )

    specs = [
        pl.BlockSpec((1,), lambda b, program, split: (b,)),
        pl.BlockSpec((None, None, tile, dim), of_tile),
        pl.BlockSpec((None, None, slots, dim), of_head),
        pl.BlockSpec((None, None, slots, dim), of_head),
        pl.BlockSpec((None, None, fresh_size, dim), of_head),
        pl.BlockSpec((None, None, fresh_size, dim), of_head),
        pl.BlockSpec((None, None, tile, fresh_size), of_mask(tree)),
    ]
    operands = [length.astype(jnp.int32), rows, *cached, fresh_key, fresh_value, tree]
    if cached_mask is not None:
        mask = pad_axis(grouped_mask(cached_mask, heads, kv_heads), 2, size, False).astype(jnp.int8)
        operands.append(mask)
        specs.append(pl.BlockSpec((None, None, tile, slots), of_mask(mask)))

    def of_split(b, program, split):
        return split, b, program // tiles, program % tiles

    parts = jax.ShapeDtypeStruct((splits, batch, kv_heads, size), jnp.float32)
    greatest, total, weighted = pl.pallas_call(
        functools.partial(_kernel, block=block, blocks=blocks, scale=scale, softcap=softcap),
        grid=(batch, kv_heads * tiles, splits),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, None, tile), of_split),
            pl.BlockSpec((None, None, None, tile), of_split),
            pl.BlockSpec((None, None, None, tile, dim), lambda *at: (*of_split(*at), 0)),
        ],
        out_shape=[parts, parts, jax.ShapeDtypeStruct((*parts.shape, dim), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="tree_attention",
    )(*operands)
    share = jnp.exp(greatest - jnp.max(greatest, axis=0))[
        ..., None
    ]  # of each split, relative to the greatest
    out = jnp.sum(share * weighted, axis=0) / jnp.sum(share * total[..., None], axis=0)
    return out[:, :, :real].astype(query.dtype).reshape(batch, heads, count, dim)
