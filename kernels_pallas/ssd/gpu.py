"""The SSD scan on GPU (Pallas, Triton).

Three phases, as chunks run side by side: what each chunk adds to the state; the recurrence over chunks, which XLA
scans; the outputs. The backward pass has the same three, the second one in reverse, and gradients for the third. A
program takes a chunk and several heads of a group, one after the other, so that B and C are read once for all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.common import Unsupported
from kernels_pallas.ssd.common import CUM, END, START, between, dot

_CHUNK = 64  # the most tokens whose scores stay in registers
_PROGRAMS = 256  # about two for each multiprocessor of a large device
_LEAST = 16  # a tensor core's smallest side


def _is_power(size: int) -> bool:
    return size >= _LEAST and size & (size - 1) == 0


def chunk_of(chunk: int, x: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens of a chunk that are taken; raises `Unsupported` for what the kernel cannot compute."""
    for name, size in {"chunk": chunk, "head_dim": x[3], "state_dim": b[3]}.items():
        if not _is_power(size):
            raise Unsupported(f"{name}={size}: the gpu kernel takes powers of two from {_LEAST} on")
    return min(chunk, _CHUNK, max(_LEAST, 1 << (x[1] - 1).bit_length()))


def _added_kernel(x_ref, weight_ref, b_ref, out_ref):
    """(weight * x)^T b: x [Q, heads, P], weight [heads, Q], b [Q, N] -> out [heads, P, N]."""
    b = b_ref[...]

    def head(h, _):
        x = x_ref[:, h, :]
        scaled = (x.astype(jnp.float32) * weight_ref[h, :][:, None]).astype(x.dtype)
        out_ref[h, :, :] = dot(scaled, b, (0, 0))

    jax.lax.fori_loop(0, x_ref.shape[1], head, None)


def _output_kernel(x_ref, rows_ref, b_ref, c_ref, states_ref, *refs):
    """x [Q, heads, P], rows [heads, 3, Q], b and c [Q, N], states [heads, P, N]; first [Q] with segments -> y as x."""
    *first_ref, y_ref = refs
    first = first_ref[0][...][:, None] if first_ref else None
    c = c_ref[...]
    scores = dot(c, b_ref[...], (1, 1))

    def head(h, _):
        cum, start = rows_ref[h, CUM, :], rows_ref[h, START, :]
        x = x_ref[:, h, :]
        weights = scores * between(cum[:, None], cum[None, :], first)
        y = dot(weights.astype(x.dtype), x, (1, 0)) + start[:, None] * dot(c, states_ref[h, :, :], (1, 1))
        y_ref[:, h, :] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[1], head, None)


def _gradient_kernel(x_ref, rows_ref, b_ref, c_ref, states_ref, d_y_ref, d_next_ref, *refs):
    """As `_output_kernel`, d_y like x, d_next (the gradient of the state behind the chunk) like states -> gradients of
    x, rows (less what the state gives to the last of `start`), and b and c, added up over the heads in float32."""
    *first_ref, dx_ref, d_rows_ref, d_b_ref, d_c_ref = refs
    first = first_ref[0][...][:, None] if first_ref else None
    b, c = b_ref[...], c_ref[...]
    scores = dot(c, b, (1, 1))

    def head(h, carry):
        d_b, d_c = carry
        cum, start, end = rows_ref[h, CUM, :], rows_ref[h, START, :], rows_ref[h, END, :]
        x, d_y = x_ref[:, h, :], d_y_ref[:, h, :]
        state, d_next = states_ref[h, :, :].astype(x.dtype), d_next_ref[h, :, :].astype(x.dtype)
        left = between(cum[:, None], cum[None, :], first)
        weights = scores * left
        d_weights = dot(d_y, x, (1, 1))
        d_scores = (d_weights * left).astype(b.dtype)
        b_state = dot(b, d_next, (1, 1))
        dx = dot(weights.astype(d_y.dtype), d_y, (0, 0)) + end[:, None] * b_state
        dx_ref[:, h, :] = dx.astype(dx_ref.dtype)
        through = d_weights * weights
        d_rows_ref[h, CUM, :] = jnp.sum(through, axis=1) - jnp.sum(through, axis=0)
        d_rows_ref[h, START, :] = jnp.sum(d_y.astype(jnp.float32) * dot(c, state, (1, 1)), axis=1)
        d_rows_ref[h, END, :] = jnp.sum(x.astype(jnp.float32) * b_state, axis=1)
        left_of_x = (x.astype(jnp.float32) * end[:, None]).astype(x.dtype)
        left_of_d_y = (d_y.astype(jnp.float32) * start[:, None]).astype(x.dtype)
        d_b += dot(d_scores, c, (0, 0)) + dot(left_of_x, d_next, (1, 0))
        d_c += dot(d_scores, b, (1, 0)) + dot(left_of_d_y, state, (1, 0))
        return d_b, d_c

    nothing = jnp.zeros(b.shape, jnp.float32)
    d_b_ref[...], d_c_ref[...] = jax.lax.fori_loop(0, x_ref.shape[1], head, (nothing, nothing))


