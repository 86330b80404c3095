"""Cross-entropy in the catalogue: vocabularies of 256 to 4096."""

from functools import partial

import jax

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.cross_entropy.api import cross_entropy


def make(key: jax.Array, *, rows: int, classes: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(key)
    return jax.random.normal(first, (rows, classes), dtype), jax.random.randint(second, (rows,), 0, classes)


def cost(case: Case) -> Cost:
    size = case.sizes["rows"] * case.sizes["classes"]
    # A maximum, a difference, an exponential of some 16 operations and its sum; again for the gradient, but a product.
    # Logits are read once each way, and the gradient is written.
    return Cost((19 + 18 * case.gradient) * size, 4 * (1 + 2 * case.gradient) * size)


def _case(rows: int, classes: int, kind: str = "training") -> Case:
    sizes = dict(rows=rows, classes=classes, dtype="float32")
    return Case(f"{rows} rows, {classes} classes", kind, sizes, gradient=True)


KERNEL = Kernel(
    "cross_entropy",
    cross_entropy,
    partial(cross_entropy, implementation="reference"),
    make,
    cost,
    cases=(_case(2048, 4096), _case(4096, 1024), _case(4096, 256)),
    small=_case(64, 100, "small"),
    implementations=("cpu",),
)
