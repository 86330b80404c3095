"""The SSD scan on TPU (Pallas, Mosaic).

The grid is (row of the batch, group, chunk, heads of the group, a few at a time). States of all heads of the group stay
in a scratch from chunk to chunk, so B, C and C B^T serve all of them and no state travels to memory, unless a gradient
needs those before each chunk. x stays [T, H P]: heads of 64 channels are taken in pairs, which fill the 128 lanes. The
backward kernel runs over the chunks in reverse, with the states' gradients in the scratch.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import Unsupported
from kernels_pallas.ssd.common import CUM, END, START, between, dot

_LANES = 128
_SUBLANES = 16
_SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")


def chunk_of(chunk: int, x: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens of a chunk that are taken; raises `Unsupported` for what the kernel cannot compute."""
    if chunk % _SUBLANES:
        raise Unsupported(f"chunk={chunk}: the tpu kernel takes multiples of {_SUBLANES}")
    _heads_at_once(x, b)
    return min(chunk, -(-x[1] // _SUBLANES) * _SUBLANES)


def _heads_at_once(x: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many heads of a group make a block of x [b, T, H P] that the lanes can take."""
    heads, channels = x[2:]
    groups = b[2]
    least = _LANES // math.gcd(_LANES, channels)
    if heads // groups % least == 0:
        return least
    if groups == 1:
        return heads
    raise Unsupported(
        f"groups of {heads // groups} heads of {channels} channels: the tpu kernel takes {groups} groups only where "
        f"{least} heads, which fill the lanes, divide a group"
    )


class _Layout:
    """Blocks of the grid (row, group, chunk, block of heads); with `reverse` the last chunk comes first."""

    def __init__(self, x: jax.Array, b: jax.Array, chunk: int, reverse: bool) -> None:
        self.batch, self.length, self.heads, self.channels = x.shape
        self.groups, self.size = b.shape[2:]
        self.chunk, self.count = chunk, self.length // chunk
        self.width = _heads_at_once(x.shape, b.shape)
        self.blocks = self.heads // self.groups // self.width
        self.grid = (self.batch, self.groups, self.count, self.blocks)
        self.reverse = reverse

    def at(self, k: Any) -> Any:
        return self.count - 1 - k if self.reverse else k

    def head(self, g: Any, j: Any) -> Any:
        return g * self.blocks + j

    @property
    def x(self) -> pl.BlockSpec:
        """Of [b, T, H P]."""
        shape = (None, self.chunk, self.width * self.channels)
        return pl.BlockSpec(shape, lambda b, g, k, j: (b, self.at(k), self.head(g, j)))

    @property
    def rows(self) -> pl.BlockSpec:
        """Of [b, H / width, K, width 3, Q]."""
        shape = (None, None, None, 3 * self.width, self.chunk)
        return pl.BlockSpec(shape, lambda b, g, k, j: (b, self.head(g, j), self.at(k), 0, 0))

    @property
    def first(self) -> pl.BlockSpec:
        """Of [b, K, 1, Q]."""
        return pl.BlockSpec((None, None, 1, self.chunk), lambda b, g, k, j: (b, self.at(k), 0, 0))

    @property
    def bc(self) -> pl.BlockSpec:
        """Of [b, G, T, N]."""
        return pl.BlockSpec((None, None, self.chunk, self.size), lambda b, g, k, j: (b, g, self.at(k), 0))

    @property
    def states(self) -> pl.BlockSpec:
        """Of [b, K, H, P, N]."""
        shape = (None, None, self.width, self.channels, self.size)
        return pl.BlockSpec(shape, lambda b, g, k, j: (b, self.at(k), self.head(g, j), 0, 0))

    def state(self, step: int, other: int) -> pl.BlockSpec:
        """Of [b, H, P, N], needed at one step of the chunks alone; at the others the block `other` stays in place."""
        shape = (None, self.width, self.channels, self.size)
        return pl.BlockSpec(shape, lambda b, g, k, j: (b, self.head(g, jnp.where(k == step, j, other)), 0, 0))

    def flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.batch, self.length, self.heads * self.channels)

    def blocked(self, rows: jax.Array) -> jax.Array:
        """[b, H, K, 3, Q] -> [b, H / width, K, width 3, Q]."""
        parts = rows.reshape(self.batch, -1, self.width, self.count, 3, self.chunk)
        return parts.swapaxes(2, 3).reshape(self.batch, -1, self.count, 3 * self.width, self.chunk)

    def unblocked(self, rows: jax.Array) -> jax.Array:
        parts = rows.reshape(self.batch, -1, self.count, self.width, 3, self.chunk)
        return parts.swapaxes(2, 3).reshape(self.batch, self.heads, self.count, 3, self.chunk)


def _diagonal(size: int) -> jax.Array:
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    return i == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _column(row: jax.Array) -> jax.Array:
    """[1, Q] -> [Q, 1]; a sum with one term, so exact."""
    return jnp.sum(jnp.where(_diagonal(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def _row(column: jax.Array) -> jax.Array:
    """[Q, 1] -> [1, Q]."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _scaled(x: jax.Array, column: jax.Array) -> jax.Array:
    """x [Q, n] times a float32 column, in the dtype of x."""
    return (x.astype(jnp.float32) * column).astype(x.dtype)


def _forward_kernel(
    x_ref,  # [Q, width P]
    rows_ref,  # [width 3, Q]
    b_ref,  # [Q, N]
    c_ref,
    state_ref,  # [width, P, N]
    *refs,  # first [1, Q] with segments; y, final, the states before each chunk if saved; scratch: states, scores
    segmented: bool,
    save: bool,
):
    first_ref = refs[0] if segmented else None
    y_ref, final_ref, *states_ref, state_scratch, scores_scratch = refs[segmented:]
    width, channels, _ = state_ref.shape
    chunk, block = pl.program_id(2), pl.program_id(3)
    mine = pl.ds(block * width, width)

    @pl.when(block == 0)
    def _():
        scores_scratch[...] = dot(c_ref[...], b_ref[...], (1, 1))

    @pl.when(chunk == 0)
    def _():
        state_scratch[mine] = state_ref[...]

    first = None if first_ref is None else _column(first_ref[...])
    for head in range(width):
        at = block * width + head
        lanes = slice(head * channels, (head + 1) * channels)
        state = state_scratch[at]
        if save:
            states_ref[0][head] = state
        cum, start, end = (rows_ref[3 * head + i : 3 * head + i + 1] for i in (CUM, START, END))
        x = x_ref[:, lanes]
        weights = scores_scratch[...] * between(_column(cum), cum, first)
        y = dot(weights.astype(x.dtype), x, (1, 0)) + _column(start) * dot(c_ref[...], state, (1, 1))
        y_ref[:, lanes] = y.astype(y_ref.dtype)
        state_scratch[at] = start[:, -1:] * state + dot(_scaled(x, _column(end)), b_ref[...], (0, 0))

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        final_ref[...] = state_scratch[mine]


def _backward_kernel(
    x_ref,  # [Q, width P]
    rows_ref,  # [width 3, Q]
    b_ref,  # [Q, N]
    c_ref,
    states_ref,  # [width, P, N], before the chunk
    d_y_ref,  # [Q, width P]
    d_final_ref,  # [width, P, N]
    *refs,  # first [1, Q] with segments; gradients of x, rows, b, c, state; scratch: state's gradient, scores
    segmented: bool,
):
    first_ref = refs[0] if segmented else None
    dx_ref, d_rows_ref, d_b_ref, d_c_ref, d_state_ref, scratch, scores_scratch = refs[segmented:]
    width, channels, _ = states_ref.shape
    step, block = pl.program_id(2), pl.program_id(3)
    mine = pl.ds(block * width, width)

    @pl.when(block == 0)
    def _():
        scores_scratch[...] = dot(c_ref[...], b_ref[...], (1, 1))
        d_b_ref[...] = jnp.zeros(d_b_ref.shape, jnp.float32)
        d_c_ref[...] = jnp.zeros(d_c_ref.shape, jnp.float32)

    @pl.when(step == 0)
    def _():
        scratch[mine] = d_final_ref[...]

    b, c = b_ref[...], c_ref[...]
    first = None if first_ref is None else _column(first_ref[...])
    for head in range(width):
        at = block * width + head
        lanes = slice(head * channels, (head + 1) * channels)
        state, d_state = states_ref[head], scratch[at]
        cum, start, end = (rows_ref[3 * head + i : 3 * head + i + 1] for i in (CUM, START, END))
        x, d_y = x_ref[:, lanes], d_y_ref[:, lanes]
        left = between(_column(cum), cum, first)
        weights = scores_scratch[...] * left
        d_weights = dot(d_y, x, (1, 1))
        d_scores = (d_weights * left).astype(b.dtype)
        b_state, c_state = dot(b, d_state, (1, 1)), dot(c, state, (1, 1))  # [Q, P] each
        start_column, end_column = _column(start), _column(end)

        dx = dot(weights.astype(d_y.dtype), d_y, (0, 0)) + end_column * b_state
        dx_ref[:, lanes] = dx.astype(dx_ref.dtype)
        d_b_ref[...] += dot(d_scores, c, (0, 0)) + dot(_scaled(x, end_column), d_state, (1, 0))
        d_c_ref[...] += dot(d_scores, b, (1, 0)) + dot(_scaled(d_y, start_column), state, (1, 0))

        through = d_weights * weights  # what weights_ij gives to cum_i and takes from cum_j
        d_rows_ref[3 * head + CUM : 3 * head + CUM + 1] = _row(
            jnp.sum(through, axis=1, keepdims=True)
        ) - jnp.sum(through, axis=0, keepdims=True)
        kept = jnp.sum(jnp.sum(d_state * state, axis=1, keepdims=True), axis=0, keepdims=True)
        d_start = _row(jnp.sum(d_y.astype(jnp.float32) * c_state, axis=1, keepdims=True))
        last = jax.lax.broadcasted_iota(jnp.int32, start.shape, 1) == start.shape[1] - 1
        d_rows_ref[3 * head + START : 3 * head + START + 1] = d_start + jnp.where(last, kept, 0.0)
        d_rows_ref[3 * head + END : 3 * head + END + 1] = _row(
            jnp.sum(x.astype(jnp.float32) * b_state, axis=1, keepdims=True)
        )
        scratch[at] = start[:, -1:] * d_state + dot(_scaled(d_y, start_column), c, (0, 0))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_state_ref[...] = scratch[mine]


def forward(
    x: jax.Array,
    rows: jax.Array,
    first: jax.Array | None,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array,
    *,
    save: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """x [b, T, H, P], rows and first as `decays` gives them, b and c [b, T, G, N], state float32 [b, H, P, N] -> y, the
    final state and, if `save`, the states [b, K, H, P, N] before each chunk."""
    layout = _Layout(x, b, rows.shape[-1], reverse=False)
    last, end = layout.count - 1, layout.blocks - 1
    operands = [layout.flat(x), layout.blocked(rows), b.swapaxes(1, 2), c.swapaxes(1, 2), state]
    specs = [layout.x, layout.rows, layout.bc, layout.bc, layout.state(0, end)]
    if first is not None:
        operands.append(first[:, :, None])
        specs.append(layout.first)
    out_specs = [layout.x, layout.state(last, 0)]
    out_shape = [
        jax.ShapeDtypeStruct(operands[0].shape, x.dtype),
        jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ]
    if save:
        out_specs.append(layout.states)
        shape = (layout.batch, layout.count, *state.shape[1:])
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    y, *rest = pl.pallas_call(
        functools.partial(_forward_kernel, segmented=first is not None, save=save),
        grid=layout.grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=_scratch(layout),
        compiler_params=pltpu.CompilerParams(dimension_semantics=_SEMANTICS),
        interpret=interpret,
        name="ssd_forward",
    )(*operands)
    return y.reshape(x.shape), *rest


def backward(
    x: jax.Array,
    rows: jax.Array,
    first: jax.Array | None,
    b: jax.Array,
    c: jax.Array,
    states: jax.Array,
    d_y: jax.Array,
    d_final: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Gradients of x, rows, b, c (float32) and the state, from those of y and of the final state."""
    layout = _Layout(x, b, rows.shape[-1], reverse=True)
    last, end = layout.count - 1, layout.blocks - 1
    operands = [
        layout.flat(x),
        layout.blocked(rows),
        b.swapaxes(1, 2),
        c.swapaxes(1, 2),
        states,
        layout.flat(d_y),
        d_final,
    ]
    specs = [layout.x, layout.rows, layout.bc, layout.bc, layout.states, layout.x, layout.state(0, end)]
    if first is not None:
        operands.append(first[:, :, None])
        specs.append(layout.first)
    results = (
        operands[0],
        operands[1],
        *(jax.ShapeDtypeStruct(operands[2].shape, jnp.float32),) * 2,
        d_final,
    )
    dx, d_rows, d_b, d_c, d_state = pl.pallas_call(
        functools.partial(_backward_kernel, segmented=first is not None),
        grid=layout.grid,
        in_specs=specs,
        out_specs=[layout.x, layout.rows, layout.bc, layout.bc, layout.state(last, 0)],
        out_shape=[jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results],
        scratch_shapes=_scratch(layout),
        compiler_params=pltpu.CompilerParams(dimension_semantics=_SEMANTICS),
        interpret=interpret,
        name="ssd_backward",
    )(*operands)
    d_b, d_c = d_b.swapaxes(1, 2), d_c.swapaxes(1, 2)
    return dx.reshape(x.shape), layout.unblocked(d_rows), d_b, d_c, d_state


def _scratch(layout: _Layout) -> list[Any]:
    """States of all heads of a group, and C B^T."""
    states = (layout.heads // layout.groups, layout.channels, layout.size)
    return [pltpu.VMEM(states, jnp.float32), pltpu.VMEM((layout.chunk, layout.chunk), jnp.float32)]


def _step_kernel(decay_ref, state_ref, x_ref, b_ref, c_ref, y_ref, new_ref):
    """decay float32[b, H] in scalar memory; states [heads, P, N]; x and y [heads, P]; b and c [1, N]."""
    b, c = b_ref[...].astype(jnp.float32), c_ref[...].astype(jnp.float32)
    heads = state_ref.shape[0]
    for head in range(heads):
        decay = decay_ref[pl.program_id(0), pl.program_id(1) * heads + head]
        state = decay * state_ref[head] + _column(x_ref[head : head + 1].astype(jnp.float32)) * b
        new_ref[head] = state
        y = _row(jnp.sum(state * c, axis=1, keepdims=True))
        y_ref[head : head + 1] = y.astype(y_ref.dtype)


def step(
    state: jax.Array,
    x: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in the api, state and log_decay in float32."""
    batch, heads, channels = x.shape
    groups, size = b.shape[1:]
    # Heads of a program: of one group, and about half a MiB of state, so that copies hide behind each other.
    most = max(1, 2**19 // (channels * size * 4))
    width = max(w for w in range(1, heads // groups + 1) if heads // groups % w == 0 and w <= most)
    blocks = heads // width

    def of_heads(i, h, decay):
        return i, h, 0, 0

    def of_group(i, h, decay):
        return i, h * width // (heads // groups), 0, 0

    states = pl.BlockSpec((None, width, channels, size), of_heads)
    rows = pl.BlockSpec((None, None, width, channels), of_heads)
    shared = pl.BlockSpec((None, None, 1, size), of_group)
    y, new = pl.pallas_call(
        _step_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks),
            in_specs=[states, rows, shared, shared],
            out_specs=[rows, states],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, blocks, width, channels), x.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        input_output_aliases={1: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="ssd_step",
    )(jnp.exp(log_decay), state, x.reshape(batch, blocks, width, channels), b[:, :, None], c[:, :, None])
    return y.reshape(x.shape), new
