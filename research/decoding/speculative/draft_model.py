"""Speculation with a smaller model that writes ahead.

Speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a draft model writes
gamma tokens one after the other, the target scores them in one call, and the verifier keeps a prefix. Drafts
are drawn from the draft model's own distribution q, warped as the target's p is, so a token is kept with
probability sum_x min(p(x), q(x)) (2211.17192, equation 3); in greedy decoding they are its first choices.

The draft has a cache of its own. It holds the output up to two tokens before its end, whatever was accepted:
a round begins by reading those two together, one of which it may have read before, and makes gamma forwards
for gamma tokens.

`DraftModel` is a model trained for this; `Submodel` is a slice of a nested target (MatFormer, arXiv
2310.07707), which needs no training and shares the target's arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.sampling import argmax, gumbel
from research.decoding.speculative import losses
from research.decoding.speculative.training import Teacher, ahead
from research.decoding.tree import chain
from research.decoding.verify import Draft
from research.errors import UserError
from research.nn.cache import Cache
from research.nn.transformer import LayerStack, holds_stack, stack_of, unscan_layers
from research.nn.weights import Weight
from research.training.paths import map_named, path_of
from research.training.task import Batch, Metrics, PyTree

Choose = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # logits [B, V] -> token [B], log q [B, V]


class DraftState(struct.PyTreeNode):
    """cache: the draft's; last int32[B]: the token before the root."""

    cache: Cache
    last: jax.Array


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """A proposer and a drafter: `model` writes `gamma` tokens in every call of the target.

    It learns to have the target's distributions (distillation on the data's own text).

    Args:
        model: a decoder with the target's vocabulary and at least its context.
        gamma: tokens drafted in a call.

    Raises:
        UserError: a gamma below 1; when it is used, a model that can't draft for the target.
    """

    model: nn.Module
    gamma: int = 4

    def __post_init__(self) -> None:
        if self.gamma < 1:
            raise UserError(f"DraftModel.gamma must be at least 1, not {self.gamma}")

    @property
    def size(self) -> int:
        return self.gamma + 1

    @property
    def levels(self) -> int:
        return self.gamma + 1

    def create(self, key: jax.Array, target: Target) -> PyTree:
        check_draft(self.model, target)
        return self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """KL of q from p in nats; `acceptance`, sum min(p, q), is the chance that a drawn token is kept, and
        `agreement` that a greedy one is."""
        logits = self.model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"])
        _, weights = ahead(batch, 0)
        common = jnp.minimum(jax.nn.softmax(teacher.logits), jax.nn.softmax(jax.lax.stop_gradient(logits)))
        return {
            "loss": losses.kl(logits, teacher.logits, weights),
            "acceptance": (jnp.sum(common.sum(-1) * weights), jnp.sum(weights)),
            "agreement": losses.agreement(logits, argmax(teacher.logits), weights),
        }

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> DraftState:
        check_draft(self.model, target)
        cache = read_prompt(self.model, params, prompt, margin=self.size + 1)
        last = jnp.take_along_axis(prompt.tokens, prompt.lengths[:, None] - 1, axis=1)[:, 0]
        return DraftState(cache, last)

    def propose(
        self, params: PyTree, target: Target, state: DraftState, round: Round
    ) -> tuple[Draft, DraftState]:
        tokens = jnp.zeros((len(round.root), self.size), jnp.int32).at[:, 0].set(round.root)

        def step(carry: tuple, depth: jax.Array, fed: jax.Array) -> tuple:
            cache, tokens = carry
            choose = lambda logits: draw(round, logits, tokens, depth, depth)  # noqa: E731
            token, log_q, _, cache = write(self.model, params, cache, fed, choose)
            return (cache, put(tokens, depth + 1, token)), log_q

        # The first forward reads the two tokens that the cache may lack, the others what was drawn last.
        carry = state.cache.rollback(round.length - 1), tokens
        carry, first = step(carry, jnp.int32(0), jnp.stack([state.last, round.root], axis=1))

        def following(carry: tuple, depth: jax.Array) -> tuple:
            newest = jax.lax.dynamic_index_in_dim(carry[1], depth, axis=1)
            return step(carry, depth, newest)

        (cache, tokens), others = jax.lax.scan(following, carry, jnp.arange(1, self.gamma))
        q = None if round.greedy else stack_rows(first, others)
        return Draft(tokens, chain(self.size), q), state.replace(cache=cache)

    def observe(self, params: PyTree, target: Target, state: DraftState, outcome: Outcome) -> DraftState:
        return state.replace(last=last_accepted(outcome, state.last))


