"""Span attention: which implementation runs, what it can compute, and its derivative."""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import Implementation, Unsupported, choose, needs_llvm
from kernels_pallas.span_attention import reference

Span = int | tuple[int, ...] | jax.Array


def span_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: Span,
    sink: Span = 0,
    segments: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Causal self-attention where head h sees its last `window[h]` keys and the first `sink[h]` of the sequence:
    query i sees key j if j <= i and (i - j < window[h] or j < sink[h]). Differentiable in query, key and value; for
    the backward pass only the output and the log-sum-exp of each row are kept.

    Args:
        query: [B, H, L, d].
        key, value: [B, Hkv, L, d]; query head h reads key head h // (H / Hkv).
        window, sink: one int for all heads, a tuple of H ints, or int32[H]. The tpu kernel makes its list of tiles
            when the program is traced and takes no arrays.
        segments: int32[B, L]: only keys of the query's own segment are seen, and none of segment 0 (padding).
        scale: factor of the scores, d ** -0.5 by default.
        softcap: tanh soft cap of the scores, or None.
        implementation: None takes the kernel of the default backend.
        block: side of the Pallas kernels' tiles; a multiple of 128 on TPU, a power of two from 16 on GPU; None chooses.
        interpret: run the Pallas kernel in Pallas' interpreter, on any backend; or parameters of the TPU simulator.

    Returns:
        [B, H, L, d] in the dtype of query; sums in float32. 0 where a query sees no key.

    Raises:
        Unsupported: there is no such kernel for the backend, or it cannot compute these arguments. Another
            implementation is never taken instead.
    """
    implementation = choose("span attention", implementation, ("tpu", "gpu", "cpu"))
    heads = query.shape[1]
    window, sink = (_span(name, span, heads) for name, span in (("window", window), ("sink", sink)))
    _check(query, key, value, segments, implementation)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "tpu":
        for name, span in (("window", window), ("sink", sink)):
            if not isinstance(span, tuple):
                raise Unsupported(
                    f"{name} is an array: the tpu kernel lists its tiles when the program is traced; "
                    f"pass an int or a tuple of {heads} ints"
                )
        config = _Config(implementation, scale, softcap, block, interpret, (window, sink))
        return _attention(query, key, value, None, None, segments, config)
    window, sink = jnp.asarray(window, jnp.int32), jnp.asarray(sink, jnp.int32)
    if implementation == "reference":
        return reference.span_attention(
            query, key, value, window, sink, segments, scale=scale, softcap=softcap
        )
    if implementation == "cpu":
        return _cpu().span_attention(query, key, value, window, sink, segments, scale=scale, softcap=softcap)
    config = _Config(implementation, scale, softcap, block, interpret)
    return _attention(query, key, value, window, sink, segments, config)


def takes_on_cpu(dim: int) -> bool:
    """Whether the cpu kernel computes heads of `dim` on this processor.

    Raises Unsupported for a processor without a kernel.
    """
    cpu = _cpu()
    return dim % cpu.lanes() == 0 and dim <= cpu.WIDEST


def _cpu() -> ModuleType:
    with needs_llvm():
        from kernels_pallas.span_attention import cpu
    return cpu


@dataclasses.dataclass(frozen=True)
class _Config:
    implementation: Implementation
    scale: float
    softcap: float | None
    block: int | None
    interpret: Any
    spans: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # windows and sinks where they are static

    def run(self, direction: str, query, key, value, window, sink, *rest):
        # Imported here: Pallas takes half a second to import, and most programs run no kernel.
        if self.implementation == "tpu":
            from kernels_pallas.span_attention import tpu as kernel

            window, sink = self.spans
        else:
            from kernels_pallas.span_attention import gpu as kernel
        return getattr(kernel, direction)(
            query,
            key,
            value,
            window,
            sink,
            *rest,
            scale=self.scale,
            softcap=self.softcap,
            block=self.block,
            interpret=self.interpret,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, window, sink, segments, config: _Config) -> jax.Array:
    return config.run("forward", query, key, value, window, sink, segments)[0]


def _forward(query, key, value, window, sink, segments, config: _Config):
    out, lse = config.run("forward", query, key, value, window, sink, segments)
    return out, (query, key, value, window, sink, segments, out, lse)


def _backward(config: _Config, saved, gradient):
    *arguments, out, lse = saved
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    gradients = config.run("backward", *arguments, lse, delta, gradient)
    integers = (None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in arguments[3:])
    return *gradients, *integers


_attention.defvjp(_forward, _backward)


def _span(name: str, span: Span, heads: int) -> tuple[int, ...] | jax.Array:
    """A tuple where it is static."""
    if isinstance(span, int | np.integer):
        return (int(span),) * heads
    if isinstance(span, np.ndarray):
        span = tuple(span.tolist())
    if isinstance(span, tuple | list):
        if len(span) != heads or not all(isinstance(x, int | np.integer) for x in span):
            raise Unsupported(f"{name}={span}: expected one int, or {heads} ints, one a head")
        return tuple(int(x) for x in span)
    if span.shape != (heads,) or not jnp.issubdtype(span.dtype, jnp.integer):
        raise Unsupported(f"{name} is {span.dtype}{list(span.shape)}, expected int32[{heads}]")
    return span


def _check(query, key, value, segments, implementation: Implementation) -> None:
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    if heads % kv_heads:
        raise Unsupported(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    for name, array in {"key": key, "value": value}.items():
        if array.shape != (batch, kv_heads, length, dim):
            raise Unsupported(f"{name} has shape {array.shape}, expected {(batch, kv_heads, length, dim)}")
    if segments is not None and segments.shape != (batch, length):
        raise Unsupported(f"segments has shape {segments.shape}, expected {(batch, length)}")
    if implementation == "reference":
        return
    taken = (jnp.float32,) if implementation == "cpu" else (jnp.float32, jnp.bfloat16)
    for name, array in {"query": query, "key": key, "value": value}.items():
        if array.dtype not in taken or array.dtype != query.dtype:
            names = " and ".join(jnp.dtype(dtype).name for dtype in taken)
            raise Unsupported(
                f"{name} is {array.dtype}: the {implementation} kernel takes {names}, all alike"
            )
    if implementation == "cpu" and not takes_on_cpu(dim):
        cpu = _cpu()
        raise Unsupported(
            f"head_dim={dim}: the cpu kernel takes multiples of {cpu.lanes()} up to {cpu.WIDEST} on this processor"
        )
    if implementation == "tpu" and dim % 8:
        raise Unsupported(f"head_dim={dim}: the tpu kernel takes multiples of 8")
    if implementation == "gpu" and (dim < 16 or dim & (dim - 1)):
        raise Unsupported(f"head_dim={dim}: the gpu kernel takes powers of two from 16 on")
