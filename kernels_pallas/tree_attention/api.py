"""Tree attention: which implementation runs, and what it can compute."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import Implementation, Unsupported, choose, needs_llvm
from kernels_pallas.tree_attention import reference
from kernels_pallas.tree_attention.common import check_masks, check_rows


def tree_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    length: jax.Array,
    tree: jax.Array,
    cached_mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of N new tokens over a cached prefix and over each other, as one softmax.

    Args:
        query: [B, H, N, d].
        cached: key and value [B, Hkv, S, d]; query head h reads key head h // (H / Hkv).
        fresh: key and value of the new tokens, [B, Hkv, N, d].
        length: int32[B], at most S: the slots before it hold tokens. Others are not read.
        tree: bool [B or 1, 1 or H, N, N], which new tokens each sees; every token must see itself.
        cached_mask: bool [B or 1, 1 or H, N, S], which of the held slots each new token sees; None for all.
        scale: factor of the scores, d ** -0.5 by default.
        softcap: tanh soft cap of the scores, or None.
        implementation: None takes the kernel of the default backend.
        interpret: run the Pallas kernel in Pallas' interpreter, on any backend.

    Returns:
        [B, H, N, d] in the dtype of query; sums in float32.

    Raises:
        Unsupported: there is no such kernel for the backend, or it cannot compute these arguments. Another
            implementation is never taken instead.
    """
    implementation = choose("tree attention", implementation, ("tpu", "gpu", "cpu"))
    _check(query, cached, fresh, length, tree, cached_mask, implementation)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, cached, fresh, length, tree, cached_mask)
    if implementation == "reference":
        return reference.tree_attention(*arguments, scale=scale, softcap=softcap)
    if implementation == "cpu":
        with needs_llvm():
            from kernels_pallas.tree_attention import cpu
        return cpu.tree_attention(*arguments, scale=scale, softcap=softcap)
    # Imported here: Pallas takes half a second to import, and most programs run no kernel.
    if implementation == "tpu":
        from kernels_pallas.tree_attention import tpu as kernel
    else:
        from kernels_pallas.tree_attention import gpu as kernel
    return kernel.tree_attention(*arguments, scale=scale, softcap=softcap, interpret=interpret)


def _check(query, cached, fresh, length, tree, cached_mask, implementation: Implementation) -> None:
    check_rows(query, cached, fresh)
    check_masks(query, cached[0].shape[2], length, tree, cached_mask)
    dim = query.shape[3]
    if implementation == "reference":
        return
    taken = (jnp.float32,) if implementation == "cpu" else (jnp.float32, jnp.bfloat16)
    for name, array in {"query": query, "cached": cached[0], "fresh": fresh[0]}.items():
        if array.dtype not in taken:
            names = " and ".join(jnp.dtype(dtype).name for dtype in taken)
            raise Unsupported(f"{name} is {array.dtype}: the {implementation} kernel takes {names}")
    if implementation == "tpu" and dim % 8:
        raise Unsupported(f"head_dim={dim}: the tpu kernel takes multiples of 8")
    if implementation == "gpu" and (dim < 16 or dim & (dim - 1)):
        raise Unsupported(f"head_dim={dim}: the gpu kernel takes powers of two from 16 on")
