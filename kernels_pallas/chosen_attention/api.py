"""Attention that chooses tokens, and over chosen tokens: which implementation runs, and what it can compute.

A choice is int32 [B, s, N, K]: s sets of tokens, one for each query head or each key head. An entry is the slot of a
cached token, S + j the new token j, where S is the cache's slots; -1 is nobody.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.chosen_attention import reference
from kernels_pallas.common import Unsupported, check_name, needs_llvm
from kernels_pallas.tree_attention.common import check_masks, check_rows

Implementation = Literal["reference", "cpu"]


def select_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    length: jax.Array,
    tree: jax.Array,
    cached_mask: jax.Array | None = None,
    *,
    k: int,
    per: Literal["head", "group"] = "head",
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation = "cpu",
) -> tuple[jax.Array, jax.Array]:
    """Attention of N new tokens as `tree_attention`, and the k tokens with the greatest scores, as one pass.

    Scores are compared in float32 before the softmax, of equal ones the lower entry is taken. Every new token chooses
    among those that it sees, itself always one of them; NaN is never chosen.

    Args:
        query, cached, fresh, length, tree, cached_mask: as of `tree_attention`.
        k: entries of a choice, at least 1.
        per: a choice for every query head, or one for those of a key head, by their greatest score.
        scale: factor of the scores, d ** -0.5 by default.
        softcap: tanh soft cap of the scores, or None.
        implementation: "reference" runs everywhere.

    Returns:
        [B, H, N, d] and a choice with K = min(k, S + N): entries ascending and, where fewer are visible, -1 behind.

    On a CPU the first has the bits of `tree_attention`. There is no derivative there.

    Raises:
        Unsupported: the implementation cannot compute these arguments. Another is never taken instead.
    """
    _check(query, cached, fresh, implementation)
    slots = cached[0].shape[2]
    check_masks(query, slots, length, tree, cached_mask)
    if k < 1 or per not in ("head", "group"):
        raise Unsupported(f"k={k}, per={per!r}: at least 1 and head or group are expected")
    options = dict(k=min(k, slots + query.shape[2]), per=per, scale=_scale(query, scale), softcap=softcap)
    arguments = (query, cached, fresh, length, tree, cached_mask)
    if implementation == "reference":
        return reference.select_attention(*arguments, **options)
    return _cpu().select_attention(*arguments, **options)


def listed_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    choice: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation = "cpu",
) -> jax.Array:
    """Attention of N new tokens over chosen ones alone; rows of others are not read.

    Args:
        query: [B, H, N, d].
        cached: key and value [B, Hkv, S, d]; query head h reads key head h // (H / Hkv).
        fresh: key and value of the new tokens, [B, Hkv, N, d].
        choice: int32 [B, H or Hkv, N, K], in any order, each token at most once. A new token sees itself whether it is
            listed or not, and who is not there (below 0, from S + N on) is nobody.
        scale, softcap, implementation: as of `select_attention`.

    Returns:
        [B, H, N, d] in the dtype of query; sums in float32. There is no derivative on a CPU.

    Raises:
        Unsupported: the implementation cannot compute these arguments. Another is never taken instead.
    """
    _check(query, cached, fresh, implementation)
    batch, heads, count, _ = query.shape
    kv_heads = cached[0].shape[1]
    sets = choice.shape[1] if choice.ndim == 4 else 0
    if choice.dtype != jnp.int32 or sets not in (heads, kv_heads) or choice.shape[:3] != (batch, sets, count):
        expected = f"int32 [{batch}, {heads} or {kv_heads}, {count}, K]"
        raise Unsupported(f"choice is {choice.dtype}{list(choice.shape)}, expected {expected}")
    run = reference if implementation == "reference" else _cpu()
    return run.listed_attention(query, cached, fresh, choice, scale=_scale(query, scale), softcap=softcap)


def _scale(query: jax.Array, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _cpu():
    with needs_llvm():
        from kernels_pallas.chosen_attention import cpu
    return cpu


def _check(query: jax.Array, cached, fresh, implementation: str) -> None:
    check_name(implementation, "cpu")
    check_rows(query, cached, fresh)
    if implementation == "reference":
        return
    for name, array in {"query": query, "cached": cached[0], "fresh": fresh[0]}.items():
        if array.dtype != jnp.float32:
            raise Unsupported(f"{name} is {array.dtype}: the cpu kernel takes float32")
