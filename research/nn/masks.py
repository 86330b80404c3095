"""Mask rules: which key a query may see, by their indices in the row.

A rule is asked for a block of queries and keys and never materialises more than that block. Segments (packed
documents, padding) and drafted trees are masks of their own, combined with the rule by the attention layer.
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from research.errors import UserError

Place = int | jax.Array


class MaskRule(Protocol):
    """Which keys a query sees. Frozen dataclasses: rules are static and hashable.

    by_prefix: whether `prefix` says something to the rule.
    """

    by_prefix: ClassVar[bool]

    def allowed(self, query: jax.Array, key: jax.Array, prefix: jax.Array | None) -> jax.Array:
        """query int[b, Tq], key int[b, Tk] (b = B or 1) -> bool [b, 1 or heads, Tq, Tk].

        `prefix` int32[B] is the length of the bidirectional prefix of each row, or None.
        """

    def key_range(self, start: int, stop: int) -> tuple[int, int] | None:
        """The half-open range of keys that queries start..stop can see, or None where it is not known."""

    def meets(self, query: Place, key: Place, size: int, prefix: jax.Array | None) -> bool | jax.Array:
        """Whether in any row any of the `size` queries from `query` on sees any of the `size` keys from `key` on.

        A bool of places that are ints, without `prefix`; that is then as if no row had one.
        """


def _differences(query: jax.Array, key: jax.Array) -> jax.Array:
    return query[:, None, :, None] - key[:, None, None, :]  # [b, 1, Tq, Tk]


@dataclasses.dataclass(frozen=True)
class Full:
    """Every query sees every key (encoders)."""

    by_prefix: ClassVar[bool] = False

    def allowed(self, query: jax.Array, key: jax.Array, prefix: jax.Array | None) -> jax.Array:
        return jnp.ones((1, 1, query.shape[-1], key.shape[-1]), bool)

    def key_range(self, start: int, stop: int) -> tuple[int, int] | None:
        return None

    def meets(self, query: Place, key: Place, size: int, prefix: jax.Array | None) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Causal:
    """A query sees the keys up to itself."""

    by_prefix: ClassVar[bool] = False

    def allowed(self, query: jax.Array, key: jax.Array, prefix: jax.Array | None) -> jax.Array:
        return _differences(query, key) >= 0

    def key_range(self, start: int, stop: int) -> tuple[int, int] | None:
        return 0, stop

    def meets(self, query: Place, key: Place, size: int, prefix: jax.Array | None) -> bool | jax.Array:
        return key < query + size


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Causal, but the first `prefix` tokens of a row see each other in both directions (prefix LM)."""

    by_prefix: ClassVar[bool] = True

    def allowed(self, query: jax.Array, key: jax.Array, prefix: jax.Array | None) -> jax.Array:
        if prefix is None:
            raise UserError("a Prefix mask needs the prefix length of every row (`prefix` int32[B])")
        inside = jnp.maximum(query[:, None, :, None], key[:, None, None, :]) < prefix[:, None, None, None]
        return (_differences(query, key) >= 0) | inside

    def key_range(self, start: int, stop: int) -> tuple[int, int] | None:
        return None

    def meets(self, query: Place, key: Place, size: int, prefix: jax.Array | None) -> bool | jax.Array:
        before = key < query + size
        return before if prefix is None else before | (jnp.maximum(query, key) < prefix.max())


@dataclasses.dataclass(frozen=True)
class Steps:
    """Causal over steps, runs of tokens that see each other: an image in a text, the prefix of a prefix LM.

    Here `prefix` is int32[B, T], the index behind the last token of each token's step (`step_ends`); without it, and in
    tokens that are decoded, every token is a step of its own.
    """

    by_prefix: ClassVar[bool] = True

    def allowed(self, query: jax.Array, key: jax.Array, prefix: jax.Array | None) -> jax.Array:
        if prefix is None:
            return _differences(query, key) >= 0
        rows = jnp.broadcast_to(query, (prefix.shape[0], query.shape[-1]))
        ends = jnp.take_along_axis(prefix, rows, axis=1)
        return key[:, None, None, :] < ends[:, None, :, None]

    def key_range(self, start: int, stop: int) -> tuple[int, int] | None:
        return None

    def meets(self, query: Place, key: Place, size: int, prefix: jax.Array | None) -> bool | jax.Array:
        if prefix is None:
            return key < query + size
        return key < jax.lax.dynamic_slice_in_dim(prefix, query, size, 1).max()


def step_ends(opens: jax.Array) -> jax.Array:
    """opens bool[B, T], which tokens begin a step -> int32[B, T], the index behind the last token of each one's step.

    Equal to: a query sees a key where the count of openings up to the key is at most that up to the query.
    """
    length = opens.shape[1]
    begins = jnp.where(opens, jnp.arange(length), length)
    # The nearest opening behind each token.
    later = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return jax.lax.cummin(later, axis=1, reverse=True).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Window:
    """Causal over the last `size` keys (the query itself included), plus the first `sinks` of the row.

    `size` may be a tuple with one span per query head.
    """

    by_prefix: ClassVar[bool] = False

    size: int | tuple[int, ...]
    sinks: int = 0

    @property
    def span(self) -> int:
        """The widest window, in tokens."""
        return self.size if isinstance(self.size, int) else max(self.size)

    def key_spans(self, kv_heads: int) -> tuple[int, ...]:
        """The widest window among the query heads of each key head."""
        if isinstance(self.size, int):
            return (self.size,) * kv_heads
        if not self.size or len(self.size) % kv_heads:
            raise UserError(f"a Window of {len(self.size)} sizes can't be shared by {kv_heads} key heads")
        groups = len(self.size) // kv_heads
        return tuple(max(self.size[i * groups : (i + 1) * groups]) for i in range(kv_heads))

    def for_heads(self, start: int, stop: int) -> "Window":
        """The rule of query heads start .. stop - 1 alone."""
        return self if isinstance(self.size, int) else dataclasses.replace(self, size=self.size[start:stop])

    def allowed(self, query: jax.Array, key: jax.Array, prefix: jax.Array | None) -> jax.Array:
        distance = _differences(query, key)
        sizes = jnp.asarray(self.size, jnp.int32).reshape(1, -1, 1, 1)  # [1, heads or 1, 1, 1]
        near = distance < sizes
        if self.sinks:
            near |= key[:, None, None, :] < self.sinks
        return (distance >= 0) & near

    def key_range(self, start: int, stop: int) -> tuple[int, int] | None:
        return (0 if self.sinks else max(0, start - self.span + 1)), stop

    def meets(self, query: Place, key: Place, size: int, prefix: jax.Array | None) -> bool | jax.Array:
        near = (query - self.span < key + size - 1) | (key < self.sinks)
        return (key < query + size) & near
