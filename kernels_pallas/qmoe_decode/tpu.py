"""The product with coded ternary weights on TPU (Pallas, Mosaic).

The table and the activations stay in vector memory; the codes of a few rows come to scalar memory, two in a word of 32
bits. Rows are decoded one after the other: a code's row of the table holds 64 words side by side, of which a sum under
a mask takes the right one; its symbols go to 28 lanes, and meet the activations there, which are rotated to where the
row has come to. Tokens lie along the sublanes, and `ROWS` outputs along the lanes of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import pad_axis
from kernels_pallas.qmoe_decode.coded import Coded
from kernels_pallas.qmoe_decode.dictionary import LONGEST, PAIRS, table

ROWS, FEW, LANES = 128, 8, 128


def _kernel(counts_ref, codes_ref, low_ref, high_ref, table_ref, x_ref, out_ref, *, tokens: int):
    """counts int32[1, ROWS] and codes int32[FEW, half] in scalar memory; low, high [1, ROWS], table int32[1024, 128],
    x float32[tokens, in + 256] -> FEW columns of out [tokens, ROWS]."""
    first = pl.program_id(1) * FEW
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    second = lane >= PAIRS
    shift = jnp.where(lane < LONGEST, 4 + 2 * (lane - jnp.where(second, PAIRS, 0)), 0)

    def pick(row: jax.Array, place: jax.Array) -> jax.Array:
        """The entry of a row [1, LANES] in a lane, [1, 1]."""
        return jnp.sum(jnp.where(lane == place, row, 0), axis=1, keepdims=True)

    def one_row(r, out):
        low, high = pick(low_ref[...], first + r), pick(high_ref[...], first + r)

        def step(number, carry):
            place, total = carry
            both = codes_ref[r, number // 2]
            code = (both >> (16 * (number % 2))) & 0xFFFF
            entry = table_ref[pl.ds(code // 64, 1), :]
            words = [pick(entry, 2 * (code % 64) + i) for i in range(2)]
            half = jnp.where(second, words[1], words[0])
            symbol = jnp.where(lane < LONGEST, jax.lax.shift_right_logical(half, shift) & 3, 0)
            values = jnp.where(symbol == 2, high, jnp.where(symbol == 1, low, 0.0))
            base = pl.multiple_of(place // LANES * LANES, LANES)
            window = x_ref[:, pl.ds(base, 2 * LANES)]
            window = pltpu.roll(window, 2 * LANES - place % LANES, 1)[:, :LANES]
            return place + 2 * (words[0][0, 0] & 15), total + values * window

        start = (jnp.int32(0), jnp.zeros((tokens, LANES), jnp.float32))
        _, total = jax.lax.fori_loop(0, counts_ref[0, first + r], step, start)
        return jnp.where(lane == first + r, jnp.sum(total, axis=1, keepdims=True), out)

    @pl.when(first == 0)
    def _():
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    out_ref[...] = jax.lax.fori_loop(0, FEW, one_row, out_ref[...])


def forward(x: jax.Array, weights: Coded, *, interpret: Any = False) -> jax.Array:
    """x [M, in] -> [M, out]."""
    (count, width), rows = x.shape, weights.shape[0]
    blocks, tokens = -(-rows // ROWS), -(-count // 8) * 8
    counts = pad_axis(jnp.diff(weights.offsets), 0, blocks * ROWS).reshape(blocks, 1, ROWS)
    # A row has at most a word for every two weights: pairs of codes, in a rectangle of that many.
    half = -(-width // 4)
    place = weights.offsets[:-1, None] + jnp.arange(2 * half)
    codes = jnp.take(weights.codes, place, mode="clip").astype(jnp.int32).reshape(rows, half, 2)
    codes = pad_axis(codes[..., 0] | codes[..., 1] << 16, 0, blocks * ROWS)
    low, high = (pad_axis(weights.ends[:, i].astype(jnp.float32), 0, blocks * ROWS)[None] for i in range(2))
    padded = -(-width // LANES) * LANES + 2 * LANES
    x_padded = pad_axis(pad_axis(x.astype(jnp.float32), 1, padded), 0, tokens)
    dictionary = jax.lax.bitcast_convert_type(jnp.asarray(table()), jnp.int32).reshape(-1, LANES)
    of_rows = pl.BlockSpec((1, ROWS), lambda r, i: (0, r))
    out = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens),
        grid=(blocks, ROWS // FEW),
        in_specs=[
            pl.BlockSpec((None, 1, ROWS), lambda r, i: (r, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((FEW, half), lambda r, i: (r * (ROWS // FEW) + i, 0), memory_space=pltpu.SMEM),
            of_rows,
            of_rows,
            pl.BlockSpec(dictionary.shape, lambda r, i: (0, 0)),
            pl.BlockSpec(x_padded.shape, lambda r, i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((tokens, ROWS), lambda r, i: (0, r)),
        out_shape=jax.ShapeDtypeStruct((tokens, blocks * ROWS), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="qmoe_decode",
    )(counts, codes, low, high, dictionary, x_padded)
    return out[:count, :rows].astype(x.dtype)
