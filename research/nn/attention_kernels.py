"""How attention is computed, apart from what it computes.

A kernel takes head-major arrays, query [B, H, T, d], key and value [B, Hkv, T, d], and returns [B, H, T, d].
H is a multiple of Hkv: query head h reads key head h // (H / Hkv). All kernels agree to float32 rounding.
"""

import dataclasses
import functools
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import target_platform
from kernels_pallas.span_attention import span_attention, takes_on_cpu
from kernels_pallas.tree_attention import Unsupported, tree_attention
from research.errors import UserError
from research.nn.cache import Rows
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.masks import Causal, Full, MaskRule, Window

NEGATIVE = -1e30  # finite, so that a fully masked row gives a uniform distribution instead of NaN


class AttentionKernel(Protocol):
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        rule: MaskRule,
        *,
        segments: jax.Array | None,
        prefix: jax.Array | None,
        scale: float,
        softcap: float | None,
    ) -> jax.Array: ...


def group_queries(query: jax.Array, kv_heads: int) -> jax.Array:
    """[B, H, T, d] -> [B, Hkv, H / Hkv * T, d]: queries that share a key head become rows of one matrix."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def group_mask(mask: jax.Array, heads: int, kv_heads: int) -> jax.Array:
    """bool [b, 1 or H, Tq, Tk] -> [b, 1 or Hkv, 1 or H / Hkv, Tq, Tk]."""
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, *mask.shape[2:])


def cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


@dataclasses.dataclass(frozen=True)
class DenseAttention:
    """Scores of all pairs, softmax in float32, one matrix product each way."""

    def __call__(self, query, key, value, rule, *, segments, prefix, scale, softcap):
        batch, heads, length, dim = query.shape
        kv_heads = key.shape[1]
        groups = heads // kv_heads
        scores = jax.lax.dot_general(
            group_queries(query, kv_heads),
            key,
            (((3,), (3,)), ((0, 1), (0, 1))),
            preferred_element_type=jnp.float32,
        ).reshape(batch, kv_heads, groups, length, length)
        scores = cap(scores * scale, softcap)
        mask = None
        if not isinstance(rule, Full):
            index = jnp.arange(length)[None]
            mask = rule.allowed(index, index, prefix)
        if segments is not None:
            same = (segments[:, None, :, None] == segments[:, None, None, :]) & (
                segments[:, None, None, :] > 0
            )
            mask = same if mask is None else mask & same
        if mask is not None:
            scores = jnp.where(group_mask(mask, heads, kv_heads), scores, NEGATIVE)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        probabilities = probabilities.reshape(batch, kv_heads, groups * length, length)
        out = jax.lax.dot_general(
            probabilities, value, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
        )
        return out.astype(query.dtype).reshape(batch, heads, length, dim)


@dataclasses.dataclass(frozen=True)
class BlockedAttention:
    """Causal attention over blocks of queries, each against the keys it can see, with its own derivative.

    Skips the masked half of the work and keeps the backward products in the form that CPU matrix libraries
    take; stores the unnormalised probabilities of every block, so it saves time and not memory. The blocks
    are unrolled into the program: for lengths up to about a thousand. Refuses a soft cap, prefix masks and
    rules without a key range.
    """

    block: int = 64

    def __call__(self, query, key, value, rule, *, segments, prefix, scale, softcap):
        if softcap is not None or prefix is not None or rule.key_range(0, 1) is None:
            raise UserError(
                f"BlockedAttention computes rules with a key range and no soft cap; got {rule}, "
                f"softcap={softcap}. Use DenseAttention or AutoAttention."
            )
        return _blocked(query, key, value, segments, rule, self.block, scale)


def _blocks(length: int, block: int, rule: MaskRule):
    for start in range(0, length, block):
        stop = min(start + block, length)
        yield start, stop, *rule.key_range(start, stop)


def _block_mask(segments, rule, heads, kv_heads, start, stop, low, high) -> jax.Array | None:
    """bool [b, 1 or Hkv, 1 or G, stop - start, high - low]; None where everything is visible."""
    queries, keys = np.arange(start, stop)[None], np.arange(low, high)[None]
    mask = group_mask(rule.allowed(queries, keys, None), heads, kv_heads)
    if segments is not None:
        query_segments, key_segments = segments[:, start:stop], segments[:, low:high]
        same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
        mask = mask & same[:, None, None]
    return mask


def _query_rows(x: jax.Array, kv_heads: int, start: int, stop: int) -> jax.Array:
    return group_queries(x[:, :, start:stop], kv_heads)


QK = (((3,), (3,)), ((0, 1), (0, 1)))  # [b,h,q,d] x [b,h,k,d] -> [b,h,q,k]
PV = (((3,), (2,)), ((0, 1), (0, 1)))  # [b,h,q,k] x [b,h,k,d] -> [b,h,q,d]
PTG = (((2,), (2,)), ((0, 1), (0, 1)))  # [b,h,q,k] x [b,h,q,d] -> [b,h,k,d]


def head_product(a: jax.Array, b: jax.Array, contract) -> jax.Array:
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _blocked(query, key, value, segments, rule, block, scale):
    return _blocked_forward(query, key, value, segments, rule, block, scale)[0]


def _blocked_forward(query, key, value, segments, rule, block, scale):
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    outputs, saved = [], []
    for start, stop, low, high in _blocks(length, block, rule):
        rows = _query_rows(query, kv_heads, start, stop)
        scores = head_product(rows, key[:, :, low:high], QK) * scale  # [B, Hkv, G * C, K]
        grouped = scores.reshape(batch, kv_heads, -1, stop - start, high - low)
        mask = _block_mask(segments, rule, heads, kv_heads, start, stop, low, high)
        scores = jnp.where(mask, grouped, NEGATIVE).reshape(scores.shape)
        unnormalised = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        inverse = 1.0 / jnp.sum(unnormalised, axis=-1, keepdims=True)
        unnormalised = unnormalised.astype(value.dtype)
        out = head_product(unnormalised, value[:, :, low:high], PV) * inverse
        outputs.append(out.astype(query.dtype).reshape(batch, heads, stop - start, dim))
        saved.append((unnormalised, inverse))
    return jnp.concatenate(outputs, axis=2), (query, key, value, segments, outputs, saved)


def _blocked_backward(rule, block, scale, residuals, gradient):
    query, key, value, segments, outputs, saved = residuals
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    key_gradient = jnp.zeros(key.shape, jnp.float32)
    value_gradient = jnp.zeros(value.shape, jnp.float32)
    query_gradients = []
    for (start, stop, low, high), out, (unnormalised, inverse) in zip(
        _blocks(length, block, rule), outputs, saved, strict=True
    ):
        rows = _query_rows(query, kv_heads, start, stop)
        # The normalisation goes into the thin [rows, d] operand, not into the [rows, keys] one.
        scaled = _query_rows(gradient, kv_heads, start, stop).astype(jnp.float32) * inverse
        delta = jnp.sum(scaled * group_queries(out, kv_heads), axis=-1, keepdims=True)
        scaled = scaled.astype(value.dtype)
        value_gradient = value_gradient.at[:, :, low:high].add(head_product(unnormalised, scaled, PTG))
        drift = head_product(scaled, value[:, :, low:high], QK)
        score_gradient = (unnormalised * (drift - delta) * scale).astype(query.dtype)
        query_gradients.append(
            head_product(score_gradient, key[:, :, low:high], PV).reshape(batch, heads, stop - start, dim)
        )
        key_gradient = key_gradient.at[:, :, low:high].add(head_product(score_gradient, rows, PTG))
    query_gradient = jnp.concatenate(query_gradients, axis=2)
    no_gradient = None if segments is None else np.zeros(segments.shape, jax.dtypes.float0)
    return (
        query_gradient.astype(query.dtype),
        key_gradient.astype(key.dtype),
        value_gradient.astype(value.dtype),
        no_gradient,
    )


_blocked.defvjp(_blocked_forward, _blocked_backward)


# Below, attention is a small part of a step, and the dense program can be differentiated in every way.
_SHORT = 32


@dataclasses.dataclass(frozen=True)
class AutoAttention:
    """On a CPU, for `Causal` and `Window` rules above `_SHORT` tokens: the kernel, for float32 and the head sizes that
    it takes; else blocked, for rules with a key range up to `longest` tokens. Dense otherwise.

    Measured on two cores, forward and backward: the kernel takes a fourth to a third of the time of the blocked form at
    256 tokens (4 heads of 32 and of 64, 6 of 64), and of that of the dense one at 48 and 64; packed documents of 100
    tokens take a third off. Blocks of 64 are about 1.3 times faster than the dense form at 256 tokens; accelerators
    prefer the dense form, which their compilers fuse.
    """

    longest: int = 1024

    def __call__(self, query, key, value, rule, *, segments, prefix, scale, softcap):
        options = dict(segments=segments, prefix=prefix, scale=scale, softcap=softcap)
        return self._kernel(query, key, value, rule, prefix, softcap)(query, key, value, rule, **options)

    def _kernel(self, query, key, value, rule, prefix, softcap) -> AttentionKernel:
        if prefix is None and isinstance(rule, Causal | Window) and _fits_cpu(query, key, value):
            return SpanAttention("cpu")
        blocked = BlockedAttention()
        suits = (
            target_platform() == "cpu"
            and softcap is None
            and prefix is None
            and rule.key_range(0, 1) is not None
            and blocked.block < query.shape[2] <= self.longest
        )
        return blocked if suits else DenseAttention()


def _fits_cpu(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether the kernel for a CPU computes heads of these sizes, and sooner than another program."""
    length, dim = query.shape[2:]
    floats = query.dtype == key.dtype == value.dtype == jnp.float32
    return floats and length > _SHORT and use_cpu_kernels() and takes_on_cpu(dim)


