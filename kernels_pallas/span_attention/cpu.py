"""Span attention on a CPU, forward and backward, without a matrix of scores in memory (flash attention, arXiv
2205.14135).

Heads lie as projections leave them, [B, L, H, d]. A piece forward is a section of a head's queries; backward it is a
key head with all its query heads, so that whoever computes it owns its gradients: nothing is added up between threads,
and a row has the same bits alone and among others.

Keys come in chunks that stay in the processor's cache, copied into the orders in which products read them. Forward, for
a tile of queries and the keys of a chunk that it sees,

    s = q k;  top' = max(top, max s);  p = 2^(s - top')
    total' = 2^(top - top') total + sum p;  out' = 2^(top - top') out + p v

where q holds the scale and log2(e), and at the end out / total. `top` and 1 / total are kept. Backward, for a block of
queries, with g the output's gradient over `total` and delta = g . out,

    p = 2^(q k - top);  ds = p (g v - delta);  dq += ds k;  dk += ds^T q;  dv += p^T g
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import cpu
from kernels_pallas.span_attention import cpu_pieces, cpu_tiles
from kernels_pallas.span_attention.cpu_tiles import Sizes

WIDEST = 256  # numbers of a head: what a thread keeps at once lies on its stack
# Keys of a chunk at most, and floats of a copy of it: there are two copies forward, and five backward.
_FORWARD, _BACKWARD = (256, 1 << 14), (128, 1 << 13)
_SHARE = 1 << 20  # multiply-adds of a product below which another thread does not pay

lanes = cpu.lanes


def _execute(sizes: Sizes, backward: bool) -> str:
    f = sizes.function("execute", "ptr %frame")
    query, key = (f.array("%frame", i) for i in (0, 1))
    batch, length, heads = query.dims(3)
    if backward:
        pieces = f.mul(batch, key.dim(2))
    else:
        rows = f.mul(batch, heads)
        pieces = f.mul(rows, f.ceil(length, cpu_pieces.SECTION))
    work = f.mul(f.mul(f.mul(batch, heads), f.mul(length, length)), sizes.dim)
    f.call("share", "ptr @piece", "ptr %frame", f"i64 {pieces}", f"i64 {f.div(work, _SHARE)}", "i64 0")
    return f.text()


@functools.cache
def kernel(backward: bool, dim: int, lanes: int, capped: bool, segmented: bool) -> cpu.Kernel:
    """The code for heads of `dim` and vectors of so many floats, with a soft cap, with segments."""
    unit, (most, floats) = cpu_pieces.BLOCK, _BACKWARD if backward else _FORWARD
    sizes = Sizes(dim, lanes, max(unit, min(most, floats // dim // unit * unit)))
    make = cpu_pieces.backward if backward else cpu_pieces.forward
    code = [cpu_tiles.functions(sizes), make(sizes, capped, segmented), _execute(sizes, backward)]
    name = f"lathe_span_attention_{'backward' if backward else 'forward'}_{dim}_{lanes}"
    return cpu.Kernel(name + "_capped" * capped + "_segmented" * segmented, "\n\n".join(code))


@functools.cache
def _register(*which) -> str:
    return kernel(*which).register()


def span_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    segments: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Arguments as in the api, float32, `window` and `sink` int32[H].

    Where the arguments come from [B, L, H, d] by swapping axes, and the result goes back, nothing is moved in memory.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return _attention(query, key, value, window, sink, segments, scale, softcap).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(query, key, value, window, sink, segments, scale, softcap):
    """query, key and value [B, L, heads, d] -> [B, L, H, d]."""
    return _forward_pass(query, key, value, window, sink, segments, scale, softcap)[0]


def _forward_pass(query, key, value, window, sink, segments, scale, softcap):
    batch, length, heads, _ = query.shape
    line = jax.ShapeDtypeStruct((batch, heads, length), query.dtype)
    results = (jax.ShapeDtypeStruct(query.shape, query.dtype), line, line)
    operands = (query, key, value, window, sink)
    out, *saved = _call(False, results, operands, (), segments, scale, softcap)
    return out, (*operands, segments, out, *saved)


def _backward_pass(scale, softcap, saved, gradient):
    *operands, segments, out, top, inverse = saved
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3])
    gradients = _call(True, results, operands, (out, top, inverse, gradient), segments, scale, softcap)
    integers = (
        None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in (*operands[3:], segments)
    )
    return *gradients, *integers


_attention.defvjp(_forward_pass, _backward_pass)


def _call(backward, results, operands, saved, segments, scale, softcap):
    name = _register(backward, operands[0].shape[3], lanes(), softcap is not None, segments is not None)
    labels = () if segments is None else (segments.astype(jnp.int32),)
    call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return call(*operands, _numbers(scale, softcap), *saved, *labels)


def _numbers(scale: float, softcap: float | None) -> jax.Array:
    """What queries are multiplied with, as scores are powers of two; c, where c scores = 2 log2(e) scores / softcap;
    the soft cap of such scores; and what gradients of queries are multiplied with."""
    cap = softcap or 1.0
    return jnp.asarray([scale / math.log(2), 2 / cap, cap / math.log(2), scale], jnp.float32)
