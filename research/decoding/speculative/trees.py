"""Static trees of ranks: which of the best guesses of each head are drafted, and how to find such a tree.

A node is the tuple of ranks on its path: (0, 2) is the third best token of head 2 below the best token of
head 1, where head k guesses the token at depth k. Which nodes are worth their place is measured: how often
the guess of rank r of head k is right (Medusa, arXiv 2401.10774, section 2.3.3).
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.proposers import Target
from research.decoding.speculative.training import Teacher
from research.decoding.tree import Tree, static_tree
from research.decoding.verify import Draft
from research.errors import UserError
from research.training.task import Batch, PyTree

Path = tuple[int, ...]
Guess = tuple[jax.Array, jax.Array, jax.Array]
"""What a head says at every place of a batch: logits float32[B, T, V], labels int32[B, T], weights f32[B, T]."""


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How the nodes of one depth follow from those above.

    nodes: the nodes that have children there, E of them, in order; width: the most children of any. Child c
    of the level, in order, is the guess of rank `rank[c]` at `nodes[parent[c]]`.
    """

    nodes: tuple[int, ...]
    width: int
    parent: tuple[int, ...]
    rank: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RankTree:
    """A tree of ranks, kept in order of depth, then of ranks; the root is not listed.

    Raises:
        UserError: no path, one twice, or a path without its parent or without the sibling of the rank before.
    """

    paths: tuple[Path, ...]

    def __post_init__(self):
        paths = tuple(sorted((tuple(path) for path in self.paths), key=_order))
        present = set(paths)
        if not paths or () in present:
            raise UserError("a tree lists at least one path, and every path at least one rank, such as (0,)")
        if len(present) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise UserError(f"a tree lists the path {twice} twice")
        for path in paths:
            before = (*path[:-1], path[-1] - 1)
            if min(path) < 0:
                raise UserError(f"a tree has the path {path}: ranks begin at 0")
            if path[:-1] and path[:-1] not in present:
                raise UserError(f"a tree has the path {path} and not its parent {path[:-1]}")
            if path[-1] and before not in present:
                raise UserError(f"a tree has the path {path} and not {before}, the better guess beside it")
        object.__setattr__(self, "paths", paths)

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return len(self.paths) + 1

    @property
    def levels(self) -> int:
        """One more than the greatest depth, which is the number of heads that the tree reads."""
        return len(self.paths[-1]) + 1

    @property
    def top(self) -> int:
        """How many guesses of a head the tree reads at most."""
        return 1 + max(max(path) for path in self.paths)

    @functools.cached_property
    def tree(self) -> Tree:
        """Node i + 1 is paths[i]."""
        number = {(): 0} | {path: node for node, path in enumerate(self.paths, 1)}
        return static_tree([-1, *(number[path[:-1]] for path in self.paths)])

    @functools.cached_property
    def index(self) -> np.ndarray:
        """int32[N - 1]: where in [heads, top], flattened, the token of each node but the root is."""
        return np.asarray([self.top * (len(path) - 1) + path[-1] for path in self.paths], np.int32)

    @functools.cached_property
    def expansions(self) -> tuple[Expansion, ...]:
        """One for every depth from 1 on, for drafts made level by level."""
        tree, result = self.tree, []
        for depth in range(1, self.levels):
            children = np.flatnonzero(tree.depth == depth)
            nodes = sorted({int(tree.parent[child]) for child in children})
            rank = tuple(int(tree.rank[child]) for child in children)
            parent = tuple(nodes.index(int(tree.parent[child])) for child in children)
            result.append(Expansion(tuple(nodes), max(rank) + 1, parent, rank))
        return tuple(result)

    def draft(self, root: jax.Array, guesses: jax.Array) -> Draft:
        """The tree filled with tokens: root int32[B], guesses int32[B, heads, top], best first."""
        flat = guesses[:, : self.levels - 1, : self.top].reshape(len(root), -1)
        return Draft(jnp.concatenate([root[:, None], flat[:, self.index]], axis=1), self.tree)


def chain_paths(length: int) -> tuple[Path, ...]:
    """The best guess of each of `length` heads, one after the other."""
    return tuple((0,) * depth for depth in range(1, length + 1))


