"""Attention that chooses, and over chosen tokens, on a CPU.

`select_attention` is the program of tree attention, which leaves a piece's scores in the core's cache on its way; then
the greatest are found there. `listed_attention` takes a new token of a set as a piece: it copies rows of the listed
tokens into a block, asking for others ahead, and gives every full block to tree attention's softmax.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas import cpu
from kernels_pallas.chosen_attention.cpu_greatest import finish_kept, greatest, threshold, width
from kernels_pallas.chosen_attention.cpu_listed import listed
from kernels_pallas.tree_attention.cpu import execute, lanes_for, mask_or_none, numbers
from kernels_pallas.tree_attention.cpu_piece import head, softmax


@functools.cache
def select_kernel(dim: int, lanes: int, per: Literal["head", "group"]) -> cpu.Kernel:
    """The code for heads of `dim` and vectors of so many floats."""
    code = [softmax(dim, lanes, keep=True), head(dim, lanes, keep=True)]
    code += [threshold(lanes), greatest(lanes), finish_kept(lanes, per == "group"), execute(dim)]
    return cpu.Kernel(f"lathe_select_attention_{dim}_{lanes}_{per}", "\n".join(code))


@functools.cache
def listed_kernel(dim: int, lanes: int) -> cpu.Kernel:
    """The code for heads of `dim` and vectors of so many floats."""
    return cpu.Kernel(
        f"lathe_listed_attention_{dim}_{lanes}", "\n".join([softmax(dim, lanes), *listed(dim, lanes)])
    )


@functools.cache
def _register(kernel, *which) -> str:
    return kernel(*which).register()


def select_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    length: jax.Array,
    tree: jax.Array,
    cached_mask: jax.Array | None,
    *,
    k: int,
    per: Literal["head", "group"],
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in the api, k at most S + N."""
    batch, heads, count, dim = query.shape
    kv_heads, slots = cached[0].shape[1:3]
    lanes = lanes_for(dim)
    results = (
        jax.ShapeDtypeStruct(query.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads * count, width(slots, count, lanes)), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads if per == "head" else kv_heads, count, k), jnp.int32),
    )
    call = jax.ffi.ffi_call(_register(select_kernel, dim, lanes, per), results, vmap_method="sequential")
    masks = length.astype(jnp.int32), tree, mask_or_none(cached_mask)
    out, _, choice = call(query, *cached, *fresh, *masks, numbers(scale, softcap))
    return out, choice


def listed_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    choice: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Arguments as in the api."""
    dim = query.shape[3]
    name = _register(listed_kernel, dim, lanes_for(dim))
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(query.shape, jnp.float32), vmap_method="sequential")
    return call(query, *cached, *fresh, choice, numbers(scale, softcap))
