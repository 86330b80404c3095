"""Decode attention in the catalogue: one token of models with 32 heads on 8 behind long caches."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.decode_attention.api import decode_attention, gather_attention


def make(
    key: jax.Array, *, batch: int, heads: int, kv_heads: int, count: int, slots: int, dim: int, dtype: str
) -> tuple:
    """A full cache."""
    keys = jax.random.split(key, 3)
    query = jax.random.normal(keys[0], (batch, heads, count, dim), dtype)
    cached = (jax.random.normal(k, (batch, kv_heads, slots, dim), dtype) for k in keys[1:])
    return query, *cached, jnp.full(batch, slots, jnp.int32)


def make_lists(key: jax.Array, *, sets: int, entries: int, page: int, **sizes) -> tuple:
    """Full lists, of `page` slots an entry."""
    query, keys, values, length = make(key, **sizes)
    batch, pages = sizes["batch"], sizes["slots"] // page
    indices = jax.random.randint(key, (batch, sets, entries), 0, pages)
    return query, keys, values, indices, jnp.full(batch, entries, jnp.int32), length


def _cost(s, sets: int, keys: int) -> Cost:
    """`sets` lists of keys a row are read; the results are float32."""
    size = jnp.dtype(s["dtype"]).itemsize
    rows = s["batch"] * s["heads"] * s["count"]
    moved = 2 * s["batch"] * sets * keys * s["dim"] * size + rows * (s["dim"] * (size + 4) + 4)
    return Cost(4 * rows * keys * s["dim"], moved)


def cost(case: Case) -> Cost:
    return _cost(case.sizes, case.sizes["kv_heads"], case.sizes["slots"])


def gather_cost(case: Case) -> Cost:
    s = case.sizes
    read = _cost(s, s["sets"], s["entries"] * s["page"])
    return Cost(read.flops, read.bytes + 4 * s["batch"] * s["sets"] * s["entries"])


def _sizes(
    batch: int, heads: int, kv_heads: int, slots: int, dim: int, dtype: str = "bfloat16", count=1
) -> dict:
    return dict(batch=batch, heads=heads, kv_heads=kv_heads, count=count, slots=slots, dim=dim, dtype=dtype)


def _lists(name: str, kind, sizes: dict, sets: int, entries: int, page: int) -> Case:
    lists = dict(sets=sets, entries=entries, page=page)
    return Case(name, kind, sizes | lists, dict(page=page))


DENSE = Kernel(
    "decode_attention",
    decode_attention,
    partial(decode_attention, implementation="reference"),
    make,
    cost,
    cases=(
        Case("32 heads on 8, 16 rows of 8192", "decode", _sizes(16, 32, 8, 8192, 128)),
        Case("32 heads on 8, one row of 131072", "decode", _sizes(1, 32, 8, 131_072, 128)),
        Case("12 heads of 64, 1000 slots, float32", "decode", _sizes(4, 12, 12, 1000, 64, "float32")),
    ),
    small=Case("4 heads on 2", "small", _sizes(2, 4, 2, 512, 32, "float32")),
)
GATHER = Kernel(
    "gather_attention",
    gather_attention,
    partial(gather_attention, implementation="reference"),
    make_lists,
    gather_cost,
    cases=(
        _lists(
            "512 of 131072 slots, each head its own", "decode", _sizes(1, 32, 8, 131_072, 128), 32, 512, 1
        ),
        _lists("512 of 8192 slots, 16 rows", "decode", _sizes(16, 32, 8, 8192, 128), 8, 512, 1),
        _lists("128 pages of 16, 16 rows of 8192", "decode", _sizes(16, 32, 8, 8192, 128), 8, 128, 16),
        _lists("64 pages of 64, float32", "decode", _sizes(1, 12, 12, 16_384, 64, "float32"), 12, 64, 64),
    ),
    small=_lists("32 of 512 slots", "small", _sizes(2, 4, 2, 512, 32, "float32"), 2, 32, 1),
)
KERNEL = (DENSE, GATHER)