@dataclasses.dataclass(frozen=True)
class SpanAttention:
    """The kernel, forward and backward: reads the keys of each head's window and the sinks, and keeps no scores in
    memory. For `Window` and `Causal` rules, windows equal or one a head. Padding sees nothing and gives 0.

    Args:
        implementation: "auto" takes the kernel of the backend; "reference" is plain jnp and runs everywhere.
        interpret: run the Pallas kernel in Pallas' interpreter, anywhere and slowly.

    Raises:
        UserError: when called, where the kernel cannot run. Nothing else is run instead.
    """

    implementation: Literal["auto", "reference", "tpu", "gpu", "cpu"] = "auto"
    interpret: bool = False

    def __call__(self, query, key, value, rule, *, segments, prefix, scale, softcap):
        if isinstance(rule, Causal):
            window, sinks = query.shape[2], 0
        elif isinstance(rule, Window):
            window, sinks = rule.size, rule.sinks
        else:
            raise UserError(
                f"kernel={self} computes Window and Causal rules, got {rule}; DenseAttention computes it"
            )
        try:
            return span_attention(
                query,
                key,
                value,
                window,
                sinks,
                segments,
                scale=scale,
                softcap=softcap,
                implementation=None if self.implementation == "auto" else self.implementation,
                interpret=self.interpret,
            )
        except Unsupported as error:
            raise UserError(f"kernel={self} cannot run: {error}; AutoAttention runs everywhere") from error


