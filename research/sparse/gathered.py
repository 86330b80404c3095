"""Decoding over a few chosen tokens of the cache: what all selectors share.

    model, params = gathered(model, params, selector)
    Generator(model, params).generate(["def main("])

The converted model has the parameters, the caches and the contract of the one it was made from, and prefills as that
one does. In `extend` a layer has one of four roles, which the selector gives out:

    full      as it was
    select    full attention, and the k tokens with the greatest scores are chosen for the layers above
    reuse     attention over the tokens chosen last, below, in the same call
    choose    the selector chooses for this layer alone, and attention is over what it chose

`reuse` and `choose` read the rows of the chosen tokens and no others. Every new token (a node of a drafted tree)
chooses for itself, among the slots of the cache, its ancestors and itself, and always has itself.

A choice is int32 [B, s, N, K]: s sets, one for each query head or each key head; an entry is the slot of a committed
token, S + j the new token j, where S is the cache's slots, and -1 nobody. It goes from layer to layer as the depth
state of the `Stream`, so it never outlives a call.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.chosen_attention import listed_attention, select_attention
from kernels_pallas.common import Implementation
from kernels_pallas.decode_attention import Partial, Unsupported, gather_attention, merge
from research.errors import UserError
from research.nn.attention import Context
from research.nn.attention_kernels import (
    NEGATIVE,
    cached_scores,
    cached_values,
    cap,
)
from research.nn.cache import DenseCache, Fresh, LayerCache
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.masks import Causal, Full, Prefix
from research.nn.transformer import LayerStack, Stream, in_stack, run_block, unscan_layers

Role = Literal["full", "select", "reuse", "choose"]
Per = Literal["head", "group"]
Reading = Literal["xla", "auto"] | Implementation | None


class Call(NamedTuple):
    """What a `CachedKernel` is called with, the layer's cache, and whether the kernels for a CPU compute it."""

    query: jax.Array
    cached: tuple[jax.Array, jax.Array]
    fresh: tuple[jax.Array, jax.Array]
    length: jax.Array
    cached_mask: jax.Array | None
    fresh_mask: jax.Array
    scale: float
    softcap: float | None
    cache: LayerCache
    on_cpu: bool = False

    @property
    def slots(self) -> int:
        return self.cached[0].shape[2]

    def scores(self) -> tuple[jax.Array, jax.Array]:
        """As `cached_scores`: of the slots and of the new tokens, before the softmax."""
        masks = (self.length, self.cached_mask, self.fresh_mask)
        numbers = dict(scale=self.scale, softcap=self.softcap)
        return cached_scores(self.query, self.cached[0], self.fresh[0], *masks, **numbers)

    def attend(self, k: int, per: Per) -> tuple[jax.Array, jax.Array]:
        """Attention over all tokens, [B, H, N, d], and a choice of the k with the greatest scores."""
        if self.on_cpu:
            return self._select(self.cached, self.fresh, k, per)
        scores = self.scores()
        return cached_values(scores, self.cached[1], self.fresh[1]), choose_greatest(scores, k, per)

    def greatest(self, k: int, per: Per) -> jax.Array:
        """A choice of the k tokens with the greatest scores; values are not read."""
        if self.on_cpu:
            # A key is in the core's cache when it is read again in the place of a value.
            keys = ((rows[0], rows[0]) for rows in (self.cached, self.fresh))
            return self._select(*keys, k, per)[1]
        return choose_greatest(self.scores(), k, per)

    def _select(self, cached, fresh, k: int, per: Per) -> tuple[jax.Array, jax.Array]:
        masks = (self.length, self.fresh_mask, self.cached_mask)
        numbers = dict(scale=self.scale, softcap=self.softcap)
        return select_attention(self.query, cached, fresh, *masks, k=k, per=per, **numbers)

    def depth(self) -> jax.Array:
        """int32[b, N]: how many ancestors a new token has in the tree."""
        return jnp.sum(self.fresh_mask[:, 0], axis=-1, dtype=jnp.int32) - 1


class Selector(Protocol):
    """Which layers choose tokens, and how. Frozen dataclasses: selectors are static and hashable.

    k: tokens of a choice, the new token itself among them. per: whether every query head has a choice or the query
    heads of a key head share one. A selector that gives out the role `choose` has `choose(call: Call)`, which gives a
    choice, int32 [B, s, N, at most k], each token at most once; one that keeps something beside keys and values has
    `cache(empty: DenseCache)`, which makes the layer's cache, a `DenseCache` too.
    """

    k: int
    per: Per

    def role(self, layer: int) -> Role: ...


