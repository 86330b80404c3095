"""The quantized product in the catalogue: the up-projection of an 8B decoder, groups of 128 rows."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.quantized_matmul.api import quantized_matmul
from kernels_pallas.quantized_matmul.packing import pack


def make(key: jax.Array, *, count: int, rows: int, columns: int, bits: int, group: int, dtype: str) -> tuple:
    """Activations [count, rows] and packed weights [rows, columns]; scales and zeros in the activations' dtype."""
    keys = jax.random.split(key, 3)
    codes = jax.random.randint(keys[0], (rows, columns), 0, 2**bits)
    scale = jax.random.uniform(keys[1], (rows // group, columns), dtype)
    weights = pack(codes, scale, jnp.full(scale.shape, 2 ** (bits - 1), dtype), bits=bits)
    return jax.random.normal(keys[2], (count, rows), dtype), weights


def cost(case: Case) -> Cost:
    s = case.sizes
    size = jnp.dtype(s["dtype"]).itemsize
    flops = 2 * s["count"] * s["rows"] * s["columns"]
    groups = 2 * s["rows"] // s["group"] * s["columns"] * size  # scales and zeros
    weights = s["rows"] * s["columns"] * s["bits"] / 8 + groups
    moved = weights + s["count"] * (s["rows"] + s["columns"]) * size
    passes = 2 if case.gradient else 1  # the gradient of the activations reads the weights again
    return Cost(passes * flops, passes * moved)


def _sizes(
    count: int, bits: int, rows: int = 4096, columns: int = 14336, group=128, dtype="bfloat16"
) -> dict:
    return dict(count=count, rows=rows, columns=columns, bits=bits, group=group, dtype=dtype)


KERNEL = Kernel(
    "quantized_matmul",
    quantized_matmul,
    partial(quantized_matmul, implementation="reference"),
    make,
    cost,
    cases=(
        Case("1 token, 8 bits", "decode", _sizes(1, 8)),
        Case("1 token, 4 bits", "decode", _sizes(1, 4)),
        Case("1 token, 2 bits", "decode", _sizes(1, 2)),
        Case("64 tokens, 4 bits", "decode", _sizes(64, 4)),
        Case("2048 tokens, 4 bits", "prefill", _sizes(2048, 4)),
        Case("2048 tokens, 4 bits, adapters", "training", _sizes(2048, 4), gradient=True),
    ),
    small=Case("16 tokens, 4 bits", "small", _sizes(16, 4, 512, 512, 64, "float32")),
)