@dataclasses.dataclass(frozen=True)
class Submodel:
    """Self-speculation: the target's own first hidden units draft.

    The draft is the target with every FFN cut to 1 / divisor of its width, a model of its own where the target
    was trained nested. `create` cuts the arrays that are narrower and shares all others with the target, so
    that it adds the FFN slices to the memory of its weights, and slices once. It keeps a cache of its own:
    the hidden states of the two models part in the first FFN, and with them the keys and values of every
    layer but the first.

    Args:
        divisor: of the FFN widths; 8 is MatFormer's S.
        gamma: tokens drafted in a call.

    Raises:
        UserError: a gamma below 1; when it is used, a target without FFN widths that divide so.
    """

    divisor: int = 8
    gamma: int = 4

    def __post_init__(self) -> None:
        if self.gamma < 1:
            raise UserError(f"Submodel.gamma must be at least 1, not {self.gamma}")
        if self.divisor < 1:
            raise UserError(f"Submodel.divisor must be at least 1, not {self.divisor}")

    @property
    def size(self) -> int:
        return self.gamma + 1

    @property
    def levels(self) -> int:
        return self.gamma + 1

    def drafting(self, model: LayerStack) -> DraftModel:
        """The draft of a target `model`; of one that reads images, the decoder in it, which reads text alone."""
        model = model.decoder if holds_stack(model) else model
        blocks = []
        for block in model.blocks:
            width = getattr(block.mlp, "hidden_dim", None)
            if width is None or width % self.divisor:
                found = f"{type(block.mlp).__name__} with hidden_dim={width}"
                raise UserError(f"Submodel.divisor: {found} has no first 1/{self.divisor} to draft with")
            blocks.append(block.clone(mlp=block.mlp.clone(hidden_dim=width // self.divisor)))
        return DraftModel(model.clone(blocks=tuple(blocks)), self.gamma)

    def create(self, key: jax.Array, target: Target) -> PyTree:
        model, params = unscan_layers(*stack_of(target.model, target.params))
        return leading(self.drafting(model).model, params)

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        model = teacher.target.model.clone(scan_layers=False)
        return self.drafting(model).loss(params, teacher, batch, key)

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> DraftState:
        return self.drafting(target.model).init(params, target, prompt)

    def propose(
        self, params: PyTree, target: Target, state: DraftState, round: Round
    ) -> tuple[Draft, DraftState]:
        return self.drafting(target.model).propose(params, target, state, round)

    def observe(self, params: PyTree, target: Target, state: DraftState, outcome: Outcome) -> DraftState:
        return self.drafting(target.model).observe(params, target, state, outcome)


def leading(model: nn.Module, params: PyTree) -> PyTree:
    """The parameters of `model` as the first entries, along every axis, of the arrays of the same names in
    `params`, those of a larger model; arrays of equal shape are the very same.

    Raises:
        UserError: an array that is absent or too small; projections that were fused for decoding.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    whole = {path_of(keys): leaf for keys, leaf in leaves}

    def cut(path: str, wanted: jax.ShapeDtypeStruct) -> Any:
        if path not in whole:
            raise UserError(
                f"{path} of the submodel is not in the target: cut it before `prepare` fuses projections"
            )
        leaf = whole[path]
        if len(leaf.shape) != len(wanted.shape) or any(
            n > m for n, m in zip(wanted.shape, leaf.shape, strict=True)
        ):
            raise UserError(f"{path} of the submodel is {wanted.shape}, and of the target only {leaf.shape}")
        if leaf.shape == wanted.shape:
            return leaf
        if isinstance(leaf, Weight):
            return leaf.narrow(*wanted.shape[-2:])
        return leaf[tuple(slice(n) for n in wanted.shape)]

    return map_named(cut, shapes)


# What drafters that write with a model of their own share.


def check_draft(model: Any, target: Target) -> None:
    """Raise `UserError` unless `model` can draft for the target."""
    for name, why in (("vocab_size", "a vocabulary"), ("max_length", "a context")):
        own, its = getattr(model, name), getattr(target.model, name)
        if own < its or (own > its and name == "vocab_size"):
            raise UserError(f"the draft model has {why} of {own} and the target of {its}: {name} must fit")
    if getattr(model, "scan_layers", False):
        raise UserError("the draft model has scanned layers: convert it with `unscan_layers` first")


def read_prompt(model: Any, params: PyTree, prompt: Prompt, *, margin: int, room: int = 0) -> Cache:
    """The draft's cache, holding the prompts. margin: how far it is rolled back at most; room: slots beyond
    those of the target."""
    variables = {"params": params}
    _, hidden, fresh = model.apply(variables, prompt.tokens, prompt.lengths, method="prefill")
    cache = model.init_cache(len(prompt.tokens), prompt.capacity + room, hidden.dtype, margin=margin)
    return cache.reversible(margin).commit(fresh, None, prompt.lengths)


def write(
    model: Any,
    params: PyTree,
    cache: Cache,
    fed: jax.Array,
    choose: Choose,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
    """One forward of the draft: reads `fed` int32[B, N] and chooses the token after the last of them.

    Rows that are not `active` bool[B] keep their cache. -> token int32[B], log q float32[B, V], the hidden
    state [B, D] of the last token fed, the cache with what was fed.
    """
    logits, hidden, fresh = model.apply({"params": params}, fed, cache, method="extend")
    token, log_q = choose(logits[:, -1])
    # Tokens are never negative; that the count depends on one orders the write after all reads: see `Engine`.
    count = fed.shape[1] + jnp.minimum(token, 0)
    if active is not None:
        count = jnp.where(active, count, 0)
    return token, log_q, hidden[:, -1], cache.commit(fresh, None, count)


def draw(
    round: Round, logits: jax.Array, tokens: jax.Array, node: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The child of a node of a chain and the log-probabilities float32[B, V] it is drawn from.

    logits [B, V] at `node` int32[] or int32[B] of the chain of tokens int32[B, N], of which those up to the
    node are known; number int32[]: of this draw in the round.
    """
    batch, count = tokens.shape
    every = jnp.broadcast_to(logits[:, None], (batch, count, logits.shape[-1]))
    warped = round.warp(every, tokens, chain(count))
    if warped is every:  # no processors: spare the compiler a gather from equal rows
        warped = logits
    else:
        index = jnp.broadcast_to(node, (batch,))[:, None, None]
        warped = jnp.take_along_axis(warped, index, axis=1)[:, 0]
    log_q = jax.nn.log_softmax(warped)
    if round.greedy:
        return argmax(warped), log_q
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(round.keys)
    return argmax(log_q + gumbel(keys, logits.shape[-1])), log_q


def put(tokens: jax.Array, column: jax.Array, values: jax.Array) -> jax.Array:
    """tokens [B, N] with values [B] in a column int32[]."""
    return jnp.where(jnp.arange(tokens.shape[1]) == column, values[:, None], tokens)


def stack_rows(first: jax.Array, others: jax.Array) -> jax.Array:
    """q of a chain: first [B, V], others [gamma - 1, B, V] -> [B, gamma + 1, V]; the last has no children."""
    rows = jnp.concatenate([first[None], others, jnp.zeros_like(first[None])])
    return jnp.moveaxis(rows, 0, 1)


def last_accepted(outcome: Outcome, before: jax.Array) -> jax.Array:
    """int32[B], the last token that the target's cache has taken in; `before` where it took in none."""
    token = jnp.take_along_axis(outcome.draft.tokens, outcome.accept.last[:, None], axis=1)[:, 0]
    return jnp.where(outcome.accept.count > 0, token, before)
