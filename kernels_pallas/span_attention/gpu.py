"""Span attention on GPU (Pallas, Triton), forward and backward.

A program has one block of queries of one head and goes through the blocks of keys that hold its sinks, then through
those of its window; for the gradients of keys and values it has one block of keys and goes through the queries of
every head that see it. The bounds come from the head's span, so blocks outside it are not read. Programs that have
most to do start first: late blocks before early ones, heads with long spans before short ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.attention import finish
from kernels_pallas.common import pad_axis
from kernels_pallas.span_attention.common import (
    ROW_BY_ROW,
    capped,
    product,
    score_gradient,
    visible_tile,
)
from kernels_pallas.tree_attention.common import NEGATIVE, absorb

BLOCK_Q = 128  # queries of a tile of the forward pass
BLOCK = 64  # the other sides
_LEAST = 16  # a tensor core's smallest side


def _visible(row_start, column_start, shape, span, segment_ref, b, transposed=False) -> jax.Array:
    """bool [q, k] of a tile, or [k, q]."""
    rows, columns = row_start + jnp.arange(shape[0]), column_start + jnp.arange(shape[1])
    of_rows, of_columns = (1, 0) if transposed else (0, 1)

    def along(x: jax.Array, axis: int) -> jax.Array:
        return x[:, None] if axis == 0 else x[None, :]

    segments = None
    if segment_ref is not None:
        segments = (
            along(segment_ref[b, pl.ds(row_start, shape[0])], of_rows),
            along(segment_ref[b, pl.ds(column_start, shape[1])], of_columns),
        )
    return visible_tile(along(rows, of_rows), along(columns, of_columns), *span, segments)


def _key_blocks(row_start, block_q: int, block_k: int, span):
    """Blocks of keys that a block of queries sees: the end of the sinks' blocks (from 0), and the window's range."""
    window, sink = span
    end = pl.cdiv(row_start + block_q, block_k)  # behind the block of the diagonal
    sinks = jnp.minimum(pl.cdiv(sink, block_k), end)
    start = jax.lax.div(jnp.maximum(row_start - window + 1, 0), block_k)
    start = jnp.where(window > 0, jnp.maximum(start, sinks), end)
    return sinks, start, end


def _over_keys(step, carry, row_start, block_q, block_k, span):
    sinks, start, end = _key_blocks(row_start, block_q, block_k, span)
    carry = jax.lax.fori_loop(0, sinks, step, carry)
    return jax.lax.fori_loop(start, end, step, carry)


def _head(order_ref, window_ref, sink_ref):
    """Row of the batch, head and span of this program."""
    heads = order_ref.shape[0]
    program = pl.program_id(1)
    head = order_ref[jax.lax.rem(program, heads)]
    return jax.lax.div(program, heads), head, (window_ref[head], sink_ref[head])


def _forward_kernel(*refs, group: int, block_q: int, block_k: int, scale: float, softcap: float | None):
    # Order, windows, sinks [H]; query [B, H, L, d], key, value [B, Hkv, L, d]; segments [B, L] or not; out, lse.
    order_ref, window_ref, sink_ref, query_ref, key_ref, value_ref, *segment_ref, out_ref, lse_ref = refs
    b, head, span = _head(order_ref, window_ref, sink_ref)
    kv_head = jax.lax.div(head, group)
    row_start = (pl.num_programs(0) - 1 - pl.program_id(0)) * block_q
    mine = pl.ds(row_start, block_q)
    rows = query_ref[b, head, mine, :]
    segment_ref = segment_ref[0] if segment_ref else None

    def step(number, carry):
        column_start = number * block_k
        keys = pl.ds(column_start, block_k)
        scores = capped(product(rows, key_ref[b, kv_head, keys, :], ROW_BY_ROW) * scale, softcap)
        visible = _visible(row_start, column_start, (block_q, block_k), span, segment_ref, b)
        return absorb(jnp.where(visible, scores, NEGATIVE), value_ref[b, kv_head, keys, :], carry)

    column = jnp.zeros((block_q, 1), jnp.float32)
    carry = (column + NEGATIVE, column, jnp.zeros(rows.shape, jnp.float32))
    out, lse = finish(_over_keys(step, carry, row_start, block_q, block_k, span))
    out_ref[b, head, mine, :] = out.astype(out_ref.dtype)
    lse_ref[b, head, mine] = lse[:, 0]


def _query_kernel(*refs, group: int, block_q: int, block_k: int, scale: float, softcap: float | None):
    """Gradient of the queries."""
    order_ref, window_ref, sink_ref, query_ref, key_ref, value_ref, out_ref, lse_ref, delta_ref = refs[:9]
    *segment_ref, result_ref = refs[9:]
    b, head, span = _head(order_ref, window_ref, sink_ref)
    kv_head = jax.lax.div(head, group)
    row_start = (pl.num_programs(0) - 1 - pl.program_id(0)) * block_q
    mine = pl.ds(row_start, block_q)
    rows, out = query_ref[b, head, mine, :], out_ref[b, head, mine, :]
    lse, delta = lse_ref[b, head, mine][:, None], delta_ref[b, head, mine][:, None]
    segment_ref = segment_ref[0] if segment_ref else None

    def step(number, total):
        column_start = number * block_k
        keys = pl.ds(column_start, block_k)
        key = key_ref[b, kv_head, keys, :]
        scores = capped(product(rows, key, ROW_BY_ROW) * scale, softcap)
        visible = _visible(row_start, column_start, (block_q, block_k), span, segment_ref, b)
        probabilities = jnp.where(visible, jnp.exp(scores - lse), 0)
        drift = product(out, value_ref[b, kv_head, keys, :], ROW_BY_ROW)
        return total + product(score_gradient(probabilities, drift, delta, scores, scale, softcap), key)

    total = _over_keys(step, jnp.zeros(rows.shape, jnp.float32), row_start, block_q, block_k, span)
    result_ref[b, head, mine, :] = total.astype(result_ref.dtype)


def _key_kernel(*refs, group: int, block_q: int, block_k: int, scale: float, softcap: float | None):
    """Gradients of the keys and values; early blocks, which most queries see, start first."""
    window_ref, sink_ref, query_ref, key_ref, value_ref, out_ref, lse_ref, delta_ref = refs[:8]
    *segment_ref, key_result_ref, value_result_ref = refs[8:]
    kv_heads, length = key_ref.shape[1:3]
    b, kv_head = jax.lax.div(pl.program_id(1), kv_heads), jax.lax.rem(pl.program_id(1), kv_heads)
    column_start = pl.program_id(0) * block_k
    mine = pl.ds(column_start, block_k)
    key, value = key_ref[b, kv_head, mine, :], value_ref[b, kv_head, mine, :]
    segment_ref = segment_ref[0] if segment_ref else None

    def of_head(member, sums):
        head = kv_head * group + member
        window, sink = window_ref[head], sink_ref[head]

        def step(number, sums):
            key_sum, value_sum = sums
            row_start = number * block_q
            queries = pl.ds(row_start, block_q)
            query, out = query_ref[b, head, queries, :], out_ref[b, head, queries, :]
            scores = capped(product(key, query, ROW_BY_ROW) * scale, softcap)
            visible = _visible(
                row_start, column_start, (block_q, block_k), (window, sink), segment_ref, b, transposed=True
            )
            lse, delta = lse_ref[b, head, queries][None, :], delta_ref[b, head, queries][None, :]
            probabilities = jnp.where(visible, jnp.exp(scores - lse), 0)
            drift = product(value, out, ROW_BY_ROW)
            gradient = score_gradient(probabilities, drift, delta, scores, scale, softcap)
            return key_sum + product(gradient, query), value_sum + product(probabilities, out)

        first = jax.lax.div(column_start, block_q)
        whole = length // block_q
        near = jnp.where(window > 0, pl.cdiv(column_start + block_k - 1 + window, block_q), first)
        end = jnp.where(column_start < sink, whole, jnp.minimum(near, whole))
        return jax.lax.fori_loop(first, end, step, sums)

    nothing = jnp.zeros(key.shape, jnp.float32)
    key_sum, value_sum = jax.lax.fori_loop(0, group, of_head, (nothing, nothing))
    key_result_ref[b, kv_head, mine, :] = key_sum.astype(key_result_ref.dtype)
    value_result_ref[b, kv_head, mine, :] = value_sum.astype(value_result_ref.dtype)


def _side(query: jax.Array, greatest: int) -> int:
    """A power of two that is not much longer than the sequence, half as long where numbers or rows are long."""
    halvings = (query.dtype == jnp.float32) + (query.shape[3] * query.dtype.itemsize > 256)
    greatest = max(_LEAST, greatest >> halvings)
    return min(greatest, max(_LEAST, 1 << (query.shape[2] - 1).bit_length()))


def _parameters(query: jax.Array, stages: int) -> plgpu.CompilerParams:
    """With fewer threads, larger tiles do not fit into registers."""
    small = query.dtype != jnp.float32 and query.shape[3] <= 64
    return plgpu.CompilerParams(num_warps=4 if small else 8, num_stages=stages)


def _padded(sides: tuple[int, int], *arrays: jax.Array) -> list[jax.Array]:
    """Axis 2 up to a multiple of the sides. No query sees the keys behind it, and no query behind it is kept."""
    size = -(-arrays[0].shape[2] // max(sides)) * max(sides)
    return [pad_axis(x, 2, size) for x in arrays]


def _segments(segments: jax.Array | None, size: int) -> list[jax.Array]:
    return [] if segments is None else [pad_axis(segments.astype(jnp.int32), 1, size)]


def _order(window: jax.Array, sink: jax.Array, length: int) -> jax.Array:
    """Heads, those with most visible keys first."""
    return jnp.argsort(-jnp.minimum(window + sink, length)).astype(jnp.int32)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    segments: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    block: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, L, d] and log-sum-exp float32 [B, H, L]; `block` is a power of two, None chooses."""
    batch, heads, length, dim = query.shape
    sides = (block, block) if block else (_side(query, BLOCK_Q), _side(query, BLOCK))
    group = heads // key.shape[1]
    query, key, value = _padded(sides, query, key, value)
    size = query.shape[2]
    out, lse = pl.pallas_call(
        functools.partial(
            _forward_kernel, group=group, block_q=sides[0], block_k=sides[1], scale=scale, softcap=softcap
        ),
        grid=(size // sides[0], batch * heads),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ],
        compiler_params=_parameters(query, 3),
        interpret=interpret,
        name="span_attention",
    )(_order(window, sink, length), window, sink, query, key, value, *_segments(segments, size))
    return out[:, :, :length], lse[:, :, :length]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array,
    sink: jax.Array,
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
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    side = block or _side(query, BLOCK)
    query, key, value, gradient, lse, delta = _padded((side, side), query, key, value, gradient, lse, delta)
    size = query.shape[2]
    options = dict(group=heads // kv_heads, block_q=side, block_k=side, scale=scale, softcap=softcap)
    operands = (window, sink, query, key, value, gradient, lse, delta, *_segments(segments, size))
    parameters = _parameters(query, 2)
    query_gradient = pl.pallas_call(
        functools.partial(_query_kernel, **options),
        grid=(size // side, batch * heads),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=parameters,
        interpret=interpret,
        name="span_attention_query_gradient",
    )(_order(window, sink, length), *operands)
    key_gradient, value_gradient = pl.pallas_call(
        functools.partial(_key_kernel, **options),
        grid=(size // side, batch * kv_heads),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        compiler_params=parameters,
        interpret=interpret,
        name="span_attention_key_gradient",
    )(*operands)
    return tuple(x[:, :, :length] for x in (query_gradient, key_gradient, value_gradient))
