"""Virtual rows: prompt tokens, placeholders and transferred states that ride behind the real tokens of a call.

Shared by PPD, Hidden Transfer and LUD. A virtual row stands j tokens beyond a real one, its anchor. It sees
what the anchor sees and the virtual rows before it in its own chain, no real row ever sees it, and its output
is a guess of the token j + 1 places beyond the anchor. In decoding, chains hang under the nodes of a draft
(`Chains`, `lay_out`); in training, every row of text carries chains under many anchors at once
(`multi_anchor_mask`, `run_anchored`).

Letters: B rows, T tokens of text, A anchors a row, M virtual rows of an anchor, C real nodes of a draft,
V virtual nodes of it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.decoding.proposers import Outcome, Target
from research.decoding.speculative.trees import Path, RankTree
from research.decoding.tree import Tree, static_tree
from research.errors import UserError
from research.nn.transformer import VirtualRows, unscan_layers
from research.training.task import Batch


class Inserted(struct.PyTreeNode):
    """`VirtualRows` that join beside the embedded tokens: states [B or 1, V, D]."""

    states: jax.Array

    @property
    def layers(self) -> tuple[int, ...]:
        return (0,)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def size(self) -> int:
        return self.states.shape[1]

    def rows(self, group: int, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.states, (x.shape[0], *self.states.shape[1:]))


# Decoding: chains of virtual nodes under the nodes of a draft.


@dataclasses.dataclass(frozen=True)
class Chains:
    """A tree of ranks and how many virtual nodes hang, one after the other, under each of its nodes.

    paths: as in `RankTree`, in its order; none for the root alone. counts: for the root, then for every path.

    Raises:
        UserError: paths that are no tree or not in order, or not one count for each node.
    """

    paths: tuple[Path, ...]
    counts: tuple[int, ...]

    def __post_init__(self):
        paths = tuple(tuple(path) for path in self.paths)
        if paths and RankTree(paths).paths != paths:
            raise UserError(f"paths go by depth, then by rank: {RankTree(paths).paths}, not {paths}")
        if len(self.counts) != 1 + len(paths) or min(self.counts) < 0:
            raise UserError(
                f"a tree of {1 + len(paths)} nodes, the root included, has as many counts of virtual nodes, "
                f"none negative, not {tuple(self.counts)}"
            )
        object.__setattr__(self, "paths", paths)
        object.__setattr__(self, "counts", tuple(self.counts))

    @property
    def levels(self) -> int:
        """One more than the depth of the deepest candidate."""
        return 1 + max(map(len, self.paths), default=0)


class Layout(struct.PyTreeNode):
    """Where everything of several trees with chains is, all padded to C real and then V virtual nodes.

    The leading axis S, of the trees, becomes the batch after `at`.

    tree: the nodes; its levels and depths count virtual nodes too, `levels` only the real ones.
    index int32[S, C - 1]: where in [heads, top], flattened, the token of a candidate is.
    step, copy int32[S, V]: the place in its chain, from 0, and the chain that a virtual node belongs to.
    row int32[S, C, steps, copies]: the node of every virtual row under a real node, 0 where there is none.
    count int32[S, C]: steps under each real node.
    """

    tree: Tree
    index: jax.Array
    step: jax.Array
    copy: jax.Array
    row: jax.Array
    count: jax.Array

    @property
    def virtual(self) -> int:
        """V."""
        return self.step.shape[-1]

    def at(self, state: jax.Array) -> "Layout":
        """The trees int32[B] of a batch."""
        return jax.tree.map(lambda x: jnp.asarray(x)[state], self)

    def tokens(self, root: jax.Array, guesses: jax.Array) -> jax.Array:
        """After `at`: root int32[B] and guesses int32[B, heads, top], best first -> int32[B, C + V]."""
        candidates = jnp.take_along_axis(guesses.reshape(len(root), -1), self.index, axis=1)
        return jnp.concatenate([root[:, None], candidates, jnp.zeros_like(self.step)], axis=1)

    def under_last(self, outcome: Outcome) -> tuple[jax.Array, jax.Array]:
        """After `at`: the logits float32[B, steps, copies, vocabulary] of the virtual rows under the last
        accepted node, and int32[B], how many of the steps there are; the rest is meaningless."""
        rows = jnp.arange(len(outcome.accept.count))
        last = outcome.accept.last
        return outcome.logits[rows[:, None, None], self.row[rows, last]], self.count[rows, last]


def lay_out(trees: Sequence[Chains], top: int, copies: int = 1) -> Layout:
    """Numpy tables for `trees`; top: guesses of each head; copies: parallel chains under every node.

    Virtual nodes are in order of step, then of copy, then of the node they hang under.
    """
    nodes = max(len(tree.counts) for tree in trees)
    virtual = max(sum(tree.counts) for tree in trees) * copies
    steps = max(max(tree.counts) for tree in trees)
    laid = [_lay_out(tree, top, copies, nodes, virtual, steps) for tree in trees]
    levels = max(tree.levels for tree in trees)
    width = max(layout.tree.width for layout in laid)
    # A path holds real nodes only, so that is how deep drafts are to the verifier and the cache.
    laid = [layout.replace(tree=layout.tree.replace(levels=levels, width=width)) for layout in laid]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *laid)


def _lay_out(chains: Chains, top: int, copies: int, nodes: int, virtual: int, steps: int) -> Layout:
    number = {(): 0} | {path: node for node, path in enumerate(chains.paths, 1)}
    parents = [-1, *(number[path[:-1]] for path in chains.paths)]
    index = [top * (len(path) - 1) + path[-1] for path in chains.paths]
    spare = nodes - len(parents)
    real = [True] * len(parents) + [False] * (spare + virtual)
    parents, index = parents + [0] * spare, index + [0] * spare
    row = np.zeros((nodes, steps, copies), np.int32)
    place = []
    for step in range(steps):
        for copy in range(copies):
            for node, count in enumerate(chains.counts):
                if step < count:
                    row[node, step, copy] = len(parents)
                    parents.append(int(row[node, step - 1, copy]) if step else node)
                    place.append((step, copy))
    place += [(0, 0)] * (virtual - len(place))
    parents += [0] * (nodes + virtual - len(parents))
    step, copy = np.asarray(place, np.int32).reshape(virtual, 2).T
    count = np.asarray([*chains.counts, *[0] * spare], np.int32)
    tree = static_tree(parents, real)
    return Layout(tree, np.asarray(index, np.int32), step, copy, row, count)


# Training: chains under many anchors of a text at once.


def multi_anchor_mask(segments: jax.Array, anchors: jax.Array, within: np.ndarray) -> jax.Array:
    """What T tokens and M virtual rows for each of A anchors see: bool[B, T + M A, T + M A].

    segments int32[B, T]: the documents of a packed row. anchors int32[B, A]: places in it. within bool[M, M]:
    which virtual rows of an anchor each sees. Virtual row m of anchor a is row T + m A + a. Tokens see tokens,
    causally and within their document; a virtual row sees the tokens of its document up to its anchor, and
    virtual rows of its own anchor.
    """
    count, kinds = anchors.shape[1], len(within)
    place = jnp.arange(segments.shape[1])
    causal = (place[:, None] >= place) & (segments[:, :, None] == segments[:, None, :])
    own = jnp.take_along_axis(segments, anchors, axis=1)
    before = (place <= anchors[..., None]) & (own[..., None] == segments[:, None, :])  # [B, A, T]
    same = np.kron(np.asarray(within, bool), np.eye(count, dtype=bool))  # [M A, M A]
    batch = len(segments)
    nothing = jnp.zeros((batch, segments.shape[1], kinds * count), bool)
    below = [jnp.tile(before, (1, kinds, 1)), jnp.broadcast_to(same, (batch, *same.shape))]
    return jnp.concatenate(
        [jnp.concatenate([causal, nothing], axis=2), jnp.concatenate(below, axis=2)], axis=1
    )


def draw_anchors(
    eligible: jax.Array, count: int | None, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`count` different places of each row, eligible ones first, in order -> int32[B, A], bool[B, A].

    eligible bool[B, T]; the second result says which of the drawn are. All T places if count is None. Without a
    key (in evaluation) the draw is always the same.
    """
    batch, length = eligible.shape
    if count is None or count >= length:
        return jnp.broadcast_to(jnp.arange(length), (batch, length)), eligible
    draw = jax.random.uniform(jax.random.key(0) if key is None else key, (batch, length))
    anchors = jnp.sort(jax.lax.top_k(eligible + draw, count)[1], axis=1)
    return anchors, at_anchors(eligible, anchors)


