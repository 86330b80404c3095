"""The skinny product: which implementation runs, and what it can compute."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported
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
    count, inputs, width = panels.shape
    if x.shape[-1] != inputs:
        raise Unsupported(f"x has {x.shape[-1]} columns, the weights have {inputs} rows")
    if not inputs:
        raise Unsupported("the weights have no rows")
    if not (count - 1) * width < columns <= count * width:
        raise Unsupported(f"{count} panels of {width} columns do not hold {columns} columns")
    flat = x.reshape(-1, inputs)
    if implementation == "reference":
        out = reference.skinny_matmul(flat, panels, columns)
    elif implementation == "cpu":
        if not x.dtype == panels.dtype == jnp.float32:
            raise Unsupported(f"x is {x.dtype}, the weights are {panels.dtype}: the kernel takes float32")
        if width != panel_columns():
            raise Unsupported(f"panels of {width} columns: this processor's have {panel_columns()}")
        out = _product(flat, panels, columns)
    else:
        raise Unsupported(f"no implementation {implementation!r}: there are reference and cpu")
    return out.reshape(*x.shape[:-1], columns)


def panel_columns() -> int:
    """Columns of a panel for this machine's processor.

    Raises `Unsupported` where there is no kernel for it.
    """
    try:
        # Imported here: only programs that decode on a CPU need LLVM.
        from kernels_pallas.skinny_matmul import cpu
    except ImportError as error:
        raise Unsupported(f"llvmlite is missing ({error}); pip install llvmlite") from error
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
