"""Tree attention on a CPU: every key head of every row of the batch is a piece, in which keys and values are read once,
up to the row's length, as one stream.

A piece has the query rows of its heads, G N of them one behind the other. It takes keys in blocks of `KEYS` and
computes, for the rows of a tile,

    p[r, s] = scale q[r] . k[s], capped and masked
    top' = max(top, max_s p);  p = exp(p - top');  old = exp(top - top')
    total = old total + sum_s p;  sum[r] = old sum[r] + sum_s p[r, s] v[s]

first over the cached tokens and then over the new ones, and at the end sum / total (the softmax of both together).
Everything is float32.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import cpu
from kernels_pallas.common import Unsupported
from kernels_pallas.tree_attention import reference
from kernels_pallas.tree_attention.cpu_piece import head, softmax

_SHARE = 1 << 15  # bytes of keys and values below which another thread does not pay

_EXECUTE = """
define internal void @execute(ptr %frame) {{
  %key = call ptr @buffer(ptr %frame, i64 1)
  %batch = call i64 @dim(ptr %key, i64 0)
  %kv = call i64 @dim(ptr %key, i64 1)
  %slots = call i64 @dim(ptr %key, i64 2)
  %count = mul i64 %batch, %kv
  %bytes.head = mul i64 %slots, {key_bytes}
  %bytes = mul i64 %bytes.head, %count
  %pay = udiv i64 %bytes, {share}
  call void @share(ptr @head, ptr %frame, i64 %count, i64 %pay, i64 0)
  ret void
}}
"""


def execute(dim: int) -> str:
    """The function that XLA's call runs: every key head of every row of the batch is a piece."""
    return _EXECUTE.format(key_bytes=8 * dim, share=_SHARE)


@functools.cache
def kernel(dim: int, lanes: int) -> cpu.Kernel:
    """The code for heads of `dim` and vectors of so many floats."""
    code = [softmax(dim, lanes), head(dim, lanes), execute(dim)]
    return cpu.Kernel(f"lathe_tree_attention_{dim}_{lanes}", "\n".join(code))


@functools.cache
def _register(dim: int, lanes: int) -> str:
    return kernel(dim, lanes).register()


def lanes_for(dim: int) -> int:
    """Floats of the vectors that heads of `dim` are cut into.

    Raises Unsupported for a processor without a kernel, and where the vectors do not divide the heads.
    """
    lanes = cpu.lanes()
    while dim % lanes:
        lanes //= 2
    if lanes < 4:
        raise Unsupported(f"head_dim={dim}: the cpu kernel takes multiples of 4")
    return lanes


def mask_or_none(cached_mask: jax.Array | None) -> jax.Array:
    """The mask as the code reads it: without rows where there is none."""
    return jnp.zeros((0, 1, 1, 1), bool) if cached_mask is None else cached_mask


def numbers(scale: float, softcap: float | None) -> jax.Array:
    """Scale and cap as the code reads them: 0 without a cap."""
    return jnp.asarray([scale, softcap or 0.0], jnp.float32)


def tree_attention(
    query: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    fresh: tuple[jax.Array, jax.Array],
    length: jax.Array,
    tree: jax.Array,
    cached_mask: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Arguments as in the api, float32. The gradient is that of the reference, which computes everything again."""
    return _attention(query, cached, fresh, length, tree, cached_mask, scale, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(query, cached, fresh, length, tree, cached_mask, scale, softcap):
    dim = query.shape[-1]
    name = _register(dim, lanes_for(dim))
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(query.shape, query.dtype), vmap_method="sequential")
    masks = tree, mask_or_none(cached_mask)
    return call(query, *cached, *fresh, length, *masks, numbers(scale, softcap))


def _forward(query, cached, fresh, length, tree, cached_mask, scale, softcap):
    operands = (query, cached, fresh, length, tree, cached_mask)
    return _attention(*operands, scale, softcap), operands


def _backward(scale, softcap, operands, d_out):
    arrays, masks = operands[:3], operands[3:]
    _, pull = jax.vjp(lambda *x: reference.tree_attention(*x, *masks, scale=scale, softcap=softcap), *arrays)
    return *pull(d_out), None, None, None


_attention.defvjp(_forward, _backward)
