"""What drafts: the protocol of a proposer, and plain decoding.

A proposer is static and hashable; its parameters and its state are pytrees. It may use the target's own
embedding, head and layers (`Target`). It reads neither the noise that verifies its drafts nor anything later
than the last accepted token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct

from research.decoding.tree import Tree, chain
from research.decoding.verify import Accept, Draft


class Target(struct.PyTreeNode):
    """The model that is decoded and its parameters, for drafters that share them."""

    params: Any
    model: Any = struct.field(pytree_node=False)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int32[...] -> what enters the first layer [..., D]."""
        return self.model.apply({"params": self.params}, tokens, method="embed")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] after the final norm -> float32 logits [..., V] of the target's head."""
        return self.model.apply({"params": self.params}, hidden, method="logits")


class Prompt(struct.PyTreeNode):
    """What is known after prefill, a row for every sequence.

    tokens int32[B, T] padded on the right; lengths int32[B]; hidden [B, T, D] after the final norm; root
    int32[B], the first token of the output; capacity: slots a cache of the drafter's own needs.
    """

    tokens: jax.Array
    lengths: jax.Array
    hidden: jax.Array
    root: jax.Array
    capacity: int = struct.field(pytree_node=False)


class Round(struct.PyTreeNode):
    """What a proposer is told before a call: root int32[B], the newest token; length int32[B], tokens before
    it; keys [B], fresh in every call; `warp(logits [B, N, V], tokens int32[B, N], tree)`, the processors of
    the target, to be applied to logits at the nodes of a (partial) draft before drawing from them; greedy:
    the verifier is `Greedy`, so a drafter that draws should take its most probable tokens instead."""

    root: jax.Array
    length: jax.Array
    keys: jax.Array
    warp: Callable[[jax.Array, jax.Array, Tree], jax.Array] = struct.field(pytree_node=False)
    greedy: bool = struct.field(pytree_node=False, default=False)


class Outcome(struct.PyTreeNode):
    """What a proposer is told after a call: the draft; what was accepted (`accept.count` is 0 in finished
    rows; `accept.token` is the next root where none was cut off by an end or a limit); logits float32[B, N,
    V], unprocessed, processed float32[B, N, V], as the verifier saw them, and hidden [B, N, D], after the final
    norm, of every node, virtual ones included."""

    draft: Draft
    accept: Accept
    logits: jax.Array
    processed: jax.Array
    hidden: jax.Array


class Proposer(Protocol):
    """`size` and `levels` bound the draft: nodes N in a call and one more than the greatest depth."""

    size: int
    levels: int

    def init(self, params: Any, target: Target, prompt: Prompt) -> Any:
        """The state after prefill."""

    def propose(self, params: Any, target: Target, state: Any, round: Round) -> tuple[Draft, Any]:
        """A draft below round.root."""

    def observe(self, params: Any, target: Target, state: Any, outcome: Outcome) -> Any:
        """The state after a call. It must leave finished rows in a state that `propose` can still be run on."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """No draft: the tree is the root, and every call gives one token."""

    size: int = dataclasses.field(default=1, init=False)
    levels: int = dataclasses.field(default=1, init=False)

    def init(self, params: Any, target: Target, prompt: Prompt) -> tuple[()]:
        return ()

    def propose(self, params: Any, target: Target, state: tuple[()], round: Round) -> tuple[Draft, tuple[()]]:
        return Draft(round.root[:, None], chain(1)), state

    def observe(self, params: Any, target: Target, state: tuple[()], outcome: Outcome) -> tuple[()]:
        return state
