"""Which drafted nodes to keep: exact acceptance rules for trees, batched and driven by keys.

A verifier sees the processed logits of every node and returns one path from the root and the token after it.
`Greedy` emits the tokens of plain greedy decoding; `Sampled` emits tokens with the law of plain sampling;
`Typical` changes the law for longer accepted runs. The first two rest on known theorems:

- A node that carries the token the model would choose is kept, the first that differs ends the path (greedy).
- Deterministic draft: draw y from p at every node and descend while y is among the children. That is
  speculative sampling (Leviathan et al., arXiv 2211.17192) with a point mass as draft, for any number of
  distinct children.
- Drafts drawn from q: accept x with probability min(1, p(x) / q(x)), else replace p by norm(max(p - q, 0))
  and go on to the next sibling (SpecInfer, arXiv 2305.09781); drawn without replacement, q also loses x.

Draws are keyed by output position, so sampling with a deterministic draft gives not only the law but the very
tokens that plain sampling gives for the same seed.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.sampling import argmax, gumbel
from research.decoding.tree import Tree
from research.errors import UserError
from research.nn.transformer import VirtualRows


class Draft(struct.PyTreeNode):
    """What a proposer offers.

    tokens int32[B, N], the root first; tree; q float32[B, N, V], the log-probabilities that the children of
    each node were drawn from, after processing, or None where the children are a function of the context.
    `replacement` says whether siblings were drawn independently (True) or without repeats (False).

    `virtual` makes the last `virtual.size` of the N nodes, which are not real: their tokens are ignored, and
    they enter the model as hidden states between its layers.
    """

    tokens: jax.Array
    tree: Tree
    q: jax.Array | None = None
    replacement: bool = struct.field(pytree_node=False, default=True)
    virtual: VirtualRows | None = None


class Accept(struct.PyTreeNode):
    """path int32[B, levels], accepted nodes from the root on; count int32[B] of them; token int32[B] after
    the last."""

    path: jax.Array
    count: jax.Array
    token: jax.Array

    @property
    def last(self) -> jax.Array:
        """int32[B]: the last accepted node; the root in finished rows, which accept none."""
        return _at(self.path, jnp.maximum(self.count - 1, 0))


class Verifier(Protocol):
    """Static and hashable."""

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array) -> Accept:
        """logits float32[B, N, V], processed; keys [B, levels], one for each output position."""


def follow(matched: jax.Array, choice: jax.Array, tree: Tree, preference: jax.Array | None = None) -> Accept:
    """The longest path of matched nodes, and the choice int32[B, N] at its end.

    matched bool[B, N] says whether each node may follow its parent; the root always may. Of equally long paths
    it is the one whose end has the greatest `preference` float32[B, N], or else comes first.
    """
    batch = choice.shape[0]
    if tree.size == 1:
        return Accept(jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32), choice[:, 0])
    matched = (matched & tree.real) | (jnp.arange(tree.size) == 0)
    reached = jnp.all(matched[:, None, :] | ~tree.mask, axis=-1)
    depth = jnp.broadcast_to(tree.depth, reached.shape)
    reached_depth = jnp.where(reached, depth, -1)
    if preference is None:
        last = jnp.argmax(reached_depth, axis=-1)
    else:
        longest = reached_depth == jnp.max(reached_depth, axis=-1, keepdims=True)
        last = jnp.argmax(jnp.where(longest, preference, -jnp.inf), axis=-1)
    return _accept(last, _at(choice, last), tree)


def _accept(last: jax.Array, token: jax.Array, tree: Tree) -> Accept:
    """The path from the root to node `last` int32[B]."""
    batch = last.shape[0]
    mask = jnp.broadcast_to(tree.mask, (batch, tree.size, tree.size))
    depth = jnp.broadcast_to(tree.depth, (batch, tree.size))
    on_path = jnp.take_along_axis(mask, last[:, None, None], axis=1)  # [B, 1, N]
    level = depth[:, None, :] == jnp.arange(tree.levels)[:, None]  # [B, levels, N]
    path = jnp.argmax(on_path & level, axis=-1).astype(jnp.int32)
    return Accept(path, _at(depth, last) + 1, token)


def _at(x: jax.Array, node: jax.Array) -> jax.Array:
    """x [B, N, ...] -> x[b, node[b]]."""
    return x[jnp.arange(x.shape[0]), node]


def match_children(choice: jax.Array, draft: Draft) -> jax.Array:
    """bool[B, N]: each node's token is the choice int32[B, N] of its parent."""
    parent = jnp.broadcast_to(jnp.maximum(draft.tree.parent, 0), draft.tokens.shape)
    return draft.tokens == jnp.take_along_axis(choice, parent, axis=1)


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Keeps the nodes that carry the most probable token; the output is that of plain greedy decoding."""

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array | None = None) -> Accept:
        choice = argmax(logits)
        return follow(match_children(choice, draft), choice, draft.tree)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Keeps the law of plain sampling, by the rule that fits how the draft was made."""

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array) -> Accept:
        if draft.q is not None:
            return _verify_drawn(logits, draft, keys)
        # Nodes of one depth may share their noise: only one of them is ever visited.
        noise = gumbel(keys, logits.shape[-1])
        depth = jnp.broadcast_to(draft.tree.depth, draft.tokens.shape)
        depth = jnp.minimum(depth, draft.tree.levels - 1)  # virtual nodes may lie deeper
        if draft.tree.size > 1:
            noise = jnp.take_along_axis(noise, depth[..., None], axis=1)
        choice = argmax(logits + noise)
        return follow(match_children(choice, draft), choice, draft.tree)