_FEW_ROWS = 64


class CachedKernel(Protocol):
    """Attention of N new tokens over a cached prefix of S slots and over each other.

    query [B, H, N, d]; cached key and value [B, Hkv, S, d], arrays or `Rows`; fresh key and value [B, Hkv, N, d]. The
    slots before `length` int32[B] hold tokens; `cached_mask` bool [b, 1 or H, N, S] says which slots each new token
    sees, None for all that hold one; `fresh_mask` bool [b, 1 or H, N, N], where every token sees itself.
    """

    def __call__(
        self,
        query: jax.Array,
        cached: tuple[jax.Array, jax.Array],
        fresh: tuple[jax.Array, jax.Array],
        length: jax.Array,
        cached_mask: jax.Array | None,
        fresh_mask: jax.Array,
        *,
        scale: float,
        softcap: float | None,
    ) -> jax.Array: ...


def cached_scores(
    query: jax.Array,
    cached_key: jax.Array,
    fresh_key: jax.Array,
    length: jax.Array,
    cached_mask: jax.Array | None,
    fresh_mask: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments of a `CachedKernel` -> float32 scores of the slots [B, Hkv, H / Hkv, N, S] and of the fresh rows
    [B, Hkv, H / Hkv, N, N], masked ones NEGATIVE."""
    batch, heads, count, _ = query.shape
    kv_heads, slots = cached_key.shape[1:3]
    rows = group_queries(query, kv_heads)
    if cached_mask is None:
        cached_mask = (jnp.arange(slots) < length[:, None])[:, None, None]

    def scores(key: jax.Array, mask: jax.Array) -> jax.Array:
        product = (
            key.scores(rows) if isinstance(key, Rows) else head_product(rows, key.astype(rows.dtype), QK)
        )
        raw = cap(product * scale, softcap)
        grouped = raw.reshape(batch, kv_heads, heads // kv_heads, count, -1)
        return jnp.where(group_mask(mask, heads, kv_heads), grouped, NEGATIVE)

    return scores(cached_key, cached_mask), scores(fresh_key, fresh_mask)


def cached_values(
    scores: tuple[jax.Array, jax.Array], cached_value: jax.Array, fresh_value: jax.Array
) -> jax.Array:
    """What `cached_scores` gives, and the values -> the softmax over both times the values, [B, H, N, d]."""
    batch, kv_heads, groups, count, _ = scores[0].shape
    dtype = fresh_value.dtype
    old, new = (part.reshape(batch, kv_heads, groups * count, -1) for part in scores)
    top = jnp.maximum(jnp.max(old, axis=-1, keepdims=True), jnp.max(new, axis=-1, keepdims=True))
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = jnp.sum(old, axis=-1, keepdims=True) + jnp.sum(new, axis=-1, keepdims=True)
    if isinstance(cached_value, Rows):
        out = cached_value.mix(old.astype(dtype))
    else:
        out = head_product(old.astype(dtype), cached_value.astype(dtype), PV)
    out = out + head_product(new.astype(dtype), fresh_value, PV)
    return (out / total).astype(dtype).reshape(batch, kv_heads * groups, count, -1)


@dataclasses.dataclass(frozen=True)
class PlainCachedAttention:
    """Scores of all slots; the two sets of keys share a softmax and are never concatenated."""

    def __call__(self, query, cached, fresh, length, cached_mask, fresh_mask, *, scale, softcap):
        masks = (length, cached_mask, fresh_mask)
        scores = cached_scores(query, cached[0], fresh[0], *masks, scale=scale, softcap=softcap)
        return cached_values(scores, cached[1], fresh[1])


@dataclasses.dataclass(frozen=True)
class TreeAttention:
    """The kernel: reads a row's prefix in blocks up to its length, and keeps no scores in memory.

    Args:
        implementation: "auto" takes the kernel of the backend; "reference" is plain jnp and runs everywhere.
        interpret: run the Pallas kernel in Pallas' interpreter, anywhere and slowly.

    Raises:
        UserError: when called, where the kernel cannot run. Nothing else is run instead.
    """

    implementation: Literal["auto", "reference", "tpu", "gpu", "cpu"] = "auto"
    interpret: bool = False

    def __call__(self, query, cached, fresh, length, cached_mask, fresh_mask, *, scale, softcap):
        if isinstance(cached[0], Rows):
            raise UserError(
                f"cached_kernel={self} reads arrays, not {type(cached[0]).__name__}: PlainCachedAttention reads both"
            )
        try:
            return tree_attention(
                query,
                cached,
                fresh,
                length,
                fresh_mask,
                cached_mask,
                scale=scale,
                softcap=softcap,
                implementation=None if self.implementation == "auto" else self.implementation,
                interpret=self.interpret,
            )
        except Unsupported as error:
            raise UserError(
                f"cached_kernel={self} cannot run: {error}; PlainCachedAttention runs everywhere"
            ) from error


@dataclasses.dataclass(frozen=True)
class AutoCachedAttention:
    """`TreeAttention` on a CPU, for up to `_FEW_ROWS` float32 rows a key head; `PlainCachedAttention` elsewhere.

    A longer row, a piece of a prompt, is a product of matrices, which the compiler's library computes faster.
    """

    def __call__(self, query, cached, fresh, *masks, **numbers):
        kernel = TreeAttention("cpu") if self._fits(query, cached[0]) else PlainCachedAttention()
        return kernel(query, cached, fresh, *masks, **numbers)

    def _fits(self, query: jax.Array, key: jax.Array | Rows) -> bool:
        if isinstance(key, Rows) or not query.dtype == key.dtype == jnp.float32 or query.shape[3] % 4:
            return False
        rows = query.shape[1] // key.shape[1] * query.shape[2]
        return rows <= _FEW_ROWS and use_cpu_kernels()
