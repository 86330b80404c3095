"""The whole FFN of an expert over a piece of its rows, for CPUs.

`grouped_dot` three times would write what lies between the products to memory and read it again, four times forward
and backward; here a piece's hidden states stay in the processor's cache. Backward needs what the activation got, which
is kept, so nothing is computed twice.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.moe.grouped import pieces, varying_like
from research.nn import weights
from research.nn.mlp import ACTIVATIONS, Activation

Params = Mapping[str, Mapping[str, jax.Array]]


def grouped_feed_forward(
    rows: jax.Array, params: Params, sizes: jax.Array, tile: int, activation: Activation
) -> jax.Array:
    """rows [S, width] grouped by expert as in `grouped_dot` -> [S, width], each through its expert's FFN.

    params: {gate, up, down}/kernel [E, in, out] and, where there are biases, /bias [E, out]; arrays all of them.
    Without `gate` the FFN is not gated. Rows of no expert become 0.
    """
    return _forward(rows, params, sizes, tile, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _forward(
    rows: jax.Array, params: Params, sizes: jax.Array, tile: int, activation: Activation
) -> jax.Array:
    return _run(rows, params, sizes, tile, activation, keep=False)[0]


def _forward_keeping(rows, params, sizes, tile, activation):
    out, kept = _run(rows, params, sizes, tile, activation, keep=True)
    return out, (rows, params, sizes, kept)


def _run(rows, params, sizes, tile, activation, keep: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """-> the output, and the inputs of the activation if they are to be kept."""

    def expert(carry: Any, xs: Any) -> tuple[Any, None]:
        mine, size, start = xs

        def piece(at: jax.Array, count: int, own: jax.Array | None, carry: Any) -> Any:
            out, kept = carry
            x = jax.lax.dynamic_slice_in_dim(rows, at, count)
            inputs = [_affine(x, mine[name]) for name in _inner(params)]
            y = _affine(_activate(activation, *inputs), mine["down"])
            kept = [_write(buffer, new, at) for buffer, new in zip(kept, inputs, strict=bool(kept))]
            return _write(out, y, at), kept

        return pieces(start, size, rows.shape[0], tile, piece, carry), None

    count, dtype = rows.shape[0], rows.dtype
    hidden = params["up"]["kernel"].shape[-1]
    # Not filled: backward reads exactly the rows that are written here.
    kept = [varying_like(jax.lax.empty((count, hidden), dtype), rows) for _ in _inner(params)] if keep else []
    out = jnp.zeros_like(rows, shape=(count, params["down"]["kernel"].shape[-1]))
    (out, kept), _ = jax.lax.scan(expert, (out, kept), (params, sizes, jnp.cumsum(sizes) - sizes))
    return out, tuple(kept)


def _backward(tile: int, activation: Activation, saved: Any, cotangent: jax.Array) -> tuple[Any, Any, None]:
    rows, params, sizes, kept = saved

    def expert(d_rows: jax.Array, xs: Any) -> tuple[jax.Array, Params]:
        mine, size, start = xs

        def piece(at: jax.Array, count: int, own: jax.Array | None, carry: Any) -> Any:
            d_rows, total = carry
            x, dy, *inputs = (jax.lax.dynamic_slice_in_dim(y, at, count) for y in (rows, cotangent, *kept))
            if own is not None:  # rows of the next expert have no part in this one's gradient
                dy = jnp.where(jnp.arange(count)[:, None] < own, dy, 0)
            hidden, pull = jax.vjp(functools.partial(_activate, activation), *inputs)
            d_hidden = _transposed(dy, mine["down"]["kernel"])
            parts = {"down": _parameter_gradient(mine["down"], hidden, dy)}
            dx = 0.0
            for name, d_input in zip(_inner(params), pull(d_hidden.astype(hidden.dtype)), strict=True):
                parts[name] = _parameter_gradient(mine[name], x, d_input)
                dx = dx + _transposed(d_input, mine[name]["kernel"])
            return _write(d_rows, dx.astype(x.dtype), at), jax.tree.map(jnp.add, total, parts)

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), dict(mine))
        return pieces(start, size, rows.shape[0], tile, piece, (d_rows, zeros))

    start = jnp.cumsum(sizes) - sizes
    d_rows, totals = jax.lax.scan(expert, jnp.zeros_like(rows), (params, sizes, start))
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
