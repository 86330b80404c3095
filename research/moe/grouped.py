"""Grouped matrix product: rows in tiles, each tile with the kernel of one expert."""

import functools

import jax
import jax.numpy as jnp

from research.nn import weights
from research.nn.weights import Kernel


def grouped_dot(rows: jax.Array, kernel: Kernel, expert_of_tile: jax.Array, tile: int) -> jax.Array:
    """rows [S, in] times kernel [E, in, out] -> [S, out] in the dtype of rows, accumulated in float32.

    The `tile` rows of tile t take the kernel of expert_of_tile[t] (int32[S / tile]); where that is E, which
    happens in the last tiles only, the result is 0 and nothing is computed.
    """
    return _loop(rows, kernel, expert_of_tile, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loop(rows: jax.Array, kernel: Kernel, expert_of_tile: jax.Array, tile: int) -> jax.Array:
    def body(t, out):
        x = jax.lax.dynamic_slice_in_dim(rows, t * tile, tile)
        y = weights.dot(x, _expert(kernel, expert_of_tile[t]))
        return jax.lax.dynamic_update_slice_in_dim(out, y, t * tile, 0)

    out = jnp.zeros((rows.shape[0], kernel.shape[-1]), rows.dtype)
    return jax.lax.fori_loop(0, _used(kernel, expert_of_tile), body, out)


def _loop_forward(rows, kernel, expert_of_tile, tile):
    return _loop(rows, kernel, expert_of_tile, tile), (rows, kernel, expert_of_tile)


def _loop_backward(tile, saved, cotangent):
    rows, kernel, expert_of_tile = saved
    floating, rebuild = _floating(kernel)

    def body(t, carry):
        d_rows, d_kernel = carry
        expert = expert_of_tile[t]
        x = jax.lax.dynamic_slice_in_dim(rows, t * tile, tile)
        mine = [_at(leaf, expert) for leaf in floating]
        _, pull = jax.vjp(lambda x, mine: weights.dot(x, rebuild(mine, expert)), x, mine)
        dx, dw = pull(jax.lax.dynamic_slice_in_dim(cotangent, t * tile, tile))
        d_rows = jax.lax.dynamic_update_slice_in_dim(d_rows, dx, t * tile, 0)
        return d_rows, [total.at[expert].add(part) for total, part in zip(d_kernel, dw, strict=True)]

    zeros = jnp.zeros_like(rows), [jnp.zeros_like(leaf) for leaf in floating]
    d_rows, d_floating = jax.lax.fori_loop(0, _used(kernel, expert_of_tile), body, zeros)
    return d_rows, _cotangent(kernel, d_floating), None


_loop.defvjp(_loop_forward, _loop_backward)


def _used(kernel: Kernel, expert_of_tile: jax.Array) -> jax.Array:
    experts = jax.tree.leaves(kernel)[0].shape[0]
    return jnp.sum(expert_of_tile < experts)


def _at(leaf: jax.Array, expert: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False)


def _expert(kernel: Kernel, expert: jax.Array) -> Kernel:
    return jax.tree.map(lambda leaf: _at(leaf, expert), kernel)


def _floating(kernel: Kernel):
    """-> the leaves of a kernel that have gradients, and a function that rebuilds one expert's kernel from its
    own ones."""
    leaves, structure = jax.tree.flatten(kernel)
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(mine, expert):
        mine = iter(mine)
        return structure.unflatten(
            [next(mine) if f else _at(leaf, expert) for f, leaf in zip(real, leaves, strict=True)]
        )

    return [leaf for f, leaf in zip(real, leaves, strict=True) if f], rebuild


def _cotangent(kernel: Kernel, floating):
    """The cotangent of a kernel: those of its floating leaves, nothing for codes."""
    found = iter(floating)
    return jax.tree.map(
        lambda leaf: (
            next(found)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jnp.zeros(leaf.shape, jax.dtypes.float0)
        ),
        kernel,
    )