def build_static_tree(accuracy: Any, budget: int) -> tuple[Path, ...]:
    """The `budget` paths with the greatest expected number of accepted tokens.

    accuracy f32[K, R]: how often the guess of rank r of head k + 1 is right. The value of a path is the product
    of the accuracies along it, as if heads erred independently. It never grows along a path nor with the rank,
    so taking the best child or next sibling of what is there, again and again, gives the best tree. A rank
    measured better than the one before it counts as that one: the order is the heads', the difference noise.

    Raises:
        UserError: an accuracy outside [0, 1], or a budget that is no number of paths in the table.
    """
    accuracy = _checked(accuracy)
    heads, ranks = accuracy.shape
    room = sum(ranks**depth for depth in range(1, heads + 1))
    if not 1 <= budget <= room:
        raise UserError(f"a tree of {heads} heads and {ranks} ranks has 1 to {room} paths, not {budget}")
    accuracy = np.minimum.accumulate(accuracy, axis=1)

    def entry(path: Path) -> tuple[float, tuple[int, Path]]:
        return -_value(accuracy, path), _order(path)  # of equal values the shallowest, then the better ranks

    chosen: list[Path] = []
    waiting = [entry((0,))]
    while len(chosen) < budget:
        path = heapq.heappop(waiting)[1][1]
        chosen.append(path)
        if path[-1] + 1 < ranks:
            heapq.heappush(waiting, entry((*path[:-1], path[-1] + 1)))
        if len(path) < heads:
            heapq.heappush(waiting, entry((*path, 0)))
    return tuple(sorted(chosen, key=_order))


def expected_tokens(accuracy: Any, paths: Iterable[Path]) -> float:
    """Tokens gained in a call, the target's own included: 1 + the sum of the paths' values."""
    accuracy = _checked(accuracy)
    return 1.0 + sum(_value(accuracy, path) for path in paths)


class Forced(Protocol):
    """A drafter that tells what its heads say along a given text."""

    def forced(self, params: PyTree, teacher: Teacher, batch: Batch) -> Sequence[Guess]:
        """One guess for every head: at place t, head k (from 1 on) speaks of token t + 1 + k."""


def rank_hits(guess: Guess, top: int) -> tuple[jax.Array, jax.Array]:
    """(hits f32[top], weight f32[]): the weight of the places where the guess of each rank is right."""
    logits, labels, weights = guess
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    # Of equal logits the first comes first, as in `top_k`.
    earlier = (logits == chosen) & (jnp.arange(logits.shape[-1]) < labels[..., None])
    rank = jnp.sum((logits > chosen) | earlier, axis=-1)
    hits = (rank[..., None] == jnp.arange(top)) * weights[..., None]
    return jnp.sum(hits, axis=(0, 1)), jnp.sum(weights)


def calibrate(
    drafter: Forced, params: PyTree, target: Target, batches: Iterable[Batch], top: int = 10
) -> np.ndarray:
    """accuracy f32[K, top] over language batches: the text should be what the target itself would write.

    Raises:
        UserError: the batches hold no place to measure at.
    """

    @jax.jit
    def measure(params: PyTree, target: Target, batch: Batch) -> tuple[jax.Array, jax.Array]:
        found = [rank_hits(guess, top) for guess in drafter.forced(params, Teacher(target, batch), batch)]
        return jnp.stack([hits for hits, _ in found]), jnp.stack([weight for _, weight in found])

    hits, weight = 0.0, 0.0
    for batch in batches:
        more = measure(params, target, batch)
        hits, weight = hits + np.asarray(more[0], np.float64), weight + np.asarray(more[1], np.float64)
    if not np.all(weight):
        raise UserError("calibration: the batches hold no place that every head can be measured at")
    return (hits / weight[:, None]).astype(np.float32)


def _order(path: Path) -> tuple[int, Path]:
    return len(path), path


def _value(accuracy: np.ndarray, path: Path) -> float:
    return math.prod(float(accuracy[head, rank]) for head, rank in enumerate(path))


def _checked(accuracy: Any) -> np.ndarray:
    accuracy = np.asarray(accuracy, np.float64)
    if accuracy.ndim != 2 or not accuracy.size or not np.all((accuracy >= 0) & (accuracy <= 1)):
        raise UserError(f"accuracy is a table [heads, ranks] of shares from 0 to 1, not {accuracy.tolist()}")
    return accuracy
