"""The product with coded ternary weights in the catalogue: an expert of the switch transformers QMoE compresses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.qmoe_decode.api import qmoe_matmul
from kernels_pallas.qmoe_decode.coded import Coded
from kernels_pallas.qmoe_decode.dictionary import P0, encode

_RATE = 0.77  # bits a weight, about what rows of this length take


def make(key: jax.Array, *, count: int, rows: int, columns: int, dtype: str) -> tuple:
    """Activations [count, columns] and coded weights [rows, columns], as many zeros as the dictionary expects."""
    total = int(rows * columns * _RATE / 16)
    x = jax.random.normal(key, (count, columns), dtype)
    if isinstance(key, jax.core.Tracer):  # shapes alone: what is coded has no shape before it is there
        codes, offsets = jnp.zeros((total,), jnp.uint16), jnp.zeros((rows + 1,), jnp.int32)
    else:
        other = (1 - P0) / 2
        symbols = np.random.default_rng(0).choice(3, (rows, columns), p=[P0, other, other]).astype(np.uint8)
        codes, offsets = map(jnp.asarray, encode(symbols))
    return x, Coded(
        codes, offsets, jnp.ones((rows, 2), jnp.bfloat16) * jnp.array([-1, 1], jnp.bfloat16), columns
    )


def cost(case: Case) -> Cost:
    s = case.sizes
    size = jnp.dtype(s["dtype"]).itemsize
    weights = s["rows"] * s["columns"] * _RATE / 8 + 8 * s["rows"]
    return Cost(
        2 * s["count"] * s["rows"] * s["columns"], weights + s["count"] * (s["rows"] + s["columns"]) * size
    )


def _sizes(count: int, rows: int, columns: int, dtype: str = "bfloat16") -> dict:
    return dict(count=count, rows=rows, columns=columns, dtype=dtype)


KERNEL = Kernel(
    "qmoe_decode",
    qmoe_matmul,
    partial(qmoe_matmul, implementation="reference"),
    make,
    cost,
    cases=(
        Case("1 token, wi of base-128", "decode", _sizes(1, 3072, 768)),
        Case("1 token, wo of c-2048", "decode", _sizes(1, 2080, 6144)),
        Case("8 tokens, wo of c-2048", "decode", _sizes(8, 2080, 6144)),
    ),
    small=Case("1 token", "small", _sizes(1, 256, 512, "float32")),
)
