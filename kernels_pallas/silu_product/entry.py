"""silu(gate) * up in the catalogue: hidden layers of 4,096 tokens in training."""

import jax

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.silu_product import reference
from kernels_pallas.silu_product.api import silu_product


def make(key: jax.Array, *, rows: int, width: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    gate, up = jax.random.normal(key, (2, rows, width), dtype)
    return gate, up


def cost(case: Case) -> Cost:
    size = case.sizes["rows"] * case.sizes["width"]
    # Four operations a number and an exponential; backward reads three arrays and writes two.
    return Cost(15 * size, 4 * 8 * size) if case.gradient else Cost(5 * size, 4 * 3 * size)


KERNEL = Kernel(
    "silu_product",
    silu_product,
    reference.silu_product,
    make,
    cost,
    cases=tuple(
        Case(f"4096 x {width}", "training", dict(rows=4096, width=width, dtype="float32"), gradient=True)
        for width in (512, 1024)
    ),
    small=Case("5 x 7", "small", dict(rows=5, width=7, dtype="float32"), gradient=True),
    implementations=("cpu",),
)
