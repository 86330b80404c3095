"""The whole FFN of every expert over its rows, for CPUs.

Blocks of equally many rows are batched products of all experts. Otherwise an expert goes over its rows piece by piece:
`grouped_dot` three times would write what lies between the products to memory and read it again, four times forward
and backward; here a piece's hidden states stay in the processor's cache. Backward needs what the activation got, which
is kept, so nothing is computed twice.

Many float32 rows of gated SiLU experts have a kernel that computes the activation while a block of both products is in
the cache, and its gradient likewise. Kernels in panels have no backward, and a kernel of their own.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.moe.grouped import Groups, each_expert, if_even, panels_dot, pieces, varying_like
from research.nn import weights
from research.nn.mlp import ACTIVATIONS, Activation
from research.nn.panels import StackedPanels
from research.nn.weights import Kernel

Params = Mapping[str, Mapping[str, jax.Array]]
Kept = list[jax.Array]  # the inputs of the activation


def grouped_feed_forward(
    rows: jax.Array, params: Params, groups: Groups, tile: int, activation: Activation
) -> jax.Array:
    """rows [S, width] grouped by expert as in `grouped_dot` -> [S, width], each through its expert's FFN.

    params: {gate, up, down}/kernel [E, in, out] and, where there are biases, /bias [E, out]; arrays all of them.
    Without `gate` the FFN is not gated. What rows of no expert become means nothing.
    """
    return _forward(rows, params, groups, tile, activation)


def in_panels(params: Mapping[str, Mapping[str, Kernel]], activation: Activation) -> bool:
    """Whether `panels_feed_forward` computes the FFN of these parameters: {gate, up, down}/kernel, all in panels,
    without biases, and silu."""
    if activation != "silu" or "gate" not in params:
        return False
    return all(isinstance(part["kernel"], StackedPanels) and "bias" not in part for part in params.values())


def panels_feed_forward(
    rows: jax.Array, params: Mapping[str, Mapping[str, StackedPanels]], groups: Groups
) -> jax.Array:
    """rows [S, width] grouped by expert as in `grouped_dot` -> [S, width], each through its expert's gated SiLU FFN.

    params: as `in_panels` wants them. A row's result has the same bits alone and among others; there is no gradient.
    """
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    return panels_dot(panels_dot(rows, up, groups, gate), down, groups)


def kernel_suits(params: Params, activation: Activation) -> bool:
    """Whether `kernel_feed_forward` computes the FFN of these parameters, arrays: {gate, up, down}/kernel float32,
    without biases, and silu."""
    if activation != "silu" or "gate" not in params:
        return False
    return all(part.keys() == {"kernel"} and part["kernel"].dtype == jnp.float32 for part in params.values())


def kernel_feed_forward(rows: jax.Array, params: Params, groups: Groups) -> jax.Array:
    """rows float32[S, width] grouped by expert as in `grouped_dot`, where `in_one_call` -> [S, width], each through its
    expert's gated SiLU FFN. params: as `kernel_suits` wants them."""
    # Imported here: only programs that run on a CPU need LLVM.
    from kernels_pallas.grouped_matmul import cpu_training

    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    return cpu_training.grouped_ffn(rows, gate, up, down, groups.start[0], groups.size[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _forward(rows: jax.Array, params: Params, groups: Groups, tile: int, activation: Activation) -> jax.Array:
    return _run(rows, params, groups, tile, activation, keep=False)[0]


def _forward_keeping(rows, params, groups, tile, activation):
    out, kept = _run(rows, params, groups, tile, activation, keep=True)
    return out, (rows, params, groups, kept)


def _run(rows, params, groups, tile, activation, keep: bool) -> tuple[jax.Array, list[Kept]]:
    """-> the output, and of every region the inputs of the activation if they are to be kept."""

    def through(mine: Params, x: jax.Array) -> tuple[jax.Array, Kept]:
        inputs = [_affine(x, mine[name]) for name in _inner(params)]
        return _affine(_activate(activation, *inputs), mine["down"]), inputs if keep else []

    def by_pieces(rows: jax.Array, run: int = 0) -> tuple[jax.Array, Kept]:
        def expert(mine: Params, start: jax.Array, size: jax.Array, carry: Any, total: None) -> Any:
            def piece(at: jax.Array, count: int, own: jax.Array | None, carry: Any) -> Any:
                new = through(mine, jax.lax.dynamic_slice_in_dim(rows, at, count))
                return jax.tree.map(functools.partial(_write, at=at), carry, new)

            return pieces(start, size, rows.shape[0], tile, piece, carry), None

        count, dtype = rows.shape[0], rows.dtype
        hidden = params["up"]["kernel"].shape[-1]
        # Not filled: backward reads exactly the rows that are written here.
        empty = lambda: varying_like(jax.lax.empty((count, hidden), dtype), rows)  # noqa: E731
        kept = [empty() for _ in _inner(params)] if keep else []
        out = jnp.zeros_like(rows, shape=(count, params["down"]["kernel"].shape[-1]))
        start, size = groups.start[run], groups.size[run]
        return each_expert(start, size, dict(params), expert, (out, kept), None)[0]

    def blocks(rows: jax.Array) -> tuple[jax.Array, Kept]:
        flat = lambda y: y.reshape(rows.shape[0], -1)  # noqa: E731
        return jax.tree.map(flat, jax.vmap(through)(dict(params), groups.blocks(rows)))

    first, *others = groups.regions(rows)
    done = [if_even(groups, params, blocks, by_pieces, first), *(by_pieces(x, 1) for x in others)]
    out, kept = zip(*done, strict=True)
    return jnp.concatenate(out) if others else out[0], list(kept)


def _backward(tile: int, activation: Activation, saved: Any, cotangent: jax.Array) -> tuple[Any, Any, None]:
    rows, params, groups, kept = saved

    def through(mine: Params, x: jax.Array, dy: jax.Array, inputs: Kept) -> tuple[jax.Array, Params]:
        """The cotangents of an expert's rows x and, in float32, of its parameters."""
        hidden, pull = jax.vjp(functools.partial(_activate, activation), *inputs)
        d_hidden = _transposed(dy, mine["down"]["kernel"])
        parts = {"down": _parameter_gradient(mine["down"], hidden, dy)}
        dx = 0.0
        for name, d_input in zip(_inner(params), pull(d_hidden.astype(hidden.dtype)), strict=True):
            parts[name] = _parameter_gradient(mine[name], x, d_input)
            dx = dx + _transposed(d_input, mine[name]["kernel"])
        return dx.astype(x.dtype), parts

    def by_pieces(rows: jax.Array, cotangent: jax.Array, kept: Kept, run: int, totals: Params) -> Any:
        def expert(mine: Params, start: jax.Array, size: jax.Array, d_rows: jax.Array, total: Params) -> Any:
            def piece(at: jax.Array, count: int, own: jax.Array | None, carry: Any) -> Any:
                d_rows, total = carry
                x, dy, *inputs = (
                    jax.lax.dynamic_slice_in_dim(y, at, count) for y in (rows, cotangent, *kept)
                )
                if own is not None:  # rows of the next expert have no part in this one's gradient
                    dy = jnp.where(jnp.arange(count)[:, None] < own, dy, 0)
                dx, parts = through(mine, x, dy, inputs)
                return _write(d_rows, dx, at), jax.tree.map(jnp.add, total, parts)

            return pieces(start, size, rows.shape[0], tile, piece, (d_rows, total))

        start, size = groups.start[run], groups.size[run]
        return each_expert(start, size, dict(params), expert, jnp.zeros_like(rows), totals)

    def blocks(*operands: Any) -> tuple[jax.Array, Params]:
        dx, totals = jax.vmap(through)(dict(params), *jax.tree.map(groups.blocks, operands))
        return dx.reshape(operands[0].shape), totals

    def sorted_pieces(*operands: Any) -> tuple[jax.Array, Params]:
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), dict(params))
        return by_pieces(*operands, 0, zeros)

    parts = list(zip(groups.regions(rows), groups.regions(cotangent), kept, strict=True))
    d_rows, totals = if_even(groups, params, blocks, sorted_pieces, *parts[0])
    if groups.block:
        d_others, totals = by_pieces(*parts[1], 1, totals)
        d_rows = jnp.concatenate([d_rows, d_others])
    return d_rows, jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), totals, dict(params)), None


_forward.defvjp(_forward_keeping, _backward)


def _inner(params: Params) -> tuple[str, ...]:
    return ("gate", "up") if "gate" in params else ("up",)


def _activate(activation: Activation, *inputs: jax.Array) -> jax.Array:
    """act(up), or act(gate) * up."""
    first = ACTIVATIONS[activation](inputs[0])
    return first if len(inputs) == 1 else first * inputs[1]


def _affine(x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    y = weights.dot(x, params["kernel"])
    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def _write(buffer: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, at, 0)


def _transposed(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """dy [count, out] times the transposed kernel -> float32 [count, in]."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(dy, kernel.astype(dy.dtype), contract, preferred_element_type=jnp.float32)


def _parameter_gradient(params: Mapping[str, jax.Array], x: jax.Array, dy: jax.Array) -> dict[str, jax.Array]:
    contract = (((0,), (0,)), ((), ()))
    gradient = {"kernel": jax.lax.dot_general(x, dy, contract, preferred_element_type=jnp.float32)}
    if "bias" in params:
        gradient["bias"] = jnp.sum(dy, axis=0, dtype=jnp.float32)
    return gradient
