"""The quantized product: which implementation runs, and what it can compute."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import Implementation, Unsupported, choose, pad_axis
from kernels_pallas.quantized_matmul import reference
from kernels_pallas.quantized_matmul.packing import Packed


def quantized_matmul(
    x: jax.Array,
    weights: Packed,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [..., K] times packed weights [K, N] -> [..., N] in the dtype of x, accumulated in float32.

    Weights are frozen: the gradient reaches x alone. implementation: None takes the kernel of the default backend.
    interpret: run the kernel in Pallas' interpreter, on any backend.

    Raises `Unsupported` where there is no such kernel for the backend, or it cannot compute these arguments. Another
    implementation is never taken instead.
    """
    implementation = choose("quantized matmul", implementation)
    rows, columns = weights.shape
    if x.shape[-1] != rows:
        raise Unsupported(f"x has {x.shape[-1]} columns, the weights have {rows} rows")
    flat = x.reshape(-1, rows)
    if implementation == "reference":
        out = reference.quantized_matmul(flat, weights)
    else:
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise Unsupported(f"x is {x.dtype}: the kernels take float32 and bfloat16")
        _kernel(implementation).check(weights)
        out = _product(pad_axis(flat, 1, weights.padded), weights, implementation, interpret)
    return out.reshape(*x.shape[:-1], columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, weights: Packed, implementation: Implementation, interpret: Any) -> jax.Array:
    """x [M, padded] -> [M, N]."""
    return _kernel(implementation).forward(x, weights, interpret=interpret)


def _product_forward(x: jax.Array, weights: Packed, implementation: Implementation, interpret: Any):
    return _product(x, weights, implementation, interpret), weights


def _product_backward(implementation: Implementation, interpret: Any, weights: Packed, d_out: jax.Array):
    return _kernel(implementation).backward(d_out, weights, interpret=interpret), None


_product.defvjp(_product_forward, _product_backward)


def _kernel(implementation: Implementation):
    # Imported here: Pallas takes half a second to import, and most programs run no kernel.
    if implementation == "tpu":
        from kernels_pallas.quantized_matmul import tpu as kernel
    else:
        from kernels_pallas.quantized_matmul import gpu as kernel
    return kernel
