"""Selectors to compare with TidalDecode: the best tokens of every layer, Quest's pages, and the newest tokens.

All have the interface of `research.sparse.gathered.Selector`, leave the first `dense` layers as they are, and spend the
same k tokens in each of the others.
"""

import dataclasses

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.cache import DenseCache, Fresh
from research.sparse.gathered import Call, Per, Role


def check_budget(selector: str, k: int) -> None:
    if k < 1:
        raise UserError(f"{selector}: k={k}; a token reads at least itself")


@dataclasses.dataclass(frozen=True)
class EveryLayer:
    """The k tokens with the greatest scores, for every layer anew: all keys are read, and k values.

    What position persistence is to approximate.
    """

    k: int
    dense: int = 2
    per: Per = "head"

    def __post_init__(self):
        check_budget("EveryLayer", self.k)

    def role(self, layer: int) -> Role:
        return "full" if layer < self.dense else "choose"

    def choose(self, call: Call) -> jax.Array:
        return call.greatest(self.k, self.per)


@dataclasses.dataclass(frozen=True)
class Newest:
    """The first `sinks` tokens and the newest ones, k in all (StreamingLLM, arXiv 2309.17453, but positions stay)."""

    k: int
    sinks: int = 4
    dense: int = 2
    per: Per = "group"

    def __post_init__(self):
        check_budget("Newest", self.k)
        if not 0 <= self.sinks < self.k:
            raise UserError(f"Newest: sinks={self.sinks} of k={self.k} tokens leave no window")

    def role(self, layer: int) -> Role:
        return "full" if layer < self.dense else "choose"

    def choose(self, call: Call) -> jax.Array:
        batch, kv_heads, count, _ = call.fresh[0].shape
        window = self.k - self.sinks
        # Ancestors by their depth, the nearest first, and then committed tokens from the last one down.
        depth = jnp.broadcast_to(call.depth(), (batch, count))
        near, ancestor = jax.lax.top_k(
            jnp.where(call.fresh_mask[:, 0], depth[:, None], -1), min(window, count)
        )
        above = jnp.where(near >= 0, call.slots + ancestor, -1)  # [B, N, at most N]
        place = jnp.arange(window)
        slot = call.length[:, None, None] - 1 - (place - depth[..., None] - 1)
        slot = jnp.where((place > depth[..., None]) & (slot >= self.sinks), slot, -1)
        recent = jnp.pad(above, ((0, 0), (0, 0), (0, window - above.shape[-1])), constant_values=-1)
        first = jnp.where(jnp.arange(self.sinks) < call.length[:, None, None], jnp.arange(self.sinks), -1)
        first = jnp.broadcast_to(first, (batch, count, self.sinks))
        choice = jnp.concatenate([first, jnp.maximum(recent, slot)], axis=-1)
        return jnp.broadcast_to(choice[:, None], (batch, kv_heads, count, self.k)).astype(jnp.int32)


class PagedCache(DenseCache):
    """A `DenseCache` with the least and greatest entry of the keys of every whole page, [B, Hkv, S / page, d] each."""

    least: jax.Array
    greatest: jax.Array

    @classmethod
    def of(cls, empty: DenseCache, page: int) -> "PagedCache":
        """Slots are rounded up to whole pages."""
        missing = -empty.key.shape[2] % page
        key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (empty.key, empty.value))
        bounds = key[:, :, ::page]
        return cls(key, value, bounds, bounds)

    def append(self, fresh: Fresh, length: jax.Array, count: jax.Array) -> "PagedCache":
        """The bounds of pages into which rows were written are taken anew, so that a roll-back leaves no trace."""
        dense = DenseCache(self.key, self.value).append(fresh, length, count)
        pages = self.least.shape[2]
        page = dense.key.shape[2] // pages
        touched = min(-(-fresh[0].shape[2] // page) + 1, pages)
        first = jnp.minimum(length // page, pages - touched)

        def update(key: jax.Array, least: jax.Array, greatest: jax.Array, first: jax.Array):
            rows = jax.lax.dynamic_slice_in_dim(key, first * page, touched * page, axis=1)
            rows = rows.reshape(key.shape[0], touched, page, -1)
            return (
                jax.lax.dynamic_update_slice_in_dim(least, jnp.min(rows, axis=2), first, axis=1),
                jax.lax.dynamic_update_slice_in_dim(greatest, jnp.max(rows, axis=2), first, axis=1),
            )

        return PagedCache(
            dense.key, dense.value, *jax.vmap(update)(dense.key, self.least, self.greatest, first)
        )

    def select(self, rows: jax.Array) -> "PagedCache":
        return PagedCache(self.key[rows], self.value[rows], self.least[rows], self.greatest[rows])


@dataclasses.dataclass(frozen=True)
class Quest:
    """Quest (arXiv 2406.10774): the pages whose keys could have the greatest score, for every layer anew.

    A page's bound is sum_d max(q_d least_d, q_d greatest_d). The token's own page is always one of the k / page.
    Chooses for one new token a call: pages in the making have no bound.
    """

    k: int
    page: int = 16
    dense: int = 2
    per: Per = "head"

    def __post_init__(self):
        check_budget("Quest", self.k)
        if self.page < 1 or self.k % self.page:
            raise UserError(f"Quest: k={self.k} tokens are not whole pages of {self.page}")

    def role(self, layer: int) -> Role:
        return "full" if layer < self.dense else "choose"

    def cache(self, empty: DenseCache) -> PagedCache:
        return PagedCache.of(empty, self.page)

    def choose(self, call: Call) -> jax.Array:
        batch, heads, count, dim = call.query.shape
        if count > 1:
            raise UserError(f"{self} chooses for one token a call, and a draft has {count}")
        cache = call.cache
        kv_heads, pages = cache.least.shape[1:3]
        query = call.query.reshape(batch, kv_heads, -1, dim)
        product = "bhgd,bhpd->bhgp"
        bound = jnp.einsum(product, jnp.maximum(query, 0), cache.greatest, preferred_element_type=jnp.float32)
        bound += jnp.einsum(product, jnp.minimum(query, 0), cache.least, preferred_element_type=jnp.float32)
        bound = jnp.max(bound, axis=2) if self.per == "group" else bound.reshape(batch, heads, pages)
        own = (call.length // self.page)[:, None, None]
        number = jnp.arange(pages)
        bound = jnp.where(number < own, bound, jnp.where(number == own, jnp.inf, -jnp.inf))
        best, chosen = jax.lax.top_k(bound, min(self.k // self.page, pages))
        slot = chosen[..., None] * self.page + jnp.arange(self.page)
        seen = (best > -jnp.inf)[..., None] & (slot <= call.length[:, None, None, None])
        slot = jnp.where(slot == call.length[:, None, None, None], call.slots, slot)  # the token itself
        return jnp.where(seen, slot, -1).reshape(*slot.shape[:2], 1, -1)
