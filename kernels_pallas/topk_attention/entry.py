"""Top-k selection in the catalogue: the selection layer of TidalDecode behind long caches."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.topk_attention.api import topk_attention


def make(key: jax.Array, *, batch: int, heads: int, kv_heads: int, slots: int, dim: int, dtype: str) -> tuple:
    """A full cache."""
    of_query, of_key = jax.random.split(key)
    query = jax.random.normal(of_query, (batch, heads, dim), dtype)
    keys = jax.random.normal(of_key, (batch, kv_heads, slots, dim), dtype)
    return query, keys, jnp.full(batch, slots, jnp.int32)


def cost(case: Case) -> Cost:
    """The scores alone; what finding the largest takes depends on how it is done."""
    s = case.sizes
    size = jnp.dtype(s["dtype"]).itemsize
    scores = s["batch"] * s["heads"] * s["slots"]
    sets = s["heads"] if case.options.get("per", "head") == "head" else s["kv_heads"]
    rows = s["batch"] * (s["kv_heads"] * s["slots"] + s["heads"]) * s["dim"] * size
    return Cost(2 * scores * s["dim"], rows + 4 * s["batch"] * sets * case.options["k"])


def _sizes(batch: int, heads: int, kv_heads: int, slots: int, dim: int, dtype: str = "bfloat16") -> dict:
    return dict(batch=batch, heads=heads, kv_heads=kv_heads, slots=slots, dim=dim, dtype=dtype)


KERNEL = Kernel(
    "topk_attention",
    topk_attention,
    partial(topk_attention, implementation="reference"),
    make,
    cost,
    cases=(
        Case("512 of 131072 slots, each head its own", "decode", _sizes(1, 32, 8, 131_072, 128), dict(k=512)),
        Case(
            "512 of 8192 slots, 16 rows, by group",
            "decode",
            _sizes(16, 32, 8, 8192, 128),
            dict(k=512, per="group"),
        ),
        Case("4096 of 32768 slots", "decode", _sizes(1, 32, 32, 32_768, 128), dict(k=4096)),
    ),
    small=Case("16 of 512 slots", "small", _sizes(2, 4, 2, 512, 32, "float32"), dict(k=16)),
)
