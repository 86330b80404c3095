"""Appending rows in the catalogue: one step of decoders of 1M and 40M parameters."""

import jax
import jax.numpy as jnp

from kernels_pallas.append_rows import reference
from kernels_pallas.append_rows.api import append_rows
from kernels_pallas.catalogue import Case, Cost, Kernel


def make(
    key: jax.Array, *, arrays: int, batch: int, heads: int, slots: int, dim: int, count: int, dtype: str
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    buffers = list(jax.random.normal(key, (arrays, batch, heads, slots, dim), dtype))
    rows = list(jax.random.normal(key, (arrays, batch, heads, count, dim), dtype))
    return buffers, rows, jnp.full(batch, slots // 2, jnp.int32)


def cost(case: Case) -> Cost:
    sizes = case.sizes
    return Cost(0, 8 * sizes["arrays"] * sizes["batch"] * sizes["heads"] * sizes["count"] * sizes["dim"])


def _sizes(arrays: int, batch: int, heads: int, slots: int, dim: int, count: int = 1) -> dict:
    sizes = dict(arrays=arrays, batch=batch, heads=heads, slots=slots, dim=dim, count=count)
    return sizes | dict(dtype="float32")


KERNEL = Kernel(
    "append_rows",
    append_rows,
    reference.append_rows,
    make,
    cost,
    cases=(
        Case("4 layers of 4 heads of 32, 8 rows", "decode", _sizes(8, 8, 4, 192, 32)),
        Case("10 layers of 8 heads of 64, 8 rows", "decode", _sizes(20, 8, 8, 192, 64)),
    ),
    small=Case("3 arrays", "small", _sizes(3, 2, 2, 9, 5, 2)),
    implementations=("cpu",),
)
