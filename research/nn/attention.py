"""One attention: projections, rotary embedding, mask rule, cache and kernel are separate arguments."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn import cache as caches
from research.nn.attention_kernels import (
    AttentionKernel,
    AutoAttention,
    AutoCachedAttention,
    CachedKernel,
)
from research.nn.compute_once import compute_once
from research.nn.linear import Linear, check_sizes, check_softcap
from research.nn.masks import Causal, Full, MaskRule, Prefix, Steps, Window
from research.nn.rotary import Rotary, rotate


class Context(struct.PyTreeNode):
    """Where the tokens of a call are.

    positions int32[B, T]; segments int32[B, T], 0 on padding, or None; prefix int32[B] or None (prefix LM);
    length int32[B] committed tokens and tree bool[b, N, N] where a cache is read. store: what all layers read, the
    subtree `store` of the model's parameters, or None.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    prefix: jax.Array | None = None
    length: jax.Array | None = None
    tree: jax.Array | None = None
    store: Any = None


class Attention(nn.Module):
    """Multi-head, grouped or multi-query attention.

    Args:
        num_heads, num_kv_heads, head_dim: H, Hkv (None: H) and d.
        rule: the mask rule.
        rotary: rotary embedding, or None.
        query_norm, key_norm: norms over each head (Qwen 3, Gemma 3), or None.
        scale: factor of the scores, default head_dim ** -0.5.
        softcap: tanh soft cap of the scores (Gemma 2), or None.
        use_bias, output_bias: biases of query, key and value, and of the output.
        kernel, cached_kernel: how the product is computed without a cache, and with one.
        cache_kind: how the tokens of a layer that sees all of them are kept, by default as they are.

    x is [B, T, width] or [B * T, width]; the output has the same leading axes. Returns the output and the
    new key and value rows, [B, Hkv, T, d] each.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rule: MaskRule = Causal()
    rotary: Rotary | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    scale: float | None = None
    softcap: float | None = None
    use_bias: bool = False
    output_bias: bool = False
    kernel: AttentionKernel = AutoAttention()
    cached_kernel: CachedKernel = AutoCachedAttention()
    cache_kind: caches.CacheKind | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        check_softcap(self, "softcap")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: caches.LayerCache | None = None
    ) -> tuple[jax.Array, caches.Fresh]:
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}")
        query, key, value = project_heads(self, x, context.positions.shape)
        out, fresh = attend(
            query,
            key,
            value,
            context,
            cache,
            rule=self.rule,
            rotary=self.rotary,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            kernel=self.kernel,
            cached_kernel=self.cached_kernel,
        )
        out = out.reshape(*x.shape[:-1], self.num_heads * self.head_dim)
        return Linear(x.shape[-1], self.output_bias, name="output")(out), fresh

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> caches.LayerCache:
        """As `empty_cache`."""
        sizes = (batch, capacity, margin, self.kv_heads, self.head_dim, dtype)
        return empty_cache(self.rule, *sizes, kind=self.cache_kind)


def project_heads(
    module: nn.Module, x: jax.Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> query [B, T, H, d], key and value [B, T, Hkv, d], normalised; one product where the tree holds `qkv`.

    To be called by a module with the fields of `Attention` that are named here, of which it makes the parameters.
    """
    wide, narrow = module.num_heads * module.head_dim, module.kv_heads * module.head_dim
    if "qkv" in module.variables.get("params", {}):
        fused = Linear(wide + 2 * narrow, module.use_bias, name="qkv")(x)
        query, key, value = jnp.split(fused, [wide, wide + narrow], axis=-1)
    else:
        query = Linear(wide, module.use_bias, name="query")(x)
        key = Linear(narrow, module.use_bias, name="key")(x)
        value = Linear(narrow, module.use_bias, name="value")(x)
    query, key, value = (y.reshape(*shape, -1, module.head_dim) for y in (query, key, value))
    if module.query_norm is not None:
        query = module.query_norm(query)
    if module.key_norm is not None:
        key = module.key_norm(key)
    return query, key, value


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: Context,
    cache: caches.LayerCache | None,
    *,
    rule: MaskRule,
    rotary: Rotary | None,
    scale: float,
    softcap: float | None = None,
    kernel: AttentionKernel,
    cached_kernel: CachedKernel,
) -> tuple[jax.Array, caches.Fresh]:
    """What is left of attention once the projections are made: rotary embedding, mask, cache and kernel.

    query [B, T, H, d], key and value [B, T, Hkv, d]; query head h reads key head h // (H / Hkv). Returns
    [B, T, H, d] and the new rows, [B, Hkv, T, d] each.
    """
    if rotary is not None:
        angles = tuple(map(compute_once, rotary(context.positions, query.shape[-1])))
        query, key = rotate(query, *angles), rotate(key, *angles)
    query, key, value = (y.swapaxes(1, 2) for y in (query, key, value))  # [B, heads, T, d]
    numbers = dict(scale=scale, softcap=softcap)
    if cache is None:
        places = dict(segments=context.segments, prefix=context.prefix)
        out = kernel(query, key, value, rule, **places, **numbers)
    else:
        out = _attend_cached(query, (key, value), rule, context, cache, cached_kernel, numbers)
    return out.swapaxes(1, 2), (key, value)


