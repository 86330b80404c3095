"""Span attention on TPU (Pallas, Mosaic), forward and backward.

The tiles with something visible, of all heads, form one list that is made when the program is traced and lies in
scalar memory; the grid is (row of the batch, tile). So the time is that of the visible tiles, whatever the widest
head, and a tile that is not listed is never read. The tiles of an output block follow each other: it is begun and
written out at the flags of the first and the last. Only partly visible tiles compute a mask.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import finish
from kernels_pallas.common import Unsupported, pad_axis
from kernels_pallas.span_attention.common import (
    ROW_BY_ROW,
    capped,
    product,
    score_gradient,
    visible_tile,
)
from kernels_pallas.span_attention.work import FIRST, LAST, PARTIAL, Work, by_key, by_query
from kernels_pallas.tree_attention.common import NEGATIVE, absorb

_LANES = 128
BLOCK = 512  # greatest side of a tile
TILES = 60_000  # tiles of a list that fit a TPU's scalar memory (1 MiB), four numbers each


def block_of(length: int) -> int:
    """A multiple of 128 up to `BLOCK` that divides the length with little left over."""
    count = -(-length // BLOCK)
    return -(-length // (count * _LANES)) * _LANES


def _as_row(column: jax.Array) -> jax.Array:
    """[n, 1] -> [1, n]."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], _LANES)))[:1]


def _as_column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (_LANES, row.shape[1])))[:, :1]


class _Tile:
    """The tile of this step: its flags, and its mask in either orientation."""

    def __init__(self, scalars, block_q: int, block_k: int):
        head_ref, row_ref, column_ref, flag_ref, window_ref, sink_ref = scalars
        step = pl.program_id(1)
        self.flags = flag_ref[step]
        head = head_ref[step]
        self.span = window_ref[head], sink_ref[head]
        self.start = row_ref[step] * block_q, column_ref[step] * block_k
        self.blocks = block_q, block_k

    def first(self):
        return pl.when(self.flags & FIRST != 0)

    def last(self):
        return pl.when(self.flags & LAST != 0)

    def masked(self, x: jax.Array, other: float, segment_refs, query_axis: int) -> jax.Array:
        """x with `other` at the pairs that are not visible; the queries lie along `query_axis`."""

        def mask(x: jax.Array) -> jax.Array:
            shapes = [[1, 1], [1, 1]]
            shapes[0][query_axis], shapes[1][1 - query_axis] = self.blocks
            rows, columns = (
                start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
                for start, shape, axis in zip(self.start, shapes, (query_axis, 1 - query_axis), strict=True)
            )
            segments = None
            if segment_refs:
                of_both = [ref[...] for ref in segment_refs]  # [1, block] each
                of_both[query_axis] = _as_column(of_both[query_axis])
                segments = tuple(of_both)
            return jnp.where(visible_tile(rows, columns, *self.span, segments), x, other)

        if segment_refs:
            return mask(x)
        return jax.lax.cond(self.flags & PARTIAL != 0, mask, lambda x: x, x)


