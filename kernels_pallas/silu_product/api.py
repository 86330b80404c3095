"""silu(gate) * up: which implementation runs, and what it can compute."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported, check_name, needs_llvm
from kernels_pallas.silu_product import reference


def silu_product(
    gate: jax.Array, up: jax.Array, *, implementation: Literal["reference", "cpu"] = "cpu"
) -> jax.Array:
    """silu(gate) * up of float32 arrays of one shape (SwiGLU, arXiv 2002.05202, before the last product).

    It has a first derivative in reverse mode, and no other.

    Raises `Unsupported` for other dtypes and shapes, and on a processor without a kernel.
    """
    if gate.shape != up.shape:
        raise Unsupported(f"the gate is {list(gate.shape)}, what it multiplies {list(up.shape)}")
    check_name(implementation, "cpu")
    if implementation == "reference":
        return reference.silu_product(gate, up)
    if not gate.dtype == up.dtype == jnp.float32:
        raise Unsupported(
            f"the gate is {gate.dtype}, what it multiplies {up.dtype}: the kernel takes float32"
        )
    with needs_llvm():
        from kernels_pallas.cpu import lanes
        from kernels_pallas.silu_product import cpu
    return cpu.silu_product(gate.reshape(-1), up.reshape(-1), lanes()).reshape(gate.shape)
