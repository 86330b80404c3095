"""The product with coded ternary weights: which implementation runs, and what it can compute."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import Implementation, Unsupported, choose
from kernels_pallas.qmoe_decode import reference
from kernels_pallas.qmoe_decode.coded import Coded

TOKENS = (
    64  # at most: every block of rows is decoded anew for a few tokens; for more, decode once and multiply
)


def qmoe_matmul(
    x: jax.Array,
    weights: Coded,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [..., in] times coded weights [out, in] -> [..., out] in the dtype of x, accumulated in float32. No gradient.

    implementation: None takes the kernel of the default backend. interpret: run the kernel in Pallas' interpreter, on
    any backend.

    Raises `Unsupported` where there is no such kernel for the backend, or it cannot compute these arguments. Another
    implementation is never taken instead.
    """
    implementation = choose("QMoE decode", implementation)
    rows, width = weights.shape
    if x.shape[-1] != width:
        raise Unsupported(f"x has {x.shape[-1]} columns, the weights have {width}")
    flat = x.reshape(-1, width)
    if implementation == "reference":
        out = reference.qmoe_matmul(flat, weights)
    else:
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise Unsupported(f"x is {x.dtype}: the kernels take float32 and bfloat16")
        if flat.shape[0] > TOKENS:
            raise Unsupported(
                f"{flat.shape[0]} tokens: the kernels take at most {TOKENS}; decode once for more"
            )
        # Imported here: Pallas takes half a second to import, and most programs run no kernel.
        if implementation == "tpu":
            from kernels_pallas.qmoe_decode import tpu as kernel
        else:
            from kernels_pallas.qmoe_decode import gpu as kernel
        out = kernel.forward(flat, weights, interpret=interpret)
    return out.reshape(*x.shape[:-1], rows)