def at_anchors(x: jax.Array, anchors: jax.Array) -> jax.Array:
    """x [B, T, ...], anchors int32[B, A] -> [B, A, ...]."""
    return x[jnp.arange(len(x))[:, None], anchors]


def run_anchored(
    target: Target,
    batch: Batch,
    anchors: jax.Array,
    virtual: VirtualRows,
    within: np.ndarray,
    offsets: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """One pass over a language batch with virtual rows under anchors int32[B, A].

    virtual: M A rows, in the order of `multi_anchor_mask`; within bool[M, M]; offsets[m]: how many tokens
    beyond its anchor row m stands. -> logits float32[B, T, vocabulary] of the tokens, [B, M, A, vocabulary] of
    the virtual rows. Costs T + M A rows, and attention the square of that.
    """
    model, params = unscan_layers(target.model, target.params)
    rows, length = batch["tokens"].shape
    places = at_anchors(batch["positions"], anchors)
    beyond = places[:, None] + jnp.asarray(offsets)[:, None]  # [B, M, A]
    depth = jnp.concatenate([batch["positions"], beyond.reshape(rows, -1)], axis=1)
    logits, _, _ = model.apply(
        {"params": params},
        batch["tokens"],
        model.init_cache(rows, 1),  # nothing is in it
        multi_anchor_mask(batch["segments"], anchors, within),
        depth,
        virtual,
        method="extend",
    )
    return logits[:, :length], logits[:, length:].reshape(rows, len(within), anchors.shape[1], -1)
