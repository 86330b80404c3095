"""Parallel prompt decoding: a few trained embeddings behind the text guess the tokens after the next.

Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference",
arXiv 2405.18628. m prompt embeddings stand where the next tokens will stand; the frozen model's output at
prompt j is a guess of the token one further on. Nothing else is trained: m n_e D numbers. While the candidates
of one call are verified, prompts under each of them make the guesses of the next.

How deep the next draft can be is the number of prompts that hung under the last accepted node, the state. A
tree is precomputed for every state (`search_trees`), and its size for the machine (`choose_size`).

Differences from the paper: "nothing accepted" moves to state m at once, because the root has m prompts,
instead of being a state that earns nothing; prompts start as embeddings of tokens drawn at random, not of
the words "Next 2 word".
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative import losses
from research.decoding.speculative.training import Teacher, ahead, shifted
from research.decoding.speculative.trees import Guess, Path, build_static_tree, chain_paths
from research.decoding.speculative.virtual import (
    Chains,
    Inserted,
    Layout,
    at_anchors,
    draw_anchors,
    lay_out,
    run_anchored,
)
from research.decoding.verify import Draft
from research.errors import UserError
from research.training.task import Batch, Metrics, PyTree


class PPDState(struct.PyTreeNode):
    """depth int32[B]: prompts that hung under the last accepted node; guesses int32[B, m, top]: what they
    said, of use down to that depth."""

    depth: jax.Array
    guesses: jax.Array


@dataclasses.dataclass(frozen=True)
class PPD:
    """The drafter. Its parameters are {"prompts": f32[m, n_e, D]}.

    Args:
        prompts: m, how many tokens beyond the next one are guessed.
        ensemble: n_e embeddings for each prompt, whose logits are averaged. Embedding e of a prompt sees
            embedding e of the prompts before.
        top: guesses kept of each prompt.
        decay: weight of prompt j + 1 in the loss relative to prompt j.
        anchors: at how many places of a row, drawn anew in every step, the text is cut off and the prompts
            put; the paper's random truncation is 1, and None is every place at once.
        trees: for each state 0 .. m the candidates, no deeper than the state, and 1 to m prompts under each
            of them. State 0 is the first call, where there are no guesses yet. By default chains of the best
            guesses with m prompts everywhere; see `search_trees`.

    Raises:
        UserError: trees that do not fit these rules.
    """

    prompts: int = 3
    ensemble: int = 1
    top: int = 10
    decay: float = 0.8
    anchors: int | None = None
    trees: tuple[Chains, ...] | None = None

    def __post_init__(self):
        if self.trees is None:
            chains = (chain_paths(depth) for depth in range(self.prompts + 1))
            trees = tuple(Chains(paths, (self.prompts,) * (len(paths) + 1)) for paths in chains)
        else:
            trees = tuple(self.trees)
        object.__setattr__(self, "trees", trees)
        if len(trees) != self.prompts + 1:
            raise UserError(
                f"PPD with {self.prompts} prompts has {self.prompts + 1} trees, from state 0 on, "
                f"not {len(trees)}"
            )
        for state, tree in enumerate(trees):
            if tree.levels > state + 1:
                raise UserError(f"PPD: the tree of state {state} is {tree.levels - 1} deep")
            if not all(1 <= count <= self.prompts for count in tree.counts):
                raise UserError(
                    f"PPD: the tree of state {state} has {tree.counts} prompts under its nodes; 1 to "
                    f"{self.prompts} are possible"
                )
            if any(rank >= self.top for path in tree.paths for rank in path):
                raise UserError(f"PPD: the tree of state {state} uses more than the {self.top} top guesses")

    @functools.cached_property
    def _layout(self) -> Layout:
        return lay_out(self.trees, self.top, self.ensemble)

    @property
    def size(self) -> int:
        return self._layout.tree.size

    @property
    def levels(self) -> int:
        return self._layout.tree.levels

    def create(self, key: jax.Array, target: Target) -> PyTree:
        tokens = jax.random.randint(key, (self.prompts, self.ensemble), 0, target.model.vocab_size)
        return {"prompts": target.embed(tokens).astype(jnp.float32)}

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> PPDState:
        rows = len(prompt.root)
        return PPDState(jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, self.prompts, self.top), jnp.int32))

    def propose(
        self, params: PyTree, target: Target, state: PPDState, round: Round
    ) -> tuple[Draft, PPDState]:
        layout = self._layout.at(state.depth)
        rows = Inserted(params["prompts"][layout.step, layout.copy])
        return Draft(layout.tokens(round.root, state.guesses), layout.tree, virtual=rows), state

    def observe(self, params: PyTree, target: Target, state: PPDState, outcome: Outcome) -> PPDState:
        logits, depth = self._layout.at(state.depth).under_last(outcome)
        logits = jnp.mean(logits, axis=2)
        logits = jnp.pad(logits, ((0, 0), (0, self.prompts - logits.shape[1]), (0, 0)))
        return PPDState(depth, jax.lax.top_k(logits, self.top)[1])

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """(1/m) sum over j of decay^(j-1) KL(p(. | x_<=n+j) || prompt j at anchor n); the teacher is the model
        at the true place."""
        eligible = ahead(batch, self.prompts)[1] > 0
        anchors, drawn = draw_anchors(eligible, self.anchors, key)
        truth, guesses = self._run(params, teacher.target, batch, anchors)
        terms, metrics = [], {}
        for j in range(1, self.prompts + 1):
            logits = guesses[:, j - 1]
            labels, weights = (at_anchors(x, anchors) for x in ahead(batch, j))
            weights = weights * drawn
            there = at_anchors(shifted(truth, j), anchors)
            terms.append((self.decay ** (j - 1) / self.prompts, losses.kl(logits, there, weights)))
            metrics[f"agreement_{j}"] = losses.agreement(logits, jnp.argmax(there, axis=-1), weights)
        return {"loss": losses.add(*terms), **metrics}

    def forced(self, params: PyTree, teacher: Teacher, batch: Batch) -> Sequence[Guess]:
        anchors, _ = draw_anchors(batch["segments"] > 0, None, None)
        _, guesses = self._run(params, teacher.target, batch, anchors)
        return [(guesses[:, j - 1], *ahead(batch, j)) for j in range(1, self.prompts + 1)]

    def _run(
        self, params: PyTree, target: Target, batch: Batch, anchors: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """-> the frozen model's logits [B, T, V], and those of the prompts [B, m, A, V]."""
        count = anchors.shape[1]
        prompts = params["prompts"].reshape(self.prompts * self.ensemble, -1)
        rows = Inserted(jnp.repeat(prompts, count, axis=0)[None])
        within = np.kron(np.tri(self.prompts, dtype=bool), np.eye(self.ensemble, dtype=bool))
        offsets = np.repeat(np.arange(1, self.prompts + 1), self.ensemble)
        target = target.replace(params=jax.lax.stop_gradient(target.params))
        truth, logits = run_anchored(target, batch, anchors, rows, within, offsets)
        logits = logits.reshape(len(logits), self.prompts, self.ensemble, count, -1)
        return jax.lax.stop_gradient(truth), jnp.mean(logits, axis=2)


