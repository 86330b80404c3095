"""What a model costs: parameters, bytes, FLOPs. Every claim and plan counts with these."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def count_parameters(params: PyTree) -> int:
    """Number of array elements in a parameter tree (arrays or shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_bytes(params: PyTree) -> int:
    """Bytes that the arrays of a tree take in memory."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def count_flops(function: Callable[..., Any], *args: PyTree) -> float:
    """FLOPs of one call, by XLA's own count over the traced program; nothing is compiled or run.

    Args are arrays or `jax.ShapeDtypeStruct`s. A multiply and an add are two. Loops (`scan`, `while`) count once:
    unroll layers to count them all.
    """
    return float(jax.jit(function).lower(*args).cost_analysis()["flops"])
