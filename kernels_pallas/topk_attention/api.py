"""Top-k selection: which implementation runs, and what it can compute."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import Implementation, Unsupported, choose
from kernels_pallas.topk_attention import reference

TPU_BYTES = 48 * 2**20  # of scores in vector memory, of which every TPU since v5e has at least 64 MiB
GPU_GREATEST = 4096  # k whose candidates a program holds in registers


def topk_attention(
    query: jax.Array,
    key: jax.Array,
    length: jax.Array,
    k: int,
    *,
    per: Literal["head", "group"] = "head",
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The k held slots with the greatest products of query and key, without an array of all products: the token
    selection of TidalDecode (arXiv 2410.05076).

    Args:
        query: [B, H, d].
        key: [B, Hkv, S, d]; query head h reads key head h // (H / Hkv).
        length: int32[B], at most S: the slots before it hold tokens. Others are not read.
        k: how many; more than are held gives all that are.
        per: "head" selects for every query head; "group" for every key head, by the greatest product of its query
            heads.
        implementation: None takes the kernel of the default backend.
        interpret: run the kernel in Pallas' interpreter, on any backend; or parameters of the TPU simulator.

    Returns:
        Indices int32 [B, H or Hkv, k], ascending, and how many there are, int32[B] = min(k, length); indices behind
        that are 0. Among equal products the lower slots are taken: the set of a stable descending argsort. Sums in
        float32, in an order of their own: slots whose products differ by rounding alone may be taken for each other.
        For `gather_attention` as they are.

    Raises:
        Unsupported: there is no such kernel for the backend, or it cannot compute these arguments. Another
            implementation is never taken instead.
    """
    implementation = choose("top-k", implementation)
    batch, heads, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    if heads % kv_heads:
        raise Unsupported(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if key.shape != (batch, kv_heads, slots, dim):
        raise Unsupported(f"key has shape {key.shape}, expected {(batch, kv_heads, slots, dim)}")
    if length.shape != (batch,):
        raise Unsupported(f"length has shape {length.shape}, expected {(batch,)}")
    if k < 1:
        raise Unsupported(f"k={k}: at least one slot is selected")
    if per not in ("head", "group"):
        raise Unsupported(f"per={per!r}: there are 'head' and 'group'")
    if implementation == "reference":
        return reference.topk_attention(query, key, length, k, per=per)
    for name, array in {"query": query, "key": key}.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise Unsupported(f"{name} is {array.dtype}: the kernels take float32 and bfloat16")
    # Imported here: Pallas takes half a second to import, and most programs run no kernel.
    if implementation == "tpu":
        from kernels_pallas.topk_attention import tpu as kernel

        if dim % 8:
            raise Unsupported(f"head_dim={dim}: the tpu kernel takes multiples of 8")
        needed = kernel.scratch_bytes(heads // kv_heads, slots, per)
        if needed > TPU_BYTES:
            raise Unsupported(
                f"{slots} slots: the scores of a key head's queries take {needed} bytes of vector memory, "
                f"more than {TPU_BYTES}; select per='group', or in parts of the cache"
            )
    else:
        from kernels_pallas.topk_attention import gpu as kernel

        if dim < 16 or dim & (dim - 1):
            raise Unsupported(f"head_dim={dim}: the gpu kernel takes powers of two from 16 on")
        if k > GPU_GREATEST:
            raise Unsupported(f"k={k}: the gpu kernel selects up to {GPU_GREATEST}")
    return kernel.topk_attention(query, key, length, k, per=per, interpret=interpret)
