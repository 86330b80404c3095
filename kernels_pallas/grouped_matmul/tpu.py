"""The grouped product on TPU (Pallas, Mosaic).

The grid of the product is (columns, steps of the schedule, features). A tile of rows that two groups share is an output
block that is visited twice in a row: each visit stores its own rows and keeps the others. In the gradient of the
matrices the steps come last, so that the rows of a group are summed up in a scratch and stored once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import Unsupported, precision_of
from kernels_pallas.grouped_matmul.common import divisor, schedule

_LANES = 128


def check(features: int, columns: int) -> None:
    """Raises `Unsupported` for matrices that the kernels cannot cut into blocks."""
    for name, size in {"features": features, "columns": columns}.items():
        _block(size, jnp.float32, name)


def _block(size: int, dtype: jnp.dtype, name: str = "size") -> int:
    """Features or columns of a block: as many as leave room for double buffers."""
    most = 512 if dtype == jnp.float32 else 1024
    block = divisor(size, most, _LANES)
    if block is None and size > most:
        raise Unsupported(f"{size} {name}: the tpu kernel takes multiples of {_LANES}, or at most {most}")
    return block or size


def _row_tile(rows: int, experts: int, dtype: jnp.dtype) -> int:
    """Few rows a group: small tiles, of which a boundary wastes less. All rows, if they fit in one."""
    least = 8 if dtype == jnp.float32 else 16
    tile = next((tile for tile in (512, 256) if rows // experts >= 2 * tile), 128)
    return min(tile, -(-rows // least) * least)


def _rows_of_group(ref_offsets, group, start, size: int) -> jax.Array:
    """bool [size, 1]: which rows of the tile at `start` are the group's."""
    row = start + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (row >= ref_offsets[group]) & (row < ref_offsets[group + 1])


def _product_kernel(
    group_ref,
    weight_ref,
    tile_ref,
    offsets_ref,
    count_ref,
    x_ref,  # [m, k]
    matrix_ref,  # [k, n], or [n, k] if transposed
    out_ref,  # [m, n]
    total_ref,
    *,
    experts: int,
    transposed: bool,
):
    step, k = pl.program_id(1), pl.program_id(2)
    group = group_ref[step]
    needed = step < count_ref[0]

    @pl.when(k == 0)
    def _():
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(needed & (group < experts))
    def _():
        x = x_ref[...]
        total_ref[...] += jax.lax.dot_general(
            x,
            matrix_ref[...].astype(x.dtype),
            (((1,), (1 if transposed else 0,)), ((), ())),
            precision=precision_of(x.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when(needed & (k == pl.num_programs(2) - 1))
    def _():
        size = x_ref.shape[0]
        mine = _rows_of_group(offsets_ref, group, tile_ref[step] * size, size)
        # In 32 bits, because not every TPU selects among 16-bit values.
        kept = jnp.where(mine, total_ref[...], out_ref[...].astype(jnp.float32))
        out_ref[...] = kept.astype(out_ref.dtype)


def product(
    x: jax.Array, weights: jax.Array, sizes: jax.Array, *, transposed: bool = False, interpret: Any = False
) -> jax.Array:
    """x [M, K] times weights [E, K, N] -> [M, N]; `transposed`: x [M, N] times their transposes -> [M, K]."""
    rows, features = x.shape
    experts, columns = weights.shape[0], weights.shape[1 if transposed else 2]
    m = _row_tile(rows, experts, x.dtype)
    wide = jnp.promote_types(x.dtype, weights.dtype)
    k, n = _block(features, wide), _block(columns, wide)
    steps = schedule(sizes, rows, m, gradient=False)
    last = features // k - 1

    def feature(s, f, count):  # a step without work fetches nothing
        return jnp.where(s < count[0], f, last)

    def of_matrix(j, s, f, group, weight, tile, offsets, count):
        f = feature(s, f, count)
        return (weight[s], j, f) if transposed else (weight[s], f, j)

    return pl.pallas_call(
        functools.partial(_product_kernel, experts=experts, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(columns // n, steps.tile.shape[0], features // k),
            in_specs=[
                pl.BlockSpec(
                    (m, k),
                    lambda j, s, f, group, weight, tile, offsets, count: (tile[s], feature(s, f, count)),
                ),
                pl.BlockSpec((None, n, k) if transposed else (None, k, n), of_matrix),
            ],
            out_specs=pl.BlockSpec((m, n), lambda j, s, f, group, weight, tile, offsets, count: (tile[s], j)),
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul",
    )(*steps, x, weights)


def _gradient_kernel(
    group_ref,
    weight_ref,
    tile_ref,
    offsets_ref,
    count_ref,
    x_ref,  # [m, k]
    d_out_ref,  # [m, n]
    out_ref,  # [k, n]
    total_ref,
):
    step, steps = pl.program_id(2), pl.num_programs(2)
    group = group_ref[step]
    needed = step < count_ref[0]

    @pl.when((step == 0) | (group != group_ref[jnp.maximum(step - 1, 0)]))
    def _():
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(needed & (offsets_ref[group + 1] > offsets_ref[group]))
    def _():
        size = x_ref.shape[0]
        mine = _rows_of_group(offsets_ref, group, tile_ref[step] * size, size)
        # Rows of others are 0 in both: behind the array they may be anything, also NaN.
        x, d_out = (
            jnp.where(mine, ref[...].astype(jnp.float32), 0.0).astype(ref.dtype) for ref in (x_ref, d_out_ref)
        )
        total_ref[...] += jax.lax.dot_general(
            x,
            d_out,
            (((0,), (0,)), ((), ())),
            precision=precision_of(x.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when((step == steps - 1) | (group != group_ref[jnp.minimum(step + 1, steps - 1)]))
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def weights_gradient(
    x: jax.Array, d_out: jax.Array, sizes: jax.Array, dtype: jnp.dtype, *, interpret: Any = False
) -> jax.Array:
    """x [M, K], d_out [M, N] -> [E, K, N] in `dtype`: x^T d_out of every group's rows, summed up in float32."""
    rows, features = x.shape
    experts, columns = sizes.shape[0], d_out.shape[1]
    m = _row_tile(rows, experts, x.dtype)
    k, n = _block(features, jnp.float32), _block(columns, jnp.float32)
    steps = schedule(sizes, rows, m, gradient=True)
    return pl.pallas_call(
        _gradient_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(features // k, columns // n, steps.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((m, k), lambda i, j, s, group, weight, tile, offsets, count: (tile[s], i)),
                pl.BlockSpec((m, n), lambda i, j, s, group, weight, tile, offsets, count: (tile[s], j)),
            ],
            out_specs=pl.BlockSpec(
                (None, k, n), lambda i, j, s, group, weight, tile, offsets, count: (group[s], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((k, n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((experts, features, columns), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(*steps, x, d_out)
