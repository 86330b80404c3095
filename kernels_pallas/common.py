"""What all kernels share: for which platform they are traced, which implementation runs, small parts of their code."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["reference", "tpu", "gpu", "cpu"]


def target_platform() -> str:
    """The platform that a function is being traced for (cpu, gpu, tpu): the one thing to ask for who is computed
    differently on another.

    That of the devices of the mesh around it (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), which may be absent;
    without a mesh, the default backend's. Meshes are part of the keys of jit's caches, so what was traced for one
    platform is not used on another.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


class Unsupported(ValueError):
    """The implementation asked for cannot compute these shapes or dtypes, or not on this backend."""


def choose(
    kernel: str, implementation: Implementation | None, kernels: tuple[Implementation, ...] = ("tpu", "gpu")
) -> Implementation:
    """The implementation that runs: the one asked for, by default the kernel of the target platform, one of `kernels`.

    Raises `Unsupported` for a platform without a kernel and for a name that there is not.
    """
    *others, last = kernels
    if implementation is None:
        platform = target_platform()
        if platform not in kernels:
            raise Unsupported(
                f"no {kernel} kernel for the backend {platform!r}: there are {', '.join(others)} and {last}; "
                "implementation='reference' runs everywhere"
            )
        return platform
    check_name(implementation, *kernels)
    return implementation


def check_name(implementation: Implementation, *kernels: Implementation) -> None:
    """Raises `Unsupported` for a name that is neither the reference's nor one of `kernels`."""
    if implementation not in ("reference", *kernels):
        *names, last = ("reference", *kernels)
        raise Unsupported(f"no implementation {implementation!r}: there are {', '.join(names)} and {last}")


@contextlib.contextmanager
def needs_llvm() -> Iterator[None]:
    """Around the import of a kernel for a CPU, in the function that calls it: other programs need no LLVM.

    Raises `Unsupported` where it is missing.
    """
    try:
        yield
    except ImportError as error:
        raise Unsupported(f"llvmlite is missing ({error}); pip install llvmlite") from error


def pad_axis(x: jax.Array, axis: int, size: int, value: float | bool = 0) -> jax.Array:
    """x with `value` behind it along `axis`, up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return x if widths[axis] == (0, 0) else jnp.pad(x, widths, constant_values=value)


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 operands are multiplied as float32, not in the hardware's reduced form."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