def _attend_cached(
    query: jax.Array,
    fresh: caches.Fresh,
    rule: MaskRule,
    context: Context,
    cache: caches.LayerCache,
    kernel: CachedKernel,
    numbers: dict[str, Any],
) -> jax.Array:
    """query [B, H, N, d] over what is cached and over the fresh rows -> [B, H, N, d]."""
    if isinstance(cache, caches.HeadGroups):
        groups = query.shape[1] // fresh[0].shape[1]
        outputs = []
        for part, (start, stop) in zip(cache.parts, cache.bounds(), strict=True):
            heads = slice(start * groups, stop * groups)
            rows = tuple(y[:, start:stop] for y in fresh)
            own = rule.for_heads(heads.start, heads.stop)
            outputs.append(_attend_cached(query[:, heads], rows, own, context, part, kernel, numbers))
        return jnp.concatenate(outputs, axis=1)
    held, cached_mask, fresh_mask, cached = _visible(rule, context, cache)
    return kernel(query, cached, fresh, held, cached_mask, fresh_mask, **numbers)


def _visible(rule: MaskRule, context: Context, cache: caches.LayerCache) -> tuple:
    """What a `CachedKernel` is told: length, cached mask, fresh mask, and the cached keys and values."""
    old_key, old_value, index, valid = cache.read(context.length)
    positions, slots = context.positions, old_key.shape[2]
    fresh_mask = rule.allowed(positions, positions, context.prefix) & context.tree[:, None]
    if isinstance(rule, (Full, Causal, Prefix, Steps)):  # every new token sees all committed ones
        cached_mask = None
        if not isinstance(cache, caches.DenseCache):
            cached_mask = jnp.broadcast_to(
                valid[:, None, None, :], (*valid.shape[:1], 1, positions.shape[1], slots)
            )
    else:
        cached_mask = rule.allowed(positions, index, context.prefix) & valid[:, None, None, :]
    if isinstance(cache, (caches.DenseCache, caches.RingCache)):
        held = jnp.minimum(context.length, slots)
    else:
        held = jnp.full_like(context.length, slots)  # the mask alone says which slots hold tokens
    return held, cached_mask, fresh_mask, (old_key, old_value)


def empty_cache(
    rule: MaskRule,
    batch: int,
    capacity: int,
    margin: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    kind: caches.CacheKind | None = None,
) -> caches.LayerCache:
    """A dense cache, or one of the kind; for windowed rules a ring of the window plus `margin` rows behind the sinks,
    where that is less.

    Spans that differ between heads get a ring of their own for each run of key heads with the same span.
    """

    def empty(span: int, sinks: int, heads: int) -> caches.LayerCache:
        slots = sinks + span + margin
        if slots >= capacity:
            return caches.DenseCache.empty(batch, capacity, heads, head_dim, dtype)
        return caches.RingCache.empty(batch, slots, heads, head_dim, dtype, sinks)

    if not isinstance(rule, Window):
        if kind is not None:
            return kind.empty(batch, capacity, kv_heads, head_dim, margin, dtype)
        return caches.DenseCache.empty(batch, capacity, kv_heads, head_dim, dtype)
    runs = [(span, len(list(run))) for span, run in itertools.groupby(rule.key_spans(kv_heads))]
    parts = tuple(empty(span, rule.sinks, heads) for span, heads in runs)
    return parts[0] if len(parts) == 1 else caches.HeadGroups(parts, tuple(heads for _, heads in runs))