@dataclasses.dataclass(frozen=True)
class Typical:
    """Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1): not lossless above temperature 0.

    A node is kept where its token has probability p(x) > min(epsilon, delta exp(-H(p))) after its parent, of
    entropy H in nats: where the target is unsure, less probable tokens are typical. The longest kept path wins,
    of equally long ones the more probable; the most probable token follows it. As the temperature falls to 0
    this becomes `Greedy`; at exactly 0 nothing scales the logits, and it judges as at 1.

    Raises:
        UserError: a threshold outside [0, 1].
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"typical acceptance: {name} must be from 0 to 1, not {getattr(self, name)}")

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array | None = None) -> Accept:
        log_p = jax.nn.log_softmax(logits, axis=-1)
        p = jnp.exp(log_p)
        entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        parent = jnp.broadcast_to(jnp.maximum(draft.tree.parent, 0), draft.tokens.shape)
        scores = log_p[jnp.arange(len(parent))[:, None], parent, draft.tokens]  # log p(x) after the parent
        matched = jnp.exp(scores) > jnp.take_along_axis(threshold, parent, axis=1)
        scores = scores.at[:, 0].set(0.0)  # the root is certain
        along = jnp.sum(jnp.where(draft.tree.mask, scores[:, None, :], 0.0), axis=-1)
        return follow(matched, argmax(logits), draft.tree, preference=along)


@dataclasses.dataclass(frozen=True)
class TopBeta:
    """The relaxed rule of GAD++ (arXiv 2205.10350, section 3.2): not lossless, but for beta = 1.

    A node is kept if its token is among the `beta` most probable after its parent (of equally probable ones the
    first), and its logit at most `gap` nats below the greatest. The most probable token follows the path.
    """

    beta: int = 5
    gap: float = 3.0

    def __post_init__(self) -> None:
        if self.beta < 1 or not self.gap >= 0:
            raise UserError(f"TopBeta: beta={self.beta} must be at least 1 and gap={self.gap} not below 0")

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array | None = None) -> Accept:
        choice = argmax(logits)
        parent = jnp.broadcast_to(jnp.maximum(draft.tree.parent, 0), draft.tokens.shape)
        above = jnp.take_along_axis(logits, parent[..., None], axis=1)  # [B, N, V]
        own = jnp.take_along_axis(above, draft.tokens[..., None], axis=-1)
        before = jnp.arange(above.shape[-1]) < draft.tokens[..., None]
        rank = jnp.sum((above > own) | ((above == own) & before), axis=-1)
        near = jnp.max(above, axis=-1) - own[..., 0] <= self.gap
        return follow((rank < self.beta) & near, choice, draft.tree)


def _verify_drawn(logits: jax.Array, draft: Draft, keys: jax.Array) -> Accept:
    tree, (batch, count) = draft.tree, draft.tokens.shape
    p = jax.nn.softmax(logits, axis=-1)
    q = jax.nn.softmax(draft.q, axis=-1)  # normalised again: log-probabilities carry rounding
    # One uniform for the test of every sibling at every depth, and Gumbel noise for the token that ends the
    # path.
    split = jax.vmap(jax.vmap(lambda key: jax.random.split(key, 2)))(keys)
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (tree.width,))))(split[:, :, 0])
    noise = gumbel(split[:, :, 1], logits.shape[-1])
    parent = jnp.broadcast_to(tree.parent, (batch, count))
    rank = jnp.broadcast_to(tree.rank, (batch, count))
    real = jnp.broadcast_to(tree.real, (batch, count))

    def level(depth: jax.Array, carry: tuple) -> tuple:
        node, target, alive = carry
        start = node

        def sibling(j: jax.Array, inner: tuple) -> tuple:
            node, target, source, open_ = inner
            here = (parent == start[:, None]) & (rank == j) & real
            child = jnp.argmax(here, axis=-1)
            tested = open_ & jnp.any(here, axis=-1)
            token = _at(draft.tokens, child)
            u = jnp.take(jnp.take(uniform, depth, axis=1), j, axis=1)
            passed = tested & (u * _at(source, token) < _at(target, token))
            failed = tested & ~passed
            residual = jnp.maximum(target - source, 0.0)
            total = jnp.sum(residual, axis=-1, keepdims=True)
            # p equals q to the last bit: no residual, and a rejection has probability 0. Keep p.
            residual = jnp.where(total > 0, residual / jnp.where(total > 0, total, 1.0), target)
            target = jnp.where(failed[:, None], residual, target)
            if not draft.replacement:
                rest = jnp.where(jnp.arange(source.shape[-1]) == token[:, None], 0.0, source)
                mass = jnp.sum(rest, axis=-1, keepdims=True)
                rest = jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1.0), rest)
                source = jnp.where(failed[:, None], rest, source)
            return jnp.where(passed, child, node), target, source, open_ & ~passed

        node, target, _, _ = jax.lax.fori_loop(0, tree.width, sibling, (node, target, _at(q, node), alive))
        descended = node != start
        target = jnp.where(descended[:, None], _at(p, node), target)
        return node, target, alive & descended

    root = jnp.zeros((batch,), jnp.int32)
    carry = (root, p[:, 0], jnp.ones((batch,), bool))
    last, target, _ = jax.lax.fori_loop(0, tree.levels - 1, level, carry)
    accepted = _accept(last, root, tree)
    drawn = argmax(jnp.log(target) + _at(noise, accepted.count - 1))
    return accepted.replace(token=drawn)
