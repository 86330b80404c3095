"""Tree attention in the catalogue: one verification step of speculative decoding."""

import jax
import jax.numpy as jnp

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.tree_attention import reference
from kernels_pallas.tree_attention.api import tree_attention


def make(
    key: jax.Array, *, batch: int, heads: int, kv_heads: int, count: int, slots: int, dim: int, dtype: str
) -> tuple:
    """A chain of `count` nodes behind a cache that is full."""
    keys = jax.random.split(key, 5)
    old, new = (batch, kv_heads, slots, dim), (batch, kv_heads, count, dim)
    cached = tuple(jax.random.normal(k, old, dtype) for k in keys[:2])
    fresh = tuple(jax.random.normal(k, new, dtype) for k in keys[2:4])
    query = jax.random.normal(keys[4], (batch, heads, count, dim), dtype)
    tree = jnp.tril(jnp.ones((1, 1, count, count), bool))
    return query, cached, fresh, jnp.full(batch, slots, jnp.int32), tree


def cost(case: Case) -> Cost:
    s = case.sizes
    keys = s["slots"] + s["count"]
    flops = 4 * s["batch"] * s["heads"] * s["count"] * keys * s["dim"]
    rows = 2 * s["heads"] * s["count"] + 2 * s["kv_heads"] * keys  # query and output, keys and values
    return Cost(flops, s["batch"] * rows * s["dim"] * jnp.dtype(s["dtype"]).itemsize)


def plain(*arguments, scale: float | None = None, **options):
    scale = arguments[0].shape[-1] ** -0.5 if scale is None else scale
    return reference.tree_attention(*arguments, scale=scale, **options)


def _sizes(batch: int, heads: int, kv_heads: int, count: int, slots: int, dim: int, dtype="bfloat16") -> dict:
    return dict(batch=batch, heads=heads, kv_heads=kv_heads, count=count, slots=slots, dim=dim, dtype=dtype)


KERNEL = Kernel(
    "tree_attention",
    tree_attention,
    plain,
    make,
    cost,
    cases=(
        Case("one token, 32 heads on 8", "decode", _sizes(8, 32, 8, 1, 8192, 128)),
        Case("64 nodes, 32 heads on 8", "decode", _sizes(8, 32, 8, 64, 8192, 128)),
        Case("16 nodes, 8 heads of 64, float32", "decode", _sizes(1, 8, 8, 16, 2048, 64, "float32")),
    ),
    small=Case("8 nodes, 4 heads on 2", "small", _sizes(2, 4, 2, 8, 512, 32, "float32")),
    implementations=("tpu", "gpu", "cpu"),
)
