"""The product with coded ternary weights on GPU (Pallas, Triton).

A program has one token and `ROWS` rows, which walk through their words side by side: a word of each is looked up in the
table, which stays in the second-level cache, its symbols select the row's values, and 28 neighbours of x, from where
the row has come to, are multiplied.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.common import pad_axis
from kernels_pallas.qmoe_decode.coded import Coded
from kernels_pallas.qmoe_decode.dictionary import LONGEST, PAIRS, table

ROWS, LANES = 32, 32


def _kernel(starts_ref, stops_ref, low_ref, high_ref, codes_ref, table_ref, x_ref, out_ref):
    """starts, stops, low, high [ROWS], codes [n], table [2 WORDS], x [in] -> out [ROWS]."""
    first, last = starts_ref[...], stops_ref[...]
    low, high = low_ref[...][:, None], high_ref[...][:, None]
    lane = jnp.arange(LANES)[None, :]
    second = lane >= PAIRS
    shift = jnp.where(lane < LONGEST, 4 + 2 * (lane - PAIRS * second), 0).astype(jnp.uint32)

    def step(number, carry):
        place, total = carry
        active = first + number < last
        code = plgpu.load(codes_ref.at[first + number], mask=active, other=0).astype(jnp.int32)
        words = [plgpu.load(table_ref.at[2 * code + i], mask=active, other=0) for i in range(2)]
        half = jnp.where(second, words[1][:, None], words[0][:, None])
        symbol = jnp.where(lane < LONGEST, (half >> shift) & 3, 0)
        x = plgpu.load(x_ref.at[place[:, None] + lane], mask=symbol > 0, other=0).astype(jnp.float32)
        total += jnp.where(symbol == 2, high, jnp.where(symbol == 1, low, 0.0)) * x
        return place + 2 * (words[0] & 15).astype(jnp.int32), total

    start = (jnp.zeros((ROWS,), jnp.int32), jnp.zeros((ROWS, LANES), jnp.float32))
    _, total = jax.lax.fori_loop(0, jnp.max(last - first), step, start)
    out_ref[...] = jnp.sum(total, axis=1).astype(out_ref.dtype)


def forward(x: jax.Array, weights: Coded, *, interpret: Any = False) -> jax.Array:
    """x [M, in] -> [M, out]."""
    rows, padded = weights.shape[0], -(-weights.shape[0] // ROWS) * ROWS
    last = weights.offsets[-1]
    starts, stops = (pad_axis(part, 0, padded) for part in (weights.offsets[:-1], weights.offsets[1:]))
    starts = jnp.where(jnp.arange(padded) < rows, starts, last)
    stops = jnp.where(jnp.arange(padded) < rows, stops, last)
    low, high = (pad_axis(weights.ends[:, i].astype(jnp.float32), 0, padded) for i in range(2))
    dictionary = jnp.asarray(table().reshape(-1))
    of_rows = pl.BlockSpec((ROWS,), lambda m, r: (r,))

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda m, r: (0,) * array.ndim)

    out = pl.pallas_call(
        _kernel,
        grid=(x.shape[0], padded // ROWS),
        in_specs=[of_rows] * 4
        + [whole(weights.codes), whole(dictionary), pl.BlockSpec((None, x.shape[1]), lambda m, r: (m, 0))],
        out_specs=pl.BlockSpec((None, ROWS), lambda m, r: (m, r)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], padded), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=2),
        interpret=interpret,
        name="qmoe_decode",
    )(starts, stops, low, high, weights.codes, dictionary, x)
    return out[:, :rows]
