"""Span attention in the catalogue: prompts and training steps of models with 32 heads, causal and in MoA's spans."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.span_attention.api import span_attention


def make(
    key: jax.Array, *, batch: int, heads: int, kv_heads: int, length: int, dim: int, dtype: str
) -> tuple:
    """query, key and value."""
    shapes = ((batch, h, length, dim) for h in (heads, kv_heads, kv_heads))
    return tuple(
        jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)
    )


def visible_pairs(case: Case) -> int:
    """Of a query and a key, in all heads of one row of the batch."""
    place = np.arange(case.sizes["length"])
    total = 0
    for window, sink in zip(
        *(np.broadcast_to(case.options[x], case.sizes["heads"]) for x in ("window", "sink")), strict=True
    ):
        outside = np.maximum(place + 1 - window, 0)  # keys before the window
        total += int(np.sum(place + 1 - outside + np.minimum(outside, sink)))
    return total


def cost(case: Case) -> Cost:
    """Two products of a visible pair forward, and five backward, where its score is computed again."""
    s = case.sizes
    product = 2 * s["batch"] * visible_pairs(case) * s["dim"]
    row = s["batch"] * s["length"] * s["dim"] * jnp.dtype(s["dtype"]).itemsize
    query, keys = s["heads"] * row, 2 * s["kv_heads"] * row
    forward = Cost(2 * product, 2 * query + keys)
    if not case.gradient:
        return forward
    # The output, its gradient, queries and keys are read; gradients of queries and keys are written.
    return Cost(7 * product, forward.bytes + 4 * query + 2 * keys)


def _sizes(batch: int, heads: int, kv_heads: int, length: int, dim: int, dtype: str = "bfloat16") -> dict:
    return dict(batch=batch, heads=heads, kv_heads=kv_heads, length=length, dim=dim, dtype=dtype)


# A quarter of the heads each: half a kilotoken, one, four, and everything up to 8192.
SPANS = dict(window=(512,) * 8 + (1024,) * 8 + (4096,) * 8 + (8192,) * 8, sink=64)
CAUSAL = dict(window=8192, sink=0)

KERNEL = Kernel(
    "span_attention",
    span_attention,
    partial(span_attention, implementation="reference"),
    make,
    cost,
    cases=(
        Case("32 heads on 8, causal", "prefill", _sizes(1, 32, 8, 8192, 128), CAUSAL),
        Case("32 heads on 8, spans", "prefill", _sizes(1, 32, 8, 8192, 128), SPANS),
        Case("32 heads on 8, spans", "training", _sizes(1, 32, 8, 4096, 128), SPANS, gradient=True),
        Case(
            "12 heads of 64, window 256",
            "training",
            _sizes(8, 12, 12, 1000, 64),
            dict(window=256, sink=4),
            gradient=True,
        ),
    ),
    small=Case(
        "4 heads on 2", "small", _sizes(1, 4, 2, 256, 32, "float32"), dict(window=(32, 64, 128, 256), sink=4)
    ),
    implementations=("tpu", "gpu", "cpu"),
)
