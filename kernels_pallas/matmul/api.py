"""The dense product of many rows: which implementation runs, what it can compute, and its derivative."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported, check_name, needs_llvm
from kernels_pallas.matmul import reference

_LONGEST = 2**31 - 2**16  # dimensions are passed on in 32 bits, rounded up to whole tiles


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    transposed: bool = False,
    implementation: Literal["reference", "cpu"] = "cpu",
) -> jax.Array:
    """x float32[..., K] times w float32[K, N], or float32[N, K] where `transposed` -> float32[..., N].

    For training: a kernel of a CPU that is as fast as the machine where there are some dozens of rows. Both operands
    have gradients, which are products of the same kernel, and so have those. On a CPU every element is one chain of
    fused multiply-adds in the order of K: its bits depend on its row and its column alone.

    Raises `Unsupported` for other dtypes and shapes, and on a processor without a kernel.
    """
    if w.ndim != 2 or not x.ndim or x.shape[-1] != w.shape[1 if transposed else 0]:
        raise Unsupported(
            f"x {list(x.shape)} times w {list(w.shape)}{', transposed,' if transposed else ''} is no product"
        )
    if not w.size or not x.size:
        raise Unsupported(f"x {list(x.shape)} or w {list(w.shape)} is empty")
    flat = x.reshape(-1, x.shape[-1])
    if max(*flat.shape, *w.shape) > _LONGEST:
        raise Unsupported(f"x {list(x.shape)} or w {list(w.shape)} is longer than {_LONGEST:,} along a dimension")
    check_name(implementation, "cpu")
    if implementation == "reference":
        out = reference.matmul(flat, w, transposed)
    else:
        if not x.dtype == w.dtype == jnp.float32:
            raise Unsupported(f"x is {x.dtype}, w is {w.dtype}: the kernel takes float32")
        out = _product(flat, w, "nt" if transposed else "nn")
    return out.reshape(*x.shape[:-1], out.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, form: str) -> jax.Array:
    """x [M, K], or [K, M] where the form begins with t; w [K, N], or [N, K] where it ends with t -> [M, N]."""
    with needs_llvm():
        from kernels_pallas.matmul import cpu
    return cpu.matmul(x, w, form)


def _forward(x: jax.Array, w: jax.Array, form: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, w, form), (x, w)


def _backward(form: str, saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    if form == "nn":
        return _product(d_out, w, "nt"), _product(x, d_out, "tn")
    if form == "nt":
        return _product(d_out, w, "nn"), _product(d_out, x, "tn")
    return _product(w, d_out, "nt"), _product(x, d_out, "nn")


_product.defvjp(_forward, _backward)
