"""The quantized product on GPU (Pallas, Triton).

A program takes a block of rows of x and of columns and goes through the packed rows, some of a plane at a time. With
few rows of x there are too few such blocks to fill the device, so the tiles of packed rows are split over programs,
and the splits are added up outside. Scales and zeros are applied to products, as on TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.common import Unsupported, pad_axis, precision_of
from kernels_pallas.quantized_matmul.packing import Packed

_ROWS = 64  # the most rows of x in a block
_COLUMNS = 64  # the most columns of a block
_STEP = 64  # the most packed rows that are unpacked at once
_PROGRAMS = 256  # about two for each multiprocessor of a large device
_LEAST = 16  # a tensor core's smallest side


def check(weights: Packed) -> None:
    """Raises `Unsupported` for weights that the kernels cannot read."""
    if weights.group < _LEAST or weights.group & (weights.group - 1):
        raise Unsupported(
            f"groups of {weights.group} rows: the gpu kernel takes powers of two from {_LEAST} on"
        )
    if weights.shape[1] % _LEAST:
        raise Unsupported(f"{weights.shape[1]} columns: the gpu kernel takes multiples of {_LEAST}")


def _row_block(rows: int) -> int:
    return min(_ROWS, max(_LEAST, 1 << (rows - 1).bit_length()))


def _column_block(columns: int) -> int:
    """The greatest power of two that divides them."""
    return min(_COLUMNS, columns & -columns)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=precision_of(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _codes(packed: jax.Array, bits: int, plane: int, dtype: jnp.dtype) -> jax.Array:
    return ((packed >> (bits * plane)) & (2**bits - 1)).astype(jnp.float32).astype(dtype)


def _forward_kernel(
    x_ref, codes_ref, scale_ref, zero_ref, out_ref, *, weights: Packed, step: int, tiles: int
):
    """x [m, padded], codes [padded bits / 8, n], scale and zero [padded / group, n] -> out float32[m, n], of `tiles`
    tiles from this split's first on."""
    each = weights.plane // step
    first = pl.program_id(2) * tiles * each

    def body(i, total):
        tile, inside = jax.lax.div(i, each), jax.lax.rem(i, each)
        packed = codes_ref[pl.ds(i * step, step), :].astype(jnp.int32)
        for plane in range(weights.planes):
            at = tile * weights.tile + plane * weights.plane + inside * step
            group = jax.lax.div(at, weights.group)
            x = x_ref[:, pl.ds(at, step)]
            scale, zero = (ref[group, :].astype(jnp.float32)[None, :] for ref in (scale_ref, zero_ref))
            rest = jnp.sum(x.astype(jnp.float32), axis=1)[:, None] * zero
            codes = _codes(packed, weights.bits, plane, x.dtype)
            total = total + (_dot(x, codes, 0) - rest) * scale
        return total

    out_ref[...] = jax.lax.fori_loop(first, first + tiles * each, body, jnp.zeros(out_ref.shape, jnp.float32))


def _backward_kernel(d_out_ref, codes_ref, scale_ref, zero_ref, dx_ref, *, weights: Packed, n: int):
    """d_out [m, N], codes [step, N], scale and zero [padded / group, N] -> dx [m, padded], of it the columns that the
    `step` packed rows of this program stand for."""
    step, columns = codes_ref.shape
    each = weights.plane // step
    tile, inside = jax.lax.div(pl.program_id(1), each), jax.lax.rem(pl.program_id(1), each)
    places = [tile * weights.tile + plane * weights.plane + inside * step for plane in range(weights.planes)]

    def body(j, totals):
        block = pl.ds(j * n, n)
        d_out = d_out_ref[:, block].astype(jnp.float32)
        packed = codes_ref[:, block].astype(jnp.int32)
        added = []
        for plane, (at, total) in enumerate(zip(places, totals, strict=True)):
            group = jax.lax.div(at, weights.group)
            scale, zero = (ref[group, block].astype(jnp.float32)[None, :] for ref in (scale_ref, zero_ref))
            scaled = (d_out * scale).astype(d_out_ref.dtype)
            rest = jnp.sum(scaled.astype(jnp.float32) * zero, axis=1)[:, None]
            codes = _codes(packed, weights.bits, plane, scaled.dtype)
            added.append(total + _dot(scaled, codes, 1) - rest)
        return tuple(added)

    nothing = jnp.zeros((d_out_ref.shape[0], step), jnp.float32)
    totals = jax.lax.fori_loop(0, columns // n, body, (nothing,) * weights.planes)
    for at, total in zip(places, totals, strict=True):
        dx_ref[:, pl.ds(at, step)] = total.astype(dx_ref.dtype)


def _whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _static(weights: Packed) -> Packed:
    """The sizes alone: a kernel must not hold arrays."""
    shapes = (
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in (weights.codes, weights.scale, weights.zero)
    )
    return Packed(*shapes, weights.bits, weights.group, weights.tile, weights.rows)


def forward(x: jax.Array, weights: Packed, *, interpret: Any = False) -> jax.Array:
    """x [M, padded] -> [M, N]."""
    rows, columns = x.shape[0], weights.shape[1]
    m, n = _row_block(rows), _column_block(columns)
    x = pad_axis(x, 0, -(-rows // m) * m)
    blocks = x.shape[0] // m * (columns // n)
    tiles = weights.padded // weights.tile
    wanted = min(tiles, -(-_PROGRAMS // blocks))
    splits = next(splits for splits in range(wanted, tiles + 1) if tiles % splits == 0)
    groups = pl.BlockSpec((weights.padded // weights.group, n), lambda i, j, s: (0, j))
    parts = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            weights=_static(weights),
            step=min(_STEP, weights.group),
            tiles=tiles // splits,
        ),
        grid=(x.shape[0] // m, columns // n, splits),
        in_specs=[
            pl.BlockSpec((m, weights.padded), lambda i, j, s: (i, 0)),
            pl.BlockSpec((weights.codes.shape[0], n), lambda i, j, s: (0, j)),
            groups,
            groups,
        ],
        out_specs=pl.BlockSpec((None, m, n), lambda i, j, s: (s, i, j)),
        out_shape=jax.ShapeDtypeStruct((splits, x.shape[0], columns), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="quantized_matmul",
    )(x, weights.codes, weights.scale, weights.zero)
    return jnp.sum(parts, axis=0)[:rows].astype(x.dtype)


def backward(d_out: jax.Array, weights: Packed, *, interpret: Any = False) -> jax.Array:
    """d_out [M, N] -> dx [M, padded]."""
    rows, columns = d_out.shape
    m, n, step = _row_block(rows), _column_block(columns), min(_STEP, weights.group)
    d_out = pad_axis(d_out, 0, -(-rows // m) * m)
    dx = pl.pallas_call(
        functools.partial(_backward_kernel, weights=_static(weights), n=n),
        grid=(d_out.shape[0] // m, weights.codes.shape[0] // step),
        in_specs=[
            pl.BlockSpec((m, columns), lambda i, k: (i, 0)),
            pl.BlockSpec((step, columns), lambda i, k: (k, 0)),
            _whole(weights.scale),
            _whole(weights.zero),
        ],
        out_specs=pl.BlockSpec((m, weights.padded), lambda i, k: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((d_out.shape[0], weights.padded), d_out.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="quantized_matmul_gradient",
    )(d_out, weights.codes, weights.scale, weights.zero)
    return dx[:rows]