class _Layout:
    """Blocks of the grid (row of the batch, chunk, block of heads of one group)."""

    def __init__(self, x: jax.Array, b: jax.Array, chunk: int) -> None:
        self.batch, self.length, self.heads, self.channels = x.shape
        self.groups, self.size = b.shape[2:]
        self.chunk, self.count = chunk, self.length // chunk
        group = self.heads // self.groups
        wanted = min(group, -(-_PROGRAMS // (self.batch * self.count * self.groups)))  # programs a group
        self.parts = next(parts for parts in range(wanted, group + 1) if group % parts == 0)
        self.width = group // self.parts
        self.grid = (self.batch, self.count, self.groups * self.parts)

    @property
    def x(self) -> pl.BlockSpec:
        """Of [b, T, H, P]."""
        return pl.BlockSpec((None, self.chunk, self.width, self.channels), lambda b, k, h: (b, k, h, 0))

    @property
    def rows(self) -> pl.BlockSpec:
        """Of [b, K, H, 3, Q]."""
        return pl.BlockSpec((None, None, self.width, 3, self.chunk), lambda b, k, h: (b, k, h, 0, 0))

    @property
    def weight(self) -> pl.BlockSpec:
        """Of [b, K, H, Q]."""
        return pl.BlockSpec((None, None, self.width, self.chunk), lambda b, k, h: (b, k, h, 0))

    @property
    def first(self) -> pl.BlockSpec:
        """Of [b, K, Q]."""
        return pl.BlockSpec((None, None, self.chunk), lambda b, k, h: (b, k, 0))

    @property
    def bc(self) -> pl.BlockSpec:
        """Of [b, T, G, N]."""
        shape = (None, self.chunk, None, self.size)
        return pl.BlockSpec(shape, lambda b, k, h: (b, k, h // self.parts, 0))

    @property
    def d_bc(self) -> pl.BlockSpec:
        """Of [b, T, G parts, N]."""
        return pl.BlockSpec((None, self.chunk, None, self.size), lambda b, k, h: (b, k, h, 0))

    @property
    def states(self) -> pl.BlockSpec:
        """Of [b, K, H, P, N]."""
        shape = (None, None, self.width, self.channels, self.size)
        return pl.BlockSpec(shape, lambda b, k, h: (b, k, h, 0, 0))

    def state_shape(self) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.count, self.heads, self.channels, self.size)
        return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(kernel, layout: _Layout, operands, specs, out_shape, out_specs, name: str, interpret: Any):
    return pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=name,
    )(*operands)


def _added(layout: _Layout, x: jax.Array, weight: jax.Array, b: jax.Array, interpret: Any) -> jax.Array:
    return _call(
        _added_kernel,
        layout,
        (x, weight, b),
        [layout.x, layout.weight, layout.bc],
        layout.state_shape(),
        layout.states,
        "ssd_added",
        interpret,
    )


def _scan(
    kept: jax.Array, added: jax.Array, state: jax.Array, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """kept [b, K, H], added [b, K, H, P, N] -> the state behind the last chunk, and those before each."""

    def step(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, added = chunk
        return kept[..., None, None] * state + added, state

    final, states = jax.lax.scan(step, state, (kept.swapaxes(0, 1), added.swapaxes(0, 1)), reverse=reverse)
    return final, states.swapaxes(0, 1)


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
    layout = _Layout(x, b, rows.shape[-1])
    rows = rows.swapaxes(1, 2)
    added = _added(layout, x, rows[..., END, :], b, interpret)
    final, states = _scan(rows[..., START, -1], added, state)
    operands = [x, rows, b, c, states]
    specs = [layout.x, layout.rows, layout.bc, layout.bc, layout.states]
    if first is not None:
        operands.append(first)
        specs.append(layout.first)
    y = _call(
        _output_kernel,
        layout,
        operands,
        specs,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        layout.x,
        "ssd_output",
        interpret,
    )
    return (y, final, states) if save else (y, final)


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
    layout = _Layout(x, b, rows.shape[-1])
    rows = rows.swapaxes(1, 2)
    added = _added(layout, d_y, rows[..., START, :], c, interpret)
    d_state, d_next = _scan(rows[..., START, -1], added, d_final, reverse=True)
    operands = [x, rows, b, c, states, d_y, d_next]
    specs = [layout.x, layout.rows, layout.bc, layout.bc, layout.states, layout.x, layout.states]
    if first is not None:
        operands.append(first)
        specs.append(layout.first)
    parts = jax.ShapeDtypeStruct(
        (layout.batch, layout.length, layout.groups * layout.parts, layout.size), jnp.float32
    )
    dx, d_rows, d_b, d_c = _call(
        _gradient_kernel,
        layout,
        operands,
        specs,
        [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(rows.shape, jnp.float32), parts, parts],
        [layout.x, layout.rows, layout.d_bc, layout.d_bc],
        "ssd_gradient",
        interpret,
    )
    kept = jnp.sum(d_next * states, axis=(-2, -1))
    d_rows = d_rows.at[..., START, -1].add(kept).swapaxes(1, 2)
    d_b, d_c = (
        jnp.sum(part.reshape(*part.shape[:2], layout.groups, layout.parts, -1), axis=3) for part in (d_b, d_c)
    )
    return dx, d_rows, d_b, d_c, d_state


def _step_kernel(decay_ref, state_ref, x_ref, b_ref, c_ref, y_ref, new_ref):
    """decay [1], state [P, N], x [P], b and c [N] -> y [P] and the new state."""
    b, c = b_ref[...].astype(jnp.float32), c_ref[...].astype(jnp.float32)
    state = decay_ref[...][:, None] * state_ref[...] + x_ref[...].astype(jnp.float32)[:, None] * b[None, :]
    new_ref[...] = state
    y_ref[...] = jnp.sum(state * c[None, :], axis=1).astype(y_ref.dtype)


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
    for name, extent in {"head_dim": channels, "state_dim": size}.items():
        if not _is_power(extent):
            raise Unsupported(f"{name}={extent}: the gpu kernel takes powers of two from {_LEAST} on")
    states = pl.BlockSpec((None, None, channels, size), lambda i, h: (i, h, 0, 0))
    rows = pl.BlockSpec((None, None, channels), lambda i, h: (i, h, 0))
    shared = pl.BlockSpec((None, None, size), lambda i, h: (i, h // (heads // groups), 0))
    y, new = pl.pallas_call(
        _step_kernel,
        grid=(batch, heads),
        in_specs=[pl.BlockSpec((None, 1), lambda i, h: (i, h)), states, rows, shared, shared],
        out_specs=[rows, states],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        input_output_aliases={1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ssd_step",
    )(jnp.exp(log_decay), state, x, b, c)
    return y, new
