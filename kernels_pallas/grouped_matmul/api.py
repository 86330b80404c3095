"""The grouped product: which implementation runs, and what it can compute."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import Implementation, Unsupported, choose, needs_llvm
from kernels_pallas.grouped_matmul import reference


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    sizes: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The first sizes[0] rows of x times weights[0], the next sizes[1] times weights[1], and so on; the rest is 0.

    Args:
        x: [M, K].
        weights: [E, K, N].
        sizes: int32[E], any of them 0; their sum is at most M.
        implementation: None takes the kernel of the default backend, TPU or GPU; "cpu", for float32, is taken where
            it is asked for. There every element is one chain of fused multiply-adds in the order of the sum.
        interpret: run the kernel in Pallas' interpreter, on any backend.

    Returns:
        [M, N] in the dtype of x, accumulated in float32; with gradients of x and weights.

    Raises:
        Unsupported: there is no such kernel for the backend, or it cannot compute these arguments. Another
            implementation is never taken instead.
    """
    if implementation != "cpu":
        implementation = choose("grouped matmul", implementation)
    rows, features = x.shape
    if weights.ndim != 3 or weights.shape[1] != features:
        raise Unsupported(f"weights have shape {weights.shape}, expected [groups, {features}, columns]")
    if sizes.shape != weights.shape[:1]:
        raise Unsupported(f"sizes has shape {sizes.shape}, expected {weights.shape[:1]}")
    if implementation == "reference":
        return reference.grouped_matmul(x, weights, sizes)
    for name, array in {"x": x, "weights": weights}.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise Unsupported(f"{name} is {array.dtype}: the kernels take float32 and bfloat16")
    if not rows:
        raise Unsupported("x has no rows")
    if implementation == "cpu":
        if not x.dtype == weights.dtype == jnp.float32:
            raise Unsupported(
                f"x is {x.dtype}, weights are {weights.dtype}: the kernel for a CPU takes float32"
            )
        if not weights.size:
            raise Unsupported(f"weights {weights.shape} are empty")
        return _cpu_kernel()(x, weights, jnp.cumsum(sizes) - sizes, sizes)
    _kernel(implementation).check(*weights.shape[1:])
    return _product(x, weights, sizes, implementation, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x, weights, sizes, implementation: Implementation, interpret: Any) -> jax.Array:
    return _kernel(implementation).product(x, weights, sizes, interpret=interpret)


def _product_forward(x, weights, sizes, implementation: Implementation, interpret: Any):
    return _product(x, weights, sizes, implementation, interpret), (x, weights, sizes)


def _product_backward(implementation: Implementation, interpret: Any, saved, d_out: jax.Array):
    """dx is the product with the transposed matrices; a matrix's gradient is that of its group's rows, x^T d_out."""
    x, weights, sizes = saved
    kernel = _kernel(implementation)
    dx = kernel.product(d_out, weights, sizes, transposed=True, interpret=interpret)
    return dx, kernel.weights_gradient(x, d_out, sizes, weights.dtype, interpret=interpret), None


_product.defvjp(_product_forward, _product_backward)


def _kernel(implementation: Implementation):
    # Imported here: Pallas takes half a second to import, and most programs run no kernel.
    if implementation == "tpu":
        from kernels_pallas.grouped_matmul import tpu as kernel
    else:
        from kernels_pallas.grouped_matmul import gpu as kernel
    return kernel


def _cpu_kernel():
    with needs_llvm():
        from kernels_pallas.grouped_matmul import cpu_training
    return cpu_training.grouped_dot
