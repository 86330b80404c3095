"""The dense product in the catalogue: projections of a training step of 4,096 tokens, forward and with gradients."""

import jax

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.matmul import reference
from kernels_pallas.matmul.api import matmul


def make(key: jax.Array, *, rows: int, inputs: int, columns: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(key)
    return jax.random.normal(first, (rows, inputs), dtype), jax.random.normal(
        second, (inputs, columns), dtype
    )


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    return reference.matmul(x, w, False)


def cost(case: Case) -> Cost:
    rows, inputs, columns = (case.sizes[name] for name in ("rows", "inputs", "columns"))
    read = inputs * (rows + columns)
    if case.gradient:  # three products; x, w and the gradient are read again, those of x and w are written
        return Cost(6 * rows * inputs * columns, 4 * (3 * read + 2 * rows * columns))
    return Cost(2 * rows * inputs * columns, 4 * (read + rows * columns))


def _case(inputs: int, columns: int, gradient: bool) -> Case:
    sizes = dict(rows=4096, inputs=inputs, columns=columns, dtype="float32")
    return Case(f"{inputs} to {columns}", "training", sizes, gradient=gradient)


KERNEL = Kernel(
    "matmul",
    matmul,
    plain,
    make,
    cost,
    cases=tuple(
        _case(*sizes, gradient)
        for sizes in ((128, 512), (256, 1024), (1024, 256))
        for gradient in (False, True)
    ),
    small=Case("24 rows", "small", dict(rows=24, inputs=40, columns=48, dtype="float32"), gradient=True),
    implementations=("cpu",),
)
