"""Whether the kernels for a CPU (`kernels_pallas.cpu`) compute what a model trains and decodes."""

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.common import target_platform
from kernels_pallas.matmul import matmul
from kernels_pallas.skinny_matmul import Unsupported, panel_columns
from research.errors import UserError

_allowed = contextvars.ContextVar("cpu_kernels_allowed", default=True)
# From where on the dense product's kernel pays: fewer rows are the skinny product's.
_ROWS, _PRODUCTS = 48, 1 << 20
PRODUCT = "dense_product"
"""Under which name rematerialisation knows a product of the kernel: to jax it is a call like any other."""


@contextlib.contextmanager
def without_cpu_kernels() -> Iterator[None]:
    """What is traced inside has no kernels for a CPU: for those who read or count the program.

    Trace a function of your own: jax keeps what it traced of a function, inside or outside, and takes it again.
    """
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def dense_product(x: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
    """x [..., in] times kernel [in, out], or [out, in] where `transposed` -> float32[..., out], summed in float32.

    Training on a CPU takes the kernel for many rows.
    """
    rows = x.size // max(x.shape[-1], 1)
    large = rows >= _ROWS and rows * kernel.size >= _PRODUCTS

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        contract = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
        return jax.lax.dot_general(x, kernel, contract, preferred_element_type=jnp.float32)

    if large and x.dtype == kernel.dtype == jnp.float32 and kernel.ndim == 2:
        out = trained_by(functools.partial(matmul, transposed=transposed), plain)(x, kernel)
        return checkpoint_name(out, PRODUCT)  # a name inside of the gradient's rules is not seen
    return plain(x, kernel)


def trained_by(kernel: Callable[..., jax.Array], plain: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Computes `plain`, and where a gradient is taken and there are kernels for a CPU `kernel`, with its derivative.

    A model that is only run keeps XLA's operations, which are as fast there and give a row the same bits among few
    rows and, which are too few for a kernel, alone.
    """
    if not use_cpu_kernels():
        return plain
    function = jax.custom_vjp(plain)
    function.defvjp(lambda *args: jax.vjp(kernel, *args), lambda pull, cotangent: pull(cotangent))
    return function


def use_cpu_kernels() -> bool:
    """They do on a CPU that is alone in jax's mesh (XLA divides no foreign function among devices, and would gather
    arrays that are divided without a mesh being set), unless the environment has LATHE_CPU_KERNELS=off. Where this
    processor has no such kernels, a warning says so once.

    Raises UserError for another value of LATHE_CPU_KERNELS.
    """
    choice = os.environ.get("LATHE_CPU_KERNELS", "on")
    if choice not in ("on", "off"):
        raise UserError(f"LATHE_CPU_KERNELS={choice}: expected on or off")
    alone = jax.sharding.get_abstract_mesh().size <= 1
    wanted = choice == "on" and _allowed.get()
    return wanted and target_platform() == "cpu" and alone and _there_are_kernels()


@functools.cache
def _there_are_kernels() -> bool:
    try:
        panel_columns()
    except Unsupported as error:
        warnings.warn(f"without the kernels for a CPU, and slower: {error}", stacklevel=3)
        return False
    return True
