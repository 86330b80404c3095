"""What the attention kernels share besides tiles: partial results of a softmax, and how they are merged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.tree_attention.common import NEGATIVE


class Partial(NamedTuple):
    """Attention over some of the keys: what `merge` needs to add other keys later.

    out: float32 [..., d], the weighted mean of the values; 0 where no key was visible.
    lse: float32 [...], the logarithm (base e) of the sum of exponentials of the scores; -inf where none was.
    """

    out: jax.Array
    lse: jax.Array


def merge(*parts: Partial) -> Partial:
    """Attention over the keys of all parts together, which must be disjoint; in any order and grouping."""
    return merged(Partial(*(jnp.stack(leaves) for leaves in zip(*parts, strict=True))))


def merged(parts: Partial) -> Partial:
    """The parts along the first axis as one (FlashDecoding)."""
    top = jnp.max(parts.lse, axis=0)
    top = jnp.where(jnp.isneginf(top), 0, top)  # nothing visible in any part
    share = jnp.exp(parts.lse - top)
    total = jnp.sum(share, axis=0)
    out = jnp.sum(share[..., None] * parts.out, axis=0) / jnp.where(total == 0, 1, total)[..., None]
    return Partial(out, top + jnp.log(total))


def finish(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The carry of an online softmax, float32 [R, 1], [R, 1] and [R, d] -> out [R, d] and lse [R, 1].

    A row that saw only masked scores ends with `NEGATIVE` as its greatest. NaN stays NaN.
    """
    greatest, total, weighted = carry
    empty = greatest <= NEGATIVE / 2
    total = jnp.where(empty, 1, total)
    return (
        jnp.where(empty, 0, weighted / total),
        jnp.where(empty, -jnp.inf, greatest + jnp.log(total)),
    )
