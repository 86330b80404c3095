"""What drafters with heads share: an output head of their own that starts as the target's, best guesses."""

from typing import Any

import jax
import jax.numpy as jnp

from research.decoding.proposers import Target
from research.nn import weights


def copy_head(target: Target) -> Any:
    """The parameters that the target's head reads: `head`, or `embedding` where the two are tied.

    A structured kernel (quantized, say) is copied as the array it stands for. Of a model that reads images they are its
    own, or those of its `decoder`; of one with two towers those of the tower that it `writes`.
    """
    own = any(name in target.params for name in ("head", "embedding"))
    part = getattr(target.model, "writes", "decoder")
    params = target.params if own else target.params[part]
    name = "head" if "head" in params else "embedding"
    kernels = jax.tree.map(
        weights.materialize, params[name], is_leaf=lambda leaf: isinstance(leaf, weights.Weight)
    )
    copied = {name: jax.tree.map(jnp.copy, kernels)}
    return copied if own else {part: copied}


def head_logits(target: Target, head: Any, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> float32 logits [..., V] by the target's own rule with the parameters of `copy_head`."""
    return target.replace(params=head).logits(hidden)


def best(logits: jax.Array, count: int) -> jax.Array:
    """logits [..., V] -> the `count` best tokens int32[..., count], the first of equals first."""
    return jax.lax.top_k(logits, count)[1]


def at(x: jax.Array, place: jax.Array) -> jax.Array:
    """x [B, N, ...], place int32[B] -> x[b, place[b]]."""
    return x[jnp.arange(x.shape[0]), place]
