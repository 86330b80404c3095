"""The grouped product in the catalogue: experts of Mixtral and of a model with many narrow ones; on a CPU, of 4,096
tokens with two experts each."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.grouped_matmul.api import grouped_matmul


def make(key: jax.Array, *, rows: int, features: int, columns: int, groups: int, dtype: str) -> tuple:
    """Equal groups, the last one larger by what is left."""
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (rows, features), dtype)
    weights = jax.random.normal(keys[1], (groups, features, columns), dtype)
    sizes = jnp.full(groups, rows // groups, jnp.int32).at[-1].add(rows % groups)
    return x, weights, sizes


def cost(case: Case) -> Cost:
    s = case.sizes
    size = jnp.dtype(s["dtype"]).itemsize
    flops = 2 * s["rows"] * s["features"] * s["columns"]
    weights = min(s["groups"], s["rows"]) * s["features"] * s["columns"] * size
    rows = s["rows"] * (s["features"] + s["columns"]) * size
    if not case.gradient:
        return Cost(flops, weights + rows)
    # dx reads the weights again, dW is as large; each reads two arrays of rows, and dx is one more.
    more = s["rows"] * (2 * s["features"] + 2 * s["columns"]) * size
    return Cost(3 * flops, 3 * weights + rows + more)


def _sizes(rows: int, features: int, columns: int, groups: int, dtype: str = "bfloat16") -> dict:
    return dict(rows=rows, features=features, columns=columns, groups=groups, dtype=dtype)


ANYWHERE = Kernel(
    "grouped_matmul",
    grouped_matmul,
    partial(grouped_matmul, implementation="reference"),
    make,
    cost,
    cases=(
        Case("Mixtral, 16 tokens", "decode", _sizes(32, 4096, 14336, 8)),
        Case("Mixtral, 4096 tokens", "prefill", _sizes(8192, 4096, 14336, 8)),
        Case("64 experts of 1408", "training", _sizes(24576, 2048, 1408, 64), gradient=True),
    ),
    small=Case("8 experts", "small", _sizes(512, 128, 256, 8, "float32")),
)

CPU = Kernel(
    "grouped_matmul_cpu",
    grouped_matmul,
    partial(grouped_matmul, implementation="reference"),
    make,
    cost,
    cases=tuple(
        Case(
            f"8 experts, {features} to {columns}",
            "training",
            _sizes(8192, features, columns, 8, "float32"),
            gradient=gradient,
        )
        for features, columns in ((128, 256), (512, 1024))
        for gradient in (False, True)
    ),
    small=Case("8 experts", "small", _sizes(100, 40, 48, 8, "float32"), gradient=True),
    implementations=("cpu",),
)
KERNEL = (ANYWHERE, CPU)