def choose_greatest(scores: tuple[jax.Array, jax.Array], k: int, per: Per) -> jax.Array:
    """The k visible tokens with the greatest scores, fewer where fewer are visible; oneself is always one of them.

    scores: as `cached_scores`. By the greatest score of a group where its heads share. -> a choice.
    """
    count = scores[1].shape[3]
    itself = jnp.eye(count, dtype=bool)
    joint = jnp.concatenate([scores[0], jnp.where(itself, jnp.inf, scores[1])], axis=-1)
    joint = jnp.max(joint, axis=2) if per == "group" else joint.reshape(joint.shape[0], -1, *joint.shape[3:])
    # Masked ones must not be taken where fewer than k are visible.
    joint = jnp.where(joint > NEGATIVE, joint, -jnp.inf)
    greatest, index = jax.lax.top_k(joint, min(k, joint.shape[-1]))
    return jnp.where(greatest > -jnp.inf, index, -1)


@dataclasses.dataclass(frozen=True)
class Observer:
    """Every layer attends to all tokens, and tells which k it would have chosen; see `GatheredBlock`."""

    k: int
    per: Per = "head"

    def role(self, layer: int) -> Role:
        return "select"


def attend_chosen(call: Call, choice: jax.Array) -> jax.Array:
    """Attention over the chosen tokens alone, [B, H, N, d]. Rows of other tokens are not read."""
    if call.on_cpu:
        numbers = dict(scale=call.scale, softcap=call.softcap)
        return listed_attention(call.query, call.cached, call.fresh, choice, **numbers)
    batch, heads, count, dim = call.query.shape
    kv_heads, slots = call.cached[0].shape[1:3]
    sets = choice.shape[1]
    query = call.query.reshape(batch, sets, heads // sets, count, dim)
    # Rows of all heads and sequences are one table.
    head = jnp.arange(batch * kv_heads).reshape(batch, kv_heads, 1, 1)
    row = jnp.repeat(head * slots, sets // kv_heads, axis=1) + jnp.clip(choice, 0, slots - 1)

    def gather(table: jax.Array) -> jax.Array:
        return jnp.take(table.reshape(-1, dim), row, axis=0, mode="clip").astype(query.dtype)

    held = ((choice >= 0) & (choice < slots))[:, :, None]
    old = jnp.einsum("bsgnd,bsnkd->bsgnk", query, gather(call.cached[0]), preferred_element_type=jnp.float32)
    old = jnp.where(held, cap(old * call.scale, call.softcap), NEGATIVE)
    new = _fresh_scores(call, choice)
    top = jnp.maximum(jnp.max(old, axis=-1, keepdims=True), jnp.max(new, axis=-1, keepdims=True))
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = jnp.sum(old, axis=-1, keepdims=True) + jnp.sum(new, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bsgnk,bsnkd->bsgnd",
        old.astype(query.dtype),
        gather(call.cached[1]),
        preferred_element_type=jnp.float32,
    )
    fresh = jnp.einsum(
        "bhrn,bhnd->bhrd",
        new.astype(query.dtype).reshape(batch, kv_heads, -1, count),
        call.fresh[1],
        preferred_element_type=jnp.float32,
    )
    out = (out + fresh.reshape(out.shape)) / total
    return out.astype(query.dtype).reshape(batch, heads, count, dim)


def _fresh_scores(call: Call, choice: jax.Array) -> jax.Array:
    """[B, s, H / s, N, N], NEGATIVE where not chosen. The new tokens' rows are at hand and few: all are multiplied.

    Oneself is seen even where nobody is chosen, as by rows that join between layers (`VirtualRows`)."""
    batch, sets, count, _ = choice.shape
    kv_heads, dim = call.fresh[0].shape[1], call.query.shape[3]
    chosen = jnp.any(choice[..., None] == call.slots + jnp.arange(count), axis=-2) | jnp.eye(
        count, dtype=bool
    )
    query = call.query.reshape(batch, kv_heads, -1, dim)
    scores = jnp.einsum("bhrd,bhnd->bhrn", query, call.fresh[0], preferred_element_type=jnp.float32)
    scores = cap(scores * call.scale, call.softcap).reshape(batch, sets, -1, count, count)
    return jnp.where(chosen[:, :, None], scores, NEGATIVE)


def attend_chosen_by_kernel(
    call: Call, choice: jax.Array, implementation: Implementation | None
) -> jax.Array:
    """As `attend_chosen`, by the kernel of `kernels_pallas.decode_attention`, once for every new token.

    Raises UserError where the kernel cannot run; nothing else is run instead.
    """
    batch, heads, count, dim = call.query.shape
    entries = jnp.full((batch,), choice.shape[3], jnp.int32)
    # Nobody (-1) and new tokens (from S on) lie outside the length, and are not seen.
    options = dict(scale=call.scale, softcap=call.softcap, implementation=implementation)
    try:
        tokens = [
            gather_attention(
                call.query[:, :, j : j + 1], *call.cached, choice[:, :, j], entries, call.length, **options
            )
            for j in range(count)
        ]
    except Unsupported as error:
        raise UserError(f"implementation={implementation}: {error}; xla runs everywhere") from error
    old = Partial(*(jnp.concatenate(leaves, axis=2) for leaves in zip(*tokens, strict=True)))
    scores = _fresh_scores(call, choice).reshape(batch, call.fresh[1].shape[1], -1, count, count)
    fresh = jnp.einsum(
        "bhgnm,bhmd->bhgnd", jax.nn.softmax(scores, axis=-1), call.fresh[1].astype(jnp.float32)
    )
    lse = jax.nn.logsumexp(scores, axis=-1)
    new = Partial(fresh.reshape(batch, heads, count, dim), lse.reshape(batch, heads, count))
    return merge(old, new).out.astype(call.query.dtype)


class _Kernel:
    """A `CachedKernel` for one call of one layer, which tells afterwards what was chosen, in `choice`.

    It is made and asked within the same trace, so that the mixer around it need not know of choices.
    """

    def __init__(self, block: "GatheredBlock", cache: LayerCache, choice: jax.Array):
        self._selector, self._role, self._implementation = block.selector, block.role, block.implementation
        self._cache, self.choice = cache, choice

    def __call__(self, query, cached, fresh, length, cached_mask, fresh_mask, *, scale, softcap):
        call = Call(query, cached, fresh, length, cached_mask, fresh_mask, scale, softcap, self._cache)
        if self._implementation is None:
            call = call._replace(on_cpu=_fits_cpu(query, cached[0]))
        if self._role == "select":
            out, self.choice = call.attend(self._selector.k, self._selector.per)
            return out
        if self._role == "choose":
            self.choice = self._selector.choose(call)
        # Where there are fewer tokens than k, nobody is chosen in the places behind them.
        choice = self.choice[..., : call.slots + query.shape[2]]
        if self._implementation in (None, "xla"):
            return attend_chosen(call, choice)
        return attend_chosen_by_kernel(
            call, choice, None if self._implementation == "auto" else self._implementation
        )


def _fits_cpu(query: jax.Array, key: jax.Array) -> bool:
    """Whether the kernels for a CPU compute heads of this size."""
    return query.dtype == key.dtype == jnp.float32 and query.shape[3] % 4 == 0 and use_cpu_kernels()


class Chosen(struct.PyTreeNode):
    """What goes through depth: the choice, flattened to [..., s * k] with the leading axes of the hidden states, and
    what the blocks themselves carry."""

    choice: jax.Array
    inner: Any


@dataclasses.dataclass(frozen=True)
class Template:
    """A block, hidden from linen, which would make a submodule of it."""

    block: nn.Module


class GatheredBlock(nn.Module):
    """A block of a trained model in a role; its parameters are those of the block, under the same names.

    Leaves the choice that it read, or made, in mutable "intermediates".

    Args:
        template: the block.
        selector, role: see the head of this file.
        sets: choices of a token, s.
        carrier: the first block of the stack that carries a state of its own through depth, or None.
        implementation: how chosen rows are read, see `gathered`.
    """

    template: Template
    selector: Selector
    role: Role
    sets: int
    carrier: Template | None = None
    implementation: Reading = None

    @property
    def attention(self) -> "GatheredBlock":
        """Whom a stack asks for the layer's cache."""
        return self

    @nn.nowrap
    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> LayerCache:
        cache = self.template.block.attention.init_cache(batch, capacity, margin, dtype)
        return (
            self.selector.cache(cache) if self.role == "choose" and hasattr(self.selector, "cache") else cache
        )

    @nn.nowrap
    def init_depth(self, x: jax.Array) -> Chosen:
        """Nobody is chosen before the first selection."""
        inner = None if self.carrier is None else self.carrier.block.init_depth(x)
        return Chosen(jnp.full((*x.shape[:-1], self.sets * self.selector.k), -1, jnp.int32), inner)

    def __call__(
        self, stream: Stream, context: Context, cache: LayerCache | None = None
    ) -> tuple[Stream, Fresh]:
        state = stream.depth
        block, kernel = self.template.block, None
        if cache is not None and self.role != "full":
            choice = state.choice.reshape(*context.positions.shape, self.sets, -1).swapaxes(1, 2)
            kernel = _Kernel(self, cache, choice)
            block = block.clone(attention=block.attention.clone(cached_kernel=kernel))
        # In the scope of this module, so that the block's parameters are found under their own names.
        out, fresh = run_block(
            block.clone(parent=self.scope), Stream(stream.x, state.inner), context, cache, "none"
        )
        if kernel is None:
            return Stream(out.x, state.replace(inner=out.depth)), fresh
        self.sow("intermediates", "choice", kernel.choice)
        missing = self.selector.k - kernel.choice.shape[-1]
        choice = jnp.pad(kernel.choice, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=-1)
        choice = choice.swapaxes(1, 2).reshape(state.choice.shape)
        return Stream(out.x, Chosen(choice, out.depth)), fresh


def attends_to_all(mixer: nn.Module, length: int) -> bool:
    """Whether a mixer keeps the keys and values of all tokens and lets every new one see them: what can be gathered."""
    if not hasattr(mixer, "cached_kernel") or not isinstance(
        getattr(mixer, "rule", None), (Full, Causal, Prefix)
    ):
        return False
    return isinstance(jax.eval_shape(lambda: mixer.init_cache(1, length, 0, jnp.float32)), DenseCache)


@in_stack
def gathered(
    model: LayerStack,
    params: Any,
    selector: Selector,
    implementation: Reading = None,
) -> tuple[LayerStack, Any]:
    """The same trained decoder, which decodes by the selector; layers unrolled, parameters otherwise as they are.

    Layers that do not see all tokens (windows, state spaces) and other mixers stay as they are. The selector's layers
    are computed by the kernels for a CPU, where there are some and they take the heads, and else by XLA (None); by XLA
    anywhere ("xla"); or by XLA but for chosen rows, which the Pallas kernel of the backend ("auto") or the one named
    reads.

    Raises:
        UserError: the selector's layers are not there or see a part, no layer is left to gather in, or heads differ.
    """
    name = type(model).__name__
    if not isinstance(model, LayerStack) or not hasattr(model, "extend") or hasattr(model, "encoder"):
        raise UserError(f"{selector}: {name} is not a decoder with a cache of its own tokens")
    model, params = unscan_layers(model, params)
    blocks = [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]
    if any(isinstance(block, GatheredBlock) for block in blocks):
        raise UserError(f"{selector}: the model has a selector already, {blocks[0].selector}")
    whole = [i for i, block in enumerate(blocks) if attends_to_all(block.attention, model.max_length)]
    roles = [selector.role(i) for i in range(model.num_layers)]
    wanted = getattr(selector, "selection", ())
    if absent := [layer for layer in wanted if layer not in whole]:
        raise UserError(
            f"{selector}: layer {absent[0]} can't select: of the {model.num_layers} layers of this {name}, "
            f"{', '.join(map(str, whole)) or 'none'} attend to all tokens"
        )
    roles = [role if i in whole else "full" for i, role in enumerate(roles)]
    reading = ("select",) if isinstance(selector, Observer) else ("reuse", "choose")
    if not any(role in reading for role in roles):
        raise UserError(f"{selector}: no layer of this {name} is left that would read fewer tokens")
    active = [blocks[i].attention for i in whole]
    sets = {mixer.num_heads if selector.per == "head" else mixer.kv_heads for mixer in active}
    if len(sets) > 1:
        raise UserError(f"{selector}: layers have {sorted(sets)} heads, and a choice is one for each head")
    carrier = next((Template(block) for block in blocks if hasattr(block, "init_depth")), None)
    fields = dict(selector=selector, sets=sets.pop(), carrier=carrier, implementation=implementation)
    blocks = tuple(
        GatheredBlock(Template(block), role=role, **fields) for block, role in zip(blocks, roles, strict=True)
    )
    return model.clone(blocks=blocks), params
