"""The skinny product: which implementation runs, and what it can compute."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported, check_name, needs_llvm
from kernels_pallas.skinny_matmul import reference


def skinny_matmul(
    x: jax.Array, panels: jax.Array, columns: int, *, implementation: Literal["reference", "cpu"] = "cpu"
) -> jax.Array:
    """x float32[..., K] times weights in panels float32[n, K, width] (`pack`) -> float32[..., columns].

    On a CPU a row's result has the same bits whatever other rows stand beside it. Weights are frozen: the gradient
    reaches x alone.

    Raises `Unsupported` for other dtypes, for panels of another width than this processor's (`panel_columns`), and on a
    processor without a kernel.
    """
    _check(x, panels, columns, panels.shape[1])
    flat = x.reshape(-1, x.shape[-1])
    check_name(implementation, "cpu")
    if implementation == "reference":
        out = reference.skinny_matmul(flat, panels, columns)
    else:
        if not x.dtype == panels.dtype == jnp.float32:
            raise Unsupported(f"x is {x.dtype}, the weights are {panels.dtype}: the kernel takes float32")
        _check_width(panels)
        out = _product(flat, panels, columns)
    return out.reshape(*x.shape[:-1], columns)


def skinny_code_matmul(
    x: jax.Array,
    codes: jax.Array,
    grid: jax.Array,
    bits: int,
    columns: int,
    *,
    implementation: Literal["reference", "cpu"] = "cpu",
) -> jax.Array:
    """x float32[..., K] times weights (code - zero) * scale -> float32[..., columns].

    codes uint8[n, K * bits / 8, width] of 8 or 4 bits (`pack_codes`), grid float32[n, groups, 2, width] of scales and
    zeros (`pack_grid`), a group being K / groups neighbouring inputs.

    On a CPU the result has the bits of `skinny_matmul` with a float32 copy of the weights. Weights are frozen: the
    gradient reaches x alone.

    Raises `Unsupported` for other bits and dtypes, for groups that divide a byte, for panels of another width than this
    processor's (`panel_columns`), and on a processor without a kernel.
    """
    if bits not in (4, 8):
        raise Unsupported(f"codes of {bits} bits: the kernel takes 4 and 8")
    inputs = codes.shape[1] * 8 // bits
    _check(x, codes, columns, inputs)
    count, groups = grid.shape[:2]
    if (count, *grid.shape[2:]) != (len(codes), 2, codes.shape[2]) or not groups or codes.shape[1] % groups:
        raise Unsupported(
            f"a grid {grid.shape} does not divide codes {codes.shape} of {bits} bits into groups"
        )
    flat = x.reshape(-1, inputs)
    check_name(implementation, "cpu")
    if implementation == "reference":
        weights = reference.dequantize(codes, grid, bits, columns)
        out = jnp.dot(flat, weights, preferred_element_type=jnp.float32).astype(x.dtype)
    else:
        if not x.dtype == grid.dtype == jnp.float32 or codes.dtype != jnp.uint8:
            raise Unsupported(
                f"x is {x.dtype}, codes are {codes.dtype}, their grid is {grid.dtype}: "
                "the kernel takes float32, uint8 and float32"
            )
        _check_width(codes)
        out = _code_product(flat, codes, grid, bits, columns)
    return out.reshape(*x.shape[:-1], columns)


def _check(x: jax.Array, panels: jax.Array, columns: int, inputs: int) -> None:
    count, _, width = panels.shape
    if x.shape[-1] != inputs:
        raise Unsupported(f"x has {x.shape[-1]} columns, the weights have {inputs} rows")
    if not inputs:
        raise Unsupported("the weights have no rows")
    if not (count - 1) * width < columns <= count * width:
        raise Unsupported(f"{count} panels of {width} columns do not hold {columns} columns")


def _check_width(panels: jax.Array) -> None:
    if panels.shape[2] != panel_columns():
        raise Unsupported(f"panels of {panels.shape[2]} columns: this processor's have {panel_columns()}")


def panel_columns() -> int:
    """Columns of a panel for this machine's processor.

    Raises `Unsupported` where there is no kernel for it.
    """
    with needs_llvm():
        from kernels_pallas.skinny_matmul import cpu
    cpu.register(cpu.lanes())
    return cpu.panel_columns()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, panels: jax.Array, columns: int) -> jax.Array:
    """x [M, K] -> [M, columns]."""
    from kernels_pallas.skinny_matmul import cpu

    return cpu.skinny_matmul(x, panels, columns)


def _forward(x: jax.Array, panels: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    return _product(x, panels, columns), panels


def _backward(columns: int, panels: jax.Array, d_out: jax.Array) -> tuple[jax.Array, None]:
    return d_out @ reference.unpack(panels, columns).T, None


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _code_product(x: jax.Array, codes: jax.Array, grid: jax.Array, bits: int, columns: int) -> jax.Array:
    """x [M, K] -> [M, columns]."""
    from kernels_pallas.skinny_matmul import codes as code_kernel

    return code_kernel.skinny_code_matmul(x, codes, grid, bits, columns)


def _code_forward(
    x: jax.Array, codes: jax.Array, grid: jax.Array, bits: int, columns: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _code_product(x, codes, grid, bits, columns), (codes, grid)


def _code_backward(
    bits: int, columns: int, weights: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, None, None]:
    return d_out @ reference.dequantize(*weights, bits, columns).T, None, None


_code_product.defvjp(_code_forward, _code_backward)
