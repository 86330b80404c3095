"""The quantized product on TPU (Pallas, Mosaic).

The grid is (rows of x, columns, tiles of packed rows), the last one summed up in a scratch. A plane of a tile becomes
whole numbers, exact in bfloat16, by one shift and one mask. The scale and zero of a group are applied to its product,
    (x_g q_g - sum(x_g) zero) scale,
and not to the weights, of which there are more. The gradient goes the other way with the same tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import Unsupported, pad_axis, precision_of
from kernels_pallas.quantized_matmul.packing import Packed

_ROWS = 256  # the most rows of x in a block
_COLUMNS = (512, 256, 128)  # of the weights
_SEMANTICS = ("parallel", "parallel", "arbitrary")


def check(weights: Packed) -> None:
    """Raises `Unsupported` for weights that the kernels cannot read."""
    if weights.group % 8:
        raise Unsupported(f"groups of {weights.group} rows: the tpu kernel takes multiples of 8")
    _column_block(weights.shape[1])


def _column_block(columns: int) -> int:
    for block in _COLUMNS:
        if columns % block == 0:
            return block
    if columns < _COLUMNS[0]:
        return columns
    raise Unsupported(
        f"{columns} columns: the tpu kernel takes multiples of {_COLUMNS[-1]}, or fewer than 512"
    )


def _row_block(rows: int, dtype: jnp.dtype) -> int:
    """Rows of x in a block: equal blocks of at most `_ROWS`."""
    least = 8 if dtype == jnp.float32 else 16
    blocks = -(-rows // _ROWS)
    return -(-rows // (blocks * least)) * least


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=precision_of(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _groups(codes_ref, bits: int, group: int, dtype: jnp.dtype):
    """(number, codes [group, n]) of the groups of a tile, in the order of its rows."""
    codes = codes_ref[...].astype(jnp.int32)
    for plane in range(8 // bits):
        values = (codes >> (bits * plane)) & (2**bits - 1)
        values = values.astype(jnp.float32).astype(dtype)
        each = values.shape[0] // group
        for i in range(each):
            yield plane * each + i, values[i * group : (i + 1) * group]


def _forward_kernel(x_ref, codes_ref, scale_ref, zero_ref, out_ref, total_ref, *, bits: int, group: int):
    """x [m, tile], codes [tile bits / 8, n], scale and zero [tile / group, n] -> out [m, n]."""
    step = pl.program_id(2)
    total = jnp.where(step == 0, 0.0, total_ref[...])
    for number, codes in _groups(codes_ref, bits, group, x_ref.dtype):
        x = x_ref[:, number * group : (number + 1) * group]
        scale, zero = (ref[number : number + 1].astype(jnp.float32) for ref in (scale_ref, zero_ref))
        rest = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True) * zero
        total = total + (_dot(x, codes, 0) - rest) * scale
    total_ref[...] = total

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _backward_kernel(d_out_ref, codes_ref, scale_ref, zero_ref, dx_ref, total_ref, *, bits: int, group: int):
    """d_out [m, n], codes, scale and zero as above -> dx [m, tile], summed up over the columns n."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    d_out = d_out_ref[...].astype(jnp.float32)
    for number, codes in _groups(codes_ref, bits, group, d_out_ref.dtype):
        scale, zero = (ref[number : number + 1].astype(jnp.float32) for ref in (scale_ref, zero_ref))
        scaled = (d_out * scale).astype(d_out_ref.dtype)
        rest = jnp.sum(scaled.astype(jnp.float32) * zero, axis=1, keepdims=True)
        total_ref[:, number * group : (number + 1) * group] += _dot(scaled, codes, 1) - rest

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dx_ref[...] = total_ref[...].astype(dx_ref.dtype)


def _by_tile(array: jax.Array, weights: Packed) -> jax.Array:
    """[padded / group, N] -> [tiles, tile / group, N], so that any number of groups makes a block."""
    return array.reshape(-1, weights.tile // weights.group, array.shape[1])


def forward(x: jax.Array, weights: Packed, *, interpret: Any = False) -> jax.Array:
    """x [M, padded] -> [M, N]."""
    rows, columns = x.shape[0], weights.shape[1]
    m, n, tile = _row_block(rows, x.dtype), _column_block(columns), weights.tile
    x = pad_axis(x, 0, -(-rows // m) * m)
    groups = pl.BlockSpec((None, tile // weights.group, n), lambda i, j, k: (k, 0, j))
    out = pl.pallas_call(
        functools.partial(_forward_kernel, bits=weights.bits, group=weights.group),
        grid=(x.shape[0] // m, columns // n, weights.padded // tile),
        in_specs=[
            pl.BlockSpec((m, tile), lambda i, j, k: (i, k)),
            pl.BlockSpec((weights.plane, n), lambda i, j, k: (k, j)),
            groups,
            groups,
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=_SEMANTICS),
        interpret=interpret,
        name="quantized_matmul",
    )(x, weights.codes, _by_tile(weights.scale, weights), _by_tile(weights.zero, weights))
    return out[:rows]


def backward(d_out: jax.Array, weights: Packed, *, interpret: Any = False) -> jax.Array:
    """d_out [M, N] -> dx [M, padded]."""
    rows, columns = d_out.shape
    m, n, tile = _row_block(rows, d_out.dtype), _column_block(columns), weights.tile
    d_out = pad_axis(d_out, 0, -(-rows // m) * m)
    groups = pl.BlockSpec((None, tile // weights.group, n), lambda i, k, j: (k, 0, j))
    dx = pl.pallas_call(
        functools.partial(_backward_kernel, bits=weights.bits, group=weights.group),
        grid=(d_out.shape[0] // m, weights.padded // tile, columns // n),
        in_specs=[
            pl.BlockSpec((m, n), lambda i, k, j: (i, j)),
            pl.BlockSpec((weights.plane, n), lambda i, k, j: (k, j)),
            groups,
            groups,
        ],
        out_specs=pl.BlockSpec((m, tile), lambda i, k, j: (i, k)),
        out_shape=jax.ShapeDtypeStruct((d_out.shape[0], weights.padded), d_out.dtype),
        scratch_shapes=[pltpu.VMEM((m, tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=_SEMANTICS),
        interpret=interpret,
        name="quantized_matmul_gradient",
    )(d_out, weights.codes, _by_tile(weights.scale, weights), _by_tile(weights.zero, weights))
    return dx[:rows]
