"""Decode attention: which implementation runs, and what it can compute."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention import Partial
from kernels_pallas.common import Implementation, Unsupported, choose
from kernels_pallas.decode_attention import reference

# Entries of `indices` that a TPU's scalar memory (1 MiB) holds beside what the compiler keeps there.
TPU_ENTRIES = 200_000


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    length: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of N tokens over all held slots of a cache; the N tokens see the same slots.

    Args:
        query: [B, H, N, d].
        key, value: [B, Hkv, S, d]; query head h reads key head h // (H / Hkv).
        length: int32[B], at most S: the slots before it hold tokens. Others are not read.
        scale: factor of the scores, d ** -0.5 by default.
        softcap: tanh soft cap of the scores, or None.
        implementation: None takes the kernel of the default backend.
        interpret: run the kernel in Pallas' interpreter, on any backend; or parameters of the TPU simulator.

    Returns:
        Output [B, H, N, d] and log-sum-exp [B, H, N], both float32: 0 and -inf where the length is 0. `merge` joins
        it with attention over other keys. Not differentiable, except in the reference.

    Raises:
        Unsupported: there is no such kernel for the backend, or it cannot compute these arguments. Another
            implementation is never taken instead.
    """
    implementation = choose("decode attention", implementation)
    _check(query, key, value, implementation)
    batch = query.shape[0]
    if length.shape != (batch,):
        raise Unsupported(f"length has shape {length.shape}, expected {(batch,)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "reference":
        return reference.decode_attention(query, key, value, length, scale=scale, softcap=softcap)
    # Imported here: Pallas takes half a second to import, and most programs run no kernel.
    if implementation == "tpu":
        from kernels_pallas.decode_attention import tpu as kernel
    else:
        from kernels_pallas.decode_attention import gpu as kernel
    return kernel.decode_attention(
        query, key, value, length, scale=scale, softcap=softcap, interpret=interpret
    )


def gather_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    count: jax.Array,
    length: jax.Array | None = None,
    *,
    page: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of N tokens over listed slots of a cache, or over listed pages of `page` slots; only these are read
    (TidalDecode, arXiv 2410.05076; Quest, arXiv 2406.10774).

    Args:
        query, key, value, scale, softcap, implementation, interpret: as for `decode_attention`.
        indices: int32 [B, s, K], the list of each row and set. s is a multiple of Hkv that divides H: with s = Hkv
            the query heads of a key head share a list, with s = H each has its own. In any order; an index that is
            listed twice counts twice. Page p is the slots p * page to p * page + page - 1.
        count: int32 [B] or [B, s], at most K: the entries before it are the list. Others may be anything.
        length: int32[B]: slots from it on are not seen, as in a last page that is not full; None for S.

    Returns:
        As `decode_attention`; 0 and -inf where nothing is listed.

    Raises:
        Unsupported: as `decode_attention`.
    """
    implementation = choose("decode attention", implementation)
    _check(query, key, value, implementation)
    batch, heads = query.shape[:2]
    kv_heads, slots = key.shape[1:3]
    sets = indices.shape[1] if indices.ndim == 3 else 0
    if indices.ndim != 3 or indices.shape[0] != batch or sets % kv_heads or heads % max(sets, 1):
        raise Unsupported(
            f"indices has shape {indices.shape}, expected [{batch}, s, K] with s a multiple of {kv_heads} "
            f"that divides {heads}"
        )
    if count.shape not in ((batch,), (batch, sets)):
        raise Unsupported(f"count has shape {count.shape}, expected {(batch,)} or {(batch, sets)}")
    if length is not None and length.shape != (batch,):
        raise Unsupported(f"length has shape {length.shape}, expected {(batch,)}")
    for name, array in {"indices": indices, "count": count}.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise Unsupported(f"{name} is {array.dtype}, expected int32")
    if page < 1:
        raise Unsupported(f"page={page}: a page has at least one slot")
    if implementation == "tpu":
        sublanes = 32 // key.dtype.itemsize
        if page > 1 and page % sublanes:
            raise Unsupported(
                f"page={page}: the tpu kernel takes single slots (1) and, for {key.dtype}, multiples of {sublanes}"
            )
        if indices.size > TPU_ENTRIES:
            raise Unsupported(
                f"{indices.size} indices: a tpu's scalar memory holds {TPU_ENTRIES}; take larger pages or fewer rows"
            )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    length = jnp.full((batch,), slots, jnp.int32) if length is None else jnp.minimum(length, slots)
    count = jnp.broadcast_to(count if count.ndim == 2 else count[:, None], (batch, sets))
    arguments = (query, key, value, indices, count, length)
    if implementation == "reference":
        return reference.gather_attention(*arguments, page=page, scale=scale, softcap=softcap)
    if implementation == "tpu":
        from kernels_pallas.decode_attention import tpu as kernel
    else:
        from kernels_pallas.decode_attention import gpu as kernel
    return kernel.gather_attention(*arguments, page=page, scale=scale, softcap=softcap, interpret=interpret)


def _check(query, key, value, implementation: Implementation) -> None:
    batch, heads, _, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    if heads % kv_heads:
        raise Unsupported(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    for name, array in {"key": key, "value": value}.items():
        if array.shape != (batch, kv_heads, slots, dim):
            raise Unsupported(f"{name} has shape {array.shape}, expected {(batch, kv_heads, slots, dim)}")
    if implementation == "reference":
        return
    for name, array in {"query": query, "key": key, "value": value}.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise Unsupported(f"{name} is {array.dtype}: the kernels take float32 and bfloat16")
    if implementation == "tpu" and dim % 8:
        raise Unsupported(f"head_dim={dim}: the tpu kernel takes multiples of 8")
    if implementation == "gpu" and (dim < 16 or dim & (dim - 1)):
        raise Unsupported(f"head_dim={dim}: the gpu kernel takes powers of two from 16 on")