def _forward_kernel(*refs, block_q: int, block_k: int, scale: float, softcap: float | None):
    # Six scalar arrays; query [q, d], key and value [k, d]; two segments or none; out [q, d], lse [1, q]; scratch.
    scalars, (query_ref, key_ref, value_ref), refs = refs[:6], refs[6:9], refs[9:]
    *segment_refs, out_ref, lse_ref, greatest_ref, total_ref, weighted_ref = refs
    tile = _Tile(scalars, block_q, block_k)

    @tile.first()
    def _():
        greatest_ref[...] = jnp.full(greatest_ref.shape, NEGATIVE, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)

    scores = capped(product(query_ref[...], key_ref[...], ROW_BY_ROW) * scale, softcap)
    scores = tile.masked(scores, NEGATIVE, segment_refs, 0)
    carry = absorb(scores, value_ref[...], (greatest_ref[:, :1], total_ref[:, :1], weighted_ref[...]))
    greatest, total, weighted_ref[...] = carry
    greatest_ref[...] = jnp.broadcast_to(greatest, greatest_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @tile.last()
    def _():
        out, lse = finish(carry)
        out_ref[...] = out.astype(out_ref.dtype)
        lse_ref[...] = _as_row(lse)


def _query_kernel(*refs, block_q: int, block_k: int, scale: float, softcap: float | None):
    """Gradient of the queries."""
    # Scalars; query, key, value; gradient of out [q, d], lse and delta [1, q]; segments; result [q, d]; scratch.
    scalars, (query_ref, key_ref, value_ref, out_ref, lse_ref, delta_ref), refs = (
        refs[:6],
        refs[6:12],
        refs[12:],
    )
    *segment_refs, result_ref, sum_ref = refs
    tile = _Tile(scalars, block_q, block_k)

    @tile.first()
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    key = key_ref[...]
    scores = capped(product(query_ref[...], key, ROW_BY_ROW) * scale, softcap)
    probabilities = jnp.exp(scores - _as_column(lse_ref[...]))
    probabilities = tile.masked(probabilities, 0.0, segment_refs, 0)
    drift = product(out_ref[...], value_ref[...], ROW_BY_ROW)
    gradient = score_gradient(probabilities, drift, _as_column(delta_ref[...]), scores, scale, softcap)
    sum_ref[...] += product(gradient, key)

    @tile.last()
    def _():
        result_ref[...] = sum_ref[...].astype(result_ref.dtype)


def _key_kernel(*refs, block_q: int, block_k: int, scale: float, softcap: float | None):
    """Gradients of the keys and values. Scores are [k, q] here, so that no product needs a transposed operand."""
    scalars, (query_ref, key_ref, value_ref, out_ref, lse_ref, delta_ref), refs = (
        refs[:6],
        refs[6:12],
        refs[12:],
    )
    *segment_refs, key_result_ref, value_result_ref, key_sum_ref, value_sum_ref = refs
    tile = _Tile(scalars, block_q, block_k)

    @tile.first()
    def _():
        key_sum_ref[...] = jnp.zeros(key_sum_ref.shape, jnp.float32)
        value_sum_ref[...] = jnp.zeros(value_sum_ref.shape, jnp.float32)

    query, out = query_ref[...], out_ref[...]
    scores = capped(product(key_ref[...], query, ROW_BY_ROW) * scale, softcap)
    probabilities = jnp.exp(scores - lse_ref[...])
    probabilities = tile.masked(probabilities, 0.0, segment_refs, 1)
    value_sum_ref[...] += product(probabilities, out)
    drift = product(value_ref[...], out, ROW_BY_ROW)
    gradient = score_gradient(probabilities, drift, delta_ref[...], scores, scale, softcap)
    key_sum_ref[...] += product(gradient, query)

    @tile.last()
    def _():
        key_result_ref[...] = key_sum_ref[...].astype(key_result_ref.dtype)
        value_result_ref[...] = value_sum_ref[...].astype(value_result_ref.dtype)


class _Layout:
    """Blocks of the arrays of a call, chosen by the work list in scalar memory."""

    def __init__(self, group: int, dim: int, block: int):
        def of_query(b, t, head, row, column, *rest):
            return b, head[t], row[t], 0

        def of_key(b, t, head, row, column, *rest):
            return b, jax.lax.div(head[t], group), column[t], 0

        def of_line(b, t, head, row, column, *rest):
            return b, head[t], 0, row[t]

        self.query = pl.BlockSpec((None, None, block, dim), of_query)
        self.key = pl.BlockSpec((None, None, block, dim), of_key)
        self.line = pl.BlockSpec((None, None, 1, block), of_line)
        self.segments = [
            pl.BlockSpec((None, 1, block), lambda b, t, head, row, column, *rest: (b, 0, row[t])),
            pl.BlockSpec((None, 1, block), lambda b, t, head, row, column, *rest: (b, 0, column[t])),
        ]


def _call(
    kernel,
    work: Work,
    spans: tuple[tuple[int, ...], tuple[int, ...]],
    segments: jax.Array | None,
    operands: list[jax.Array],
    specs: list,
    results: list,
    result_specs: list,
    scratch: list,
    layout: _Layout,
    interpret: Any,
    name: str,
):
    if len(work.head) > TILES:
        raise Unsupported(
            f"{len(work.head)} visible tiles: the tpu kernel's list holds {TILES}; "
            "take shorter sequences or narrower windows, or fewer heads a call"
        )
    if segments is not None:
        operands = [*operands, segments[:, None], segments[:, None]]
        specs = [*specs, *layout.segments]
    scalars = [jnp.asarray(np.asarray(x, np.int32)) for x in (*work, *spans)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(operands[0].shape[0], len(work.head)),
            in_specs=specs,
            out_specs=result_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(*scalars, *operands)


def _padded(block: int, *arrays: jax.Array) -> list[jax.Array]:
    """Axis 2 up to a multiple of the block. No query sees the keys behind it, and no query behind it is kept."""
    size = -(-arrays[0].shape[2] // block) * block
    return [pad_axis(x, 2, size) for x in arrays]


def _padded_segments(segments: jax.Array | None, size: int) -> jax.Array | None:
    return None if segments is None else pad_axis(segments.astype(jnp.int32), 1, size)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    windows: tuple[int, ...],
    sinks: tuple[int, ...],
    segments: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    block: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, L, d] and log-sum-exp float32 [B, H, L]; `block` is a multiple of 128, None chooses one."""
    batch, heads, length, dim = query.shape
    block = block or block_of(length)
    query, key, value = _padded(block, query, key, value)
    size = query.shape[2]
    layout = _Layout(heads // key.shape[1], dim, block)
    out, lse = _call(
        functools.partial(_forward_kernel, block_q=block, block_k=block, scale=scale, softcap=softcap),
        by_query(windows, sinks, size, block, block),
        (windows, sinks),
        _padded_segments(segments, size),
        [query, key, value],
        [layout.query, layout.key, layout.key],
        [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, size), jnp.float32),
        ],
        [layout.query, layout.line],
        [(block, _LANES), (block, _LANES), (block, dim)],
        layout,
        interpret,
        "span_attention",
    )
    return out[:, :, :length], lse[:, :, 0, :length]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    windows: tuple[int, ...],
    sinks: tuple[int, ...],
    segments: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    gradient: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    block: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value. `lse` and `delta` float32 [B, H, L]; `gradient` that of the output."""
    heads, length, dim = query.shape[1:]
    kv_heads = key.shape[1]
    block = block or block_of(length)
    query, key, value, gradient = _padded(block, query, key, value, gradient)
    size = query.shape[2]
    lse, delta = (pad_axis(x, 2, size)[:, :, None] for x in (lse, delta))
    segments = _padded_segments(segments, size)
    layout = _Layout(heads // kv_heads, dim, block)
    operands = [query, key, value, gradient, lse, delta]
    specs = [layout.query, layout.key, layout.key, layout.query, layout.line, layout.line]
    options = dict(block_q=block, block_k=block, scale=scale, softcap=softcap)
    (query_gradient,) = _call(
        functools.partial(_query_kernel, **options),
        by_query(windows, sinks, size, block, block),
        (windows, sinks),
        segments,
        operands,
        specs,
        [jax.ShapeDtypeStruct(query.shape, query.dtype)],
        [layout.query],
        [(block, dim)],
        layout,
        interpret,
        "span_attention_query_gradient",
    )
    key_gradient, value_gradient = _call(
        functools.partial(_key_kernel, **options),
        by_key(windows, sinks, size, block, block, kv_heads),
        (windows, sinks),
        segments,
        operands,
        specs,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        [layout.key, layout.key],
        [(block, dim), (block, dim)],
        layout,
        interpret,
        "span_attention_key_gradient",
    )
    return tuple(x[:, :, :length] for x in (query_gradient, key_gradient, value_gradient))
