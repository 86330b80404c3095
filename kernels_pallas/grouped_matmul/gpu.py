"""The grouped product on GPU (Pallas, Triton).

A program takes a step of the schedule and a block of columns, and goes through the features. Where two groups share a
tile of rows, two programs take it, and each stores the rows of its own group. In the gradient of the matrices a program
takes a block of one matrix and goes through the rows of its group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.common import Unsupported, pad_axis, precision_of
from kernels_pallas.grouped_matmul.common import divisor, schedule

_ROWS = 64  # the most rows of a tile
_FEATURES = 64  # of a step
_COLUMNS = 128  # of a block
_LEAST = 16  # a tensor core's smallest side


def check(features: int, columns: int) -> None:
    """Raises `Unsupported` for matrices that the kernels cannot cut into blocks."""
    for name, size in {"features": features, "columns": columns}.items():
        if size % _LEAST:
            raise Unsupported(f"{size} {name}: the gpu kernel takes multiples of {_LEAST}")


def _row_tile(rows: int, experts: int) -> int:
    """A power of two, about as many rows as a group has."""
    return min(_ROWS, max(_LEAST, 1 << (-(-rows // experts) - 1).bit_length()))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision_of(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _product_kernel(
    group_ref,  # [1]
    weight_ref,
    tile_ref,
    offsets_ref,  # [E + 2]
    count_ref,
    x_ref,  # [padded M, K]
    weights_ref,  # [E, K, N], or [E, N, K] if transposed
    out_ref,  # [padded M, N]
    *,
    m: int,
    k: int,
    n: int,
    experts: int,
    transposed: bool,
):
    group, weight = group_ref[0], weight_ref[0]
    needed = pl.program_id(0) < count_ref[0]
    start = tile_ref[0] * m
    rows, columns = pl.ds(start, m), pl.ds(pl.program_id(1) * n, n)

    def body(i, total):
        features = pl.ds(i * k, k)
        x = x_ref[rows, features]
        if transposed:
            return total + _dot(x, weights_ref[weight, columns, features].astype(x.dtype), (1, 1))
        return total + _dot(x, weights_ref[weight, features, columns].astype(x.dtype), (1, 0))

    steps = (needed & (group < experts)).astype(jnp.int32) * (x_ref.shape[1] // k)
    total = jax.lax.fori_loop(0, steps, body, jnp.zeros((m, n), jnp.float32))
    row = start + jnp.arange(m)
    mine = (row >= offsets_ref[group]) & (row < offsets_ref[group + 1]) & needed
    plgpu.store(
        out_ref.at[rows, columns], total.astype(out_ref.dtype), mask=jnp.broadcast_to(mine[:, None], (m, n))
    )


def product(
    x: jax.Array, weights: jax.Array, sizes: jax.Array, *, transposed: bool = False, interpret: Any = False
) -> jax.Array:
    """x [M, K] times weights [E, K, N] -> [M, N]; `transposed`: x [M, N] times their transposes -> [M, K]."""
    rows, features = x.shape
    experts, columns = weights.shape[0], weights.shape[1 if transposed else 2]
    m = _row_tile(rows, experts)
    k, n = divisor(features, _FEATURES, _LEAST), divisor(columns, _COLUMNS, _LEAST)
    x = pad_axis(x, 0, -(-rows // m) * m)
    steps = schedule(sizes, x.shape[0], m, gradient=False)
    one = pl.BlockSpec((1,), lambda s, j: (s,))
    out = pl.pallas_call(
        functools.partial(_product_kernel, m=m, k=k, n=n, experts=experts, transposed=transposed),
        grid=(steps.tile.shape[0], columns // n),
        in_specs=[one, one, one, _whole(steps.offsets), _whole(steps.count), _whole(x), _whole(weights)],
        out_specs=pl.BlockSpec((x.shape[0], columns), lambda s, j: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_matmul",
    )(*steps, x, weights)
    return out[:rows]


def _gradient_kernel(offsets_ref, x_ref, d_out_ref, out_ref, *, m: int):
    """offsets [E + 1], x [padded M, k], d_out [padded M, n] -> out [k, n] of the group of this program."""
    group = pl.program_id(0)
    begin, end = offsets_ref[group], offsets_ref[group + 1]

    def body(i, total):
        rows = pl.ds(i * m, m)
        row = i * m + jnp.arange(m)
        mine = ((row >= begin) & (row < end))[:, None]
        x = jnp.where(mine, x_ref[rows, :], 0)
        return total + _dot(x, jnp.where(mine, d_out_ref[rows, :], 0), (0, 0))

    steps = jnp.where(end > begin, pl.cdiv(end, m), 0)
    nothing = jnp.zeros(out_ref.shape, jnp.float32)
    total = jax.lax.fori_loop(jax.lax.div(begin, m), steps, body, nothing)
    out_ref[...] = total.astype(out_ref.dtype)


def weights_gradient(
    x: jax.Array, d_out: jax.Array, sizes: jax.Array, dtype: jnp.dtype, *, interpret: Any = False
) -> jax.Array:
    """x [M, K], d_out [M, N] -> [E, K, N] in `dtype`: x^T d_out of every group's rows, summed up in float32."""
    rows, features = x.shape
    experts, columns = sizes.shape[0], d_out.shape[1]
    m = _row_tile(rows, experts)
    k, n = divisor(features, _FEATURES, _LEAST), divisor(columns, _COLUMNS, _LEAST)
    padded = -(-rows // m) * m
    ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), rows)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return pl.pallas_call(
        functools.partial(_gradient_kernel, m=m),
        grid=(experts, features // k, columns // n),
        in_specs=[
            _whole(offsets),
            pl.BlockSpec((padded, k), lambda e, i, j: (0, i)),
            pl.BlockSpec((padded, n), lambda e, i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, k, n), lambda e, i, j: (e, i, j)),
        out_shape=jax.ShapeDtypeStruct((experts, features, columns), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(offsets, pad_axis(x, 0, padded), pad_axis(d_out, 0, padded))
