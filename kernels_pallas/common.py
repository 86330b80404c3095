"""What all kernels share: which implementation runs, and small parts of their code."""

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["reference", "tpu", "gpu"]


class Unsupported(ValueError):
    """The implementation asked for cannot compute these shapes or dtypes, or not on this backend."""


def choose(kernel: str, implementation: Implementation | None) -> Implementation:
    """The implementation that runs: the one asked for, by default the kernel of the backend.

    Raises `Unsupported` for a backend without a kernel and for a name that there is not.
    """
    if implementation is None:
        backend = jax.default_backend()
        if backend not in ("tpu", "gpu"):
            raise Unsupported(
                f"no {kernel} kernel for the backend {backend!r}: there are tpu and gpu; "
                "implementation='reference' runs everywhere"
            )
        return backend
    if implementation not in ("reference", "tpu", "gpu"):
        raise Unsupported(f"no implementation {implementation!r}: there are reference, tpu and gpu")
    return implementation


def pad_axis(x: jax.Array, axis: int, size: int, value: float | bool = 0) -> jax.Array:
    """x with `value` behind it along `axis`, up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return x if widths[axis] == (0, 0) else jnp.pad(x, widths, constant_values=value)


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 operands are multiplied as float32, not in the hardware's reduced form."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
