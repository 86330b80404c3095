"""Tree attention on TPU (Pallas, Mosaic).

The grid is (row of the batch, key head, step). Step 0 attends to the tree itself and so starts the online
softmax with a real score in every row; the other steps take one block of the cached prefix each. Blocks
beyond a row's length are neither computed nor fetched: their index repeats the last needed one, and a block
that is there already is not copied again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import pad_axis
from kernels_pallas.tree_attention.common import (
    absorb,
    grouped_mask,
    grouped_rows,
    masked_scores,
)

_LANES = 128
BLOCK = 512  # keys of a prefix block


def _visible(ref) -> jax.Array:
    return ref[...].astype(jnp.int32) != 0  # not every TPU compares 8-bit numbers


def _kernel(
    length_ref,  # int32[B], in scalar memory
    query_ref,  # [R, d]
    key_ref,  # [block, d] of the prefix
    value_ref,
    fresh_key_ref,  # [F, d]
    fresh_value_ref,
    tree_ref,  # int8[R, F]
    *refs,  # int8[R, block] if the prefix is masked; out [R, d]; scratch: [R, 128] twice and [R, d]
    block: int,
    scale: float,
    softcap: float | None,
):
    *mask_ref, out_ref, greatest_ref, total_ref, weighted_ref = refs
    step = pl.program_id(2)
    start = (step - 1) * block
    length = length_ref[pl.program_id(0)]

    def save(carry):
        greatest, total, weighted_ref[...] = carry
        greatest_ref[...] = jnp.broadcast_to(greatest, greatest_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @pl.when(step == 0)
    def _():
        rows = query_ref[...]
        scores = masked_scores(rows, fresh_key_ref[...], _visible(tree_ref), scale, softcap)
        column = jnp.zeros((rows.shape[0], 1), jnp.float32)
        nothing = (jnp.full_like(column, -jnp.inf), column, jnp.zeros(weighted_ref.shape, jnp.float32))
        save(absorb(scores, fresh_value_ref[...], nothing))

    @pl.when((step > 0) & (start < length))
    def _():
        rows = query_ref[...]
        visible = start + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < length
        if mask_ref:
            visible = visible & _visible(mask_ref[0])
        held = start + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
        scores = masked_scores(rows, key_ref[...].astype(rows.dtype), visible, scale, softcap)
        # What is beyond may be NaN. In 32 bits, because not every TPU selects among 16-bit values.
        value = jnp.where(held, value_ref[...].astype(jnp.float32), 0).astype(rows.dtype)
        save(absorb(scores, value, (greatest_ref[:, :1], total_ref[:, :1], weighted_ref[...])))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = (weighted_ref[...] / total_ref[:, :1]).astype(out_ref.dtype)


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
    """Arguments as in the api; `block` is a multiple of 128 and `interpret` runs it anywhere, slowly."""
    batch, heads, count, dim = query.shape
    kv_heads, slots = cached[0].shape[1:3]
    sublanes = 8 if query.dtype == jnp.float32 else 16
    block = min(block, -(-slots // _LANES) * _LANES)
    rows = grouped_rows(query, kv_heads)
    real = rows.shape[2]
    size = -(-real // sublanes) * sublanes
    fresh_size = -(-count // _LANES) * _LANES
    rows = pad_axis(rows, 2, size)
    fresh_key, fresh_value = (pad_axis(x, 2, fresh_size) for x in fresh)
    tree = pad_axis(grouped_mask(tree, heads, kv_heads), 3, fresh_size, False)
    tree = pad_axis(tree, 2, size, True).astype(jnp.int8)  # padded rows see something, so that none is 0 / 0

    def prefix_block(b, h, step, lengths):
        last = jnp.maximum(pl.cdiv(lengths[b], block) - 1, 0)
        return b, h, jnp.clip(step - 1, 0, last), 0

    def whole(b, h, step, lengths):
        return b, h, 0, 0

    def of_mask(mask: jax.Array, index):
        """Masks that all rows of the batch or all heads share have an axis of 1 there."""
        shared_batch, shared_head = (axis == 1 for axis in mask.shape[:2])
        return lambda b, h, step, lengths: (
            0 if shared_batch else b,
            0 if shared_head else h,
            0,
            index(b, h, step, lengths)[2],
        )

    specs = [
        pl.BlockSpec((None, None, size, dim), whole),
        pl.BlockSpec((None, None, block, dim), prefix_block),
        pl.BlockSpec((None, None, block, dim), prefix_block),
        pl.BlockSpec((None, None, fresh_size, dim), whole),
        pl.BlockSpec((None, None, fresh_size, dim), whole),
        pl.BlockSpec((None, None, size, fresh_size), of_mask(tree, whole)),
    ]
    operands = [rows, *cached, fresh_key, fresh_value, tree]
    if cached_mask is not None:
        mask = pad_axis(grouped_mask(cached_mask, heads, kv_heads), 2, size, False).astype(jnp.int8)
        operands.append(mask)
        specs.append(pl.BlockSpec((None, None, size, block), of_mask(mask, prefix_block)))
    out = pl.pallas_call(
        functools.partial(_kernel, block=block, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, 1 + -(-slots // block)),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, None, size, dim), whole),
            scratch_shapes=[
                pltpu.VMEM((size, _LANES), jnp.float32),
                pltpu.VMEM((size, _LANES), jnp.float32),
                pltpu.VMEM((size, dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="tree_attention",
    )(length.astype(jnp.int32), *operands)
    return out[:, :, :real].reshape(batch, heads, count, dim)
