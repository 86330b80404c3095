"""What a model costs: parameters, bytes, FLOPs. Every claim and plan counts with these."""

import re
from collections.abc import Callable
from typing import Any

import jax

from research.nn.cpu_kernels import without_cpu_kernels
from research.nn.weights import StoredWeight, stored_bits

PyTree = Any


def count_parameters(params: PyTree) -> int:
    """Numbers stored in a parameter tree (arrays or shapes): array elements, a packed code being one."""
    return sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=_is_stored))


def count_active_parameters(model: Any, params: PyTree) -> int:
    """Elements that a token meets, see `active_share`; for a model that is no stack of blocks, all of them."""
    share = active_share(model)
    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_stored)
    return round(sum(leaf.size * share(_name(path)) for path, leaf in leaves))


def active_share(model: Any) -> Callable[[str], float]:
    """The part of a parameter, by its path, that a token meets: k / num_experts of what lies below the `experts` of a
    layer that has both fields, and all of everything else."""
    shares = _expert_shares(model)

    def share(path: str) -> float:
        return next((part for pattern, part in shares if pattern.search(path)), 1.0)

    return share


def _is_stored(node: Any) -> bool:
    return isinstance(node, StoredWeight)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def _expert_shares(model: Any, prefix: str = "^") -> list[tuple[re.Pattern[str], float]]:
    """[(pattern of the paths of experts, k / E)] of every layer that has some, unrolled and scanned."""
    blocks = getattr(model, "blocks", ())
    shares = []
    for layer in range(model.num_layers if blocks else 0):
        place = layer % len(blocks)
        for name in ("attention", "mlp"):
            part = getattr(blocks[place], name, None)
            if hasattr(part, "num_experts") and hasattr(part, "k"):
                where = f"{prefix}(layer_{layer}|layers/layer_{place})/{name}/experts/"
                shares.append((re.compile(where), part.k / part.num_experts))
    for name in ("encoder", "decoder"):  # of a model that reads images, a decoder
        if hasattr(model, name):
            shares += _expert_shares(getattr(model, name), f"{prefix}{name}/")
    return shares


def count_bytes(params: PyTree) -> int:
    """Bytes that the arrays of a tree take in memory, structured weights by their `stored_bits`."""
    return stored_bits(params) // 8


def count_flops(function: Callable[..., Any], *args: PyTree) -> float:
    """FLOPs of one call, by XLA's own count over the traced program; nothing is compiled or run.

    Args are arrays or `jax.ShapeDtypeStruct`s. A multiply and an add are two. Loops (`scan`, `while`) count once:
    unroll layers to count them all.
    """
    with without_cpu_kernels():  # XLA counts nothing for a foreign function
        return float(jax.jit(lambda *args: function(*args)).lower(*args).cost_analysis()["flops"])
