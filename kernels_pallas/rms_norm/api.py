"""RMSNorm: which implementation runs, and what it can compute."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported, check_name, needs_llvm
from kernels_pallas.rms_norm import reference


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    epsilon: float,
    groups: int = 1,
    *,
    implementation: Literal["reference", "cpu"] = "cpu",
) -> jax.Array:
    """x float32[..., D], scale float32[D] -> x / rms(x) * scale, of the shape of x.

    groups: equal parts of D that are normalised each by itself. epsilon joins the mean square.

    On a CPU a row's result has the same bits whatever other rows stand beside it, and the gradient the same bits
    whatever the number of threads. It has a first derivative in reverse mode, and no other.

    Raises `Unsupported` for other dtypes and shapes, and on a processor without a kernel.
    """
    if x.shape[-1:] != scale.shape or groups < 1 or scale.size % groups:
        raise Unsupported(f"x {x.shape} with a scale {scale.shape} does not fall into {groups} groups")
    check_name(implementation, "cpu")
    if implementation == "reference":
        return reference.rms_norm(x, scale, epsilon, groups)
    if not x.dtype == scale.dtype == jnp.float32:
        raise Unsupported(f"x is {x.dtype}, the scale is {scale.dtype}: the kernel takes float32")
    with needs_llvm():
        from kernels_pallas.cpu import lanes
        from kernels_pallas.rms_norm import cpu
    shape = (groups, x.shape[-1] // groups)
    return cpu.rms_norm(x.reshape(-1, *shape), scale.reshape(shape), float(epsilon), lanes()).reshape(x.shape)
