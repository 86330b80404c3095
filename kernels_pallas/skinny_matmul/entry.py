"""The skinny product in the catalogue: kernels of decoders of 1M to 1B parameters."""

import jax

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.skinny_matmul import reference
from kernels_pallas.skinny_matmul.api import panel_columns, skinny_matmul


def make(key: jax.Array, *, rows: int, inputs: int, panels: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Panels that are all whole."""
    first, second = jax.random.split(key)
    x = jax.random.normal(first, (rows, inputs), dtype)
    return x, jax.random.normal(second, (panels, inputs, panel_columns()), dtype)


def whole(x: jax.Array, panels: jax.Array, **options) -> jax.Array:
    return skinny_matmul(x, panels, panels.shape[0] * panels.shape[2], **options)


def plain(x: jax.Array, panels: jax.Array) -> jax.Array:
    return reference.skinny_matmul(x, panels, panels.shape[0] * panels.shape[2])


def cost(case: Case) -> Cost:
    s = case.sizes
    columns = s["panels"] * panel_columns()
    return Cost(
        2 * s["rows"] * s["inputs"] * columns,
        4 * (s["inputs"] * columns + s["rows"] * (s["inputs"] + columns)),
    )


def _case(rows: int, inputs: int, panels: int) -> Case:
    name = f"{rows} row{'s' * (rows > 1)} of {inputs}, {panels} panels"
    return Case(name, "decode", dict(rows=rows, inputs=inputs, panels=panels, dtype="float32"))


KERNEL = Kernel(
    "skinny_matmul",
    whole,
    plain,
    make,
    cost,
    cases=tuple(_case(rows, 512, 86) for rows in (1, 4, 8, 16))
    + tuple(_case(rows, 2048, 171) for rows in (1, 8)),
    small=_case(8, 128, 8),
    implementations=("cpu",),
)
