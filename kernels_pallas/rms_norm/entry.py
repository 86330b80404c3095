"""RMSNorm in the catalogue: the residual streams of decoders of 1M to 20M parameters in training."""

from functools import partial

import jax

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.rms_norm.api import rms_norm


def make(key: jax.Array, *, rows: int, width: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(key)
    return jax.random.normal(first, (rows, width), dtype), jax.random.normal(second, (width,), dtype)


def cost(case: Case) -> Cost:
    size = case.sizes["rows"] * case.sizes["width"]
    # Forward x and y; backward x, dy and dx. A square, a sum and two products; two sums of two products, dx of three.
    return Cost((4 + 11 * case.gradient) * size, 4 * (2 + 3 * case.gradient) * size)


def _case(rows: int, width: int, kind: str = "training") -> Case:
    sizes = dict(rows=rows, width=width, dtype="float32")
    return Case(f"{rows} rows of {width}", kind, sizes, dict(epsilon=1e-6), gradient=True)


KERNEL = Kernel(
    "rms_norm",
    rms_norm,
    partial(rms_norm, implementation="reference"),
    make,
    cost,
    cases=(_case(4096, 128), _case(4096, 256), _case(2048, 384)),
    small=_case(64, 100, "small"),
    implementations=("cpu",),
)