# The dynamic sparse tree (section 4 of the paper).


@dataclasses.dataclass(frozen=True)
class Choice:
    """Trees for a call of `size` rows, the expected tokens of a call and, where step times were given, the
    expected speed relative to plain decoding. Size 1, without trees, is plain decoding."""

    size: int
    trees: tuple[Chains, ...]
    tokens: float
    speed: float | None = None


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """The best candidates of a state: their paths, f (the sum of their values) and, for the root and each
    path, the probability that it is the last one accepted."""

    paths: tuple[Path, ...]
    value: float
    last: np.ndarray


def search_trees(accuracy: Any, size: int, ensemble: int = 1) -> Choice:
    """The trees of at most `size` rows a call, root and prompts included, with the greatest R(N).

    accuracy f32[m, top]: how often the guess of rank r of prompt j is right, see `calibrate`. For every number
    of candidates n(2) .. n(m) from N / (m + 1) to N / 2 (state 1 takes the `top` it has, or all that fit): the
    candidates of a state are the most valuable; the prompts start as m under each and are taken away where
    that loses least; states then form a Markov chain, and R is the mean of their values under its stationary
    law. Candidates and prompts each have the same room in all states, since all run as one program.

    Raises:
        UserError: a size in which one candidate and its prompts have no room.
    """
    table = np.minimum.accumulate(np.asarray(accuracy, np.float64), axis=1)
    prompts, top = table.shape
    smallest = smallest_size(prompts, ensemble)
    if size < smallest:
        raise UserError(
            f"size {size}: the root with {prompts} prompts and a candidate with one are {smallest} rows"
        )
    room = [sum(top**depth for depth in range(1, state + 1)) for state in range(1, prompts + 1)]

    @functools.cache
    def best(state: int, count: int) -> _Candidates:
        return _candidates(table[:state], count)

    most = (size - 1 - ensemble * prompts) // (1 + ensemble)  # candidates, with a prompt each
    most = min(most, max(1, size // 2))
    fewest = min(most, max(1, size // (prompts + 1)))
    found: tuple[float, tuple[Chains, ...]] | None = None
    for limit in range(fewest, most + 1):
        budget = (size - 1 - limit) // ensemble
        choices = [sorted({min(n, room[s]) for n in range(fewest, limit + 1)}) for s in range(1, prompts)]
        for counts in itertools.product([min(top, limit)], *choices):
            states = [best(state, count) for state, count in enumerate(counts, 1)]
            trees = _hang_prompts(states, budget)
            score = float(stationary(transitions(states, trees)) @ [state.value for state in states])
            if found is None or score > found[0] + 1e-12:
                found = score, trees
    assert found is not None  # fewest <= most, and every state has a choice
    return Choice(size, (Chains((), (prompts,)), *found[1]), 1.0 + found[0])


def choose_size(accuracy: Any, latency: Mapping[int, float], ensemble: int = 1) -> Choice:
    """The measured size N with the greatest (1 + R(N)) L(1) / L(N): the size for this machine.

    latency: N -> seconds of a call with N rows, measured; sizes too small for a tree are left out.

    Raises:
        UserError: no time for one row, or one that is not positive.
    """
    if 1 not in latency:
        raise UserError(f"step times lack that of 1 row, plain decoding; there are {sorted(latency)}")
    if wrong := [size for size, seconds in latency.items() if not seconds > 0]:
        raise UserError(f"the step time of {wrong[0]} rows is {latency[wrong[0]]} seconds")
    smallest = smallest_size(len(np.asarray(accuracy)), ensemble)
    choices = [Choice(1, (), 1.0)]
    choices += [search_trees(accuracy, size, ensemble) for size in sorted(latency) if size >= smallest]
    rated = [
        dataclasses.replace(choice, speed=choice.tokens * latency[1] / latency[choice.size])
        for choice in choices
    ]
    return max(rated, key=lambda choice: choice.speed)


def smallest_size(prompts: int, ensemble: int = 1) -> int:
    """Rows of the root with its prompts and one candidate with one prompt."""
    return 2 + ensemble * (prompts + 1)


def transitions(states: Sequence[_Candidates], trees: Sequence[Chains]) -> np.ndarray:
    """f64[m, m]: from state s (row s - 1) to s', the probability that the last accepted node has s' prompts."""
    matrix = np.zeros((len(states), len(states)))
    for row, (state, tree) in enumerate(zip(states, trees, strict=True)):
        np.add.at(matrix[row], np.asarray(tree.counts) - 1, state.last)
    return matrix


def stationary(matrix: np.ndarray) -> np.ndarray:
    """f64[m]: the law of the states in the long run, from state m on, where decoding begins."""
    # The lazy chain has the same law and no period.
    law = np.linalg.matrix_power((matrix + np.eye(len(matrix))) / 2, 2**16)[-1]
    return law / law.sum()


def _candidates(accuracy: np.ndarray, count: int) -> _Candidates:
    paths = build_static_tree(accuracy, count)
    value = {(): 1.0}
    last = dict(value)
    for path in paths:  # parents come first
        value[path] = value[path[:-1]] * accuracy[len(path) - 1, path[-1]]
        last[path] = value[path]
        last[path[:-1]] -= value[path]
    return _Candidates(paths, sum(value.values()) - 1.0, np.asarray([last[path] for path in ((), *paths)]))


def _hang_prompts(states: Sequence[_Candidates], budget: int) -> tuple[Chains, ...]:
    """Trees for states 1 .. m with at most `budget` prompts each."""
    most = len(states)
    value = np.asarray([0.0, *(state.value for state in states)])
    trees = []
    for state in states:
        counts = np.full(len(state.last), most)
        for _ in range(max(0, counts.sum() - budget)):
            loss = state.last * (value[counts] - value[counts - 1])
            loss[0], loss[counts == 1] = np.inf, np.inf  # the root keeps all, a candidate one
            counts[np.argmin(loss)] -= 1
        trees.append(Chains(state.paths, tuple(counts.tolist())))
    return tuple(trees)
