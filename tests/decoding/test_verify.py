"""Acceptance rules: paths by hand, then the law of whole outputs against enumeration, with broken rules
beside."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding import engine as engines
from research.decoding.proposers import Plain
from research.decoding.sampling import argmax, gumbel
from research.decoding.tree import dynamic_tree, static_tree
from research.decoding.verify import Accept, Draft, Greedy, Sampled, Typical, follow
from research.errors import UserError
from research.nn.cache import Cache

TREE = static_tree([-1, 0, 0, 1, 1, 3])  # see test_tree.py


@functools.partial(jax.jit, static_argnums=0)
def accepted(verifier, *args) -> Accept:
    """What a verifier keeps: one program instead of one an operation."""
    return verifier(*args)


def one_hot_logits(choices: list[int], vocab_size: int = 10) -> np.ndarray:
    return np.eye(vocab_size, dtype=np.float32)[np.asarray([choices])] * 5.0


# The model chooses, at nodes 0..5:      2  7  5  6  0  8; the draft has tokens 1 | 2 3 | 7 4 | 6 below the
# root.
@pytest.mark.parametrize(
    "tokens, path, count, token",
    [
        ([1, 2, 3, 7, 4, 6], [0, 1, 3, 5], 4, 8),  # 0 -> 2 = node 1 -> 7 = node 3 -> 6 = node 5 -> then 8
        ([1, 2, 3, 4, 7, 6], [0, 1, 4], 3, 0),  # ... node 1 -> 7 = node 4, a leaf, -> then 0
        ([1, 3, 2, 7, 4, 6], [0, 2], 2, 5),  # 0 -> 2 = node 2, a leaf
        ([1, 3, 4, 7, 4, 6], [0], 1, 2),  # no child is 2
    ],
)
def test_greedy_path_by_hand(tokens, path, count, token):
    accept = accepted(Greedy(), one_hot_logits([2, 7, 5, 6, 0, 8]), Draft(np.asarray([tokens]), TREE))
    assert accept.path.tolist()[0][:count] == path
    assert (accept.count.tolist(), accept.token.tolist()) == ([count], [token])


def test_unreal_nodes_are_never_kept():
    tree = static_tree([-1, 0, 1, 2], real=[True, True, False, True])
    accept = accepted(Greedy(), one_hot_logits([2, 7, 5, 6]), Draft(np.asarray([[1, 2, 7, 5]]), tree))
    assert (accept.count.tolist(), accept.token.tolist()) == ([2], [7])


def test_rows_have_their_own_dynamic_tree():
    parents = np.asarray([[-1, 0, 1], [-1, 0, 0]])  # a chain, and two siblings
    tree = jax.jit(functools.partial(dynamic_tree, levels=3, width=2))(parents, np.ones((2, 3), bool))
    tokens = np.asarray([[1, 2, 7], [1, 9, 2]])
    logits = np.concatenate([one_hot_logits([2, 7, 5])] * 2)
    accept = accepted(Greedy(), logits, Draft(tokens, tree))
    assert accept.count.tolist() == [3, 2]
    path = accept.path.tolist()
    assert path[0] == [0, 1, 2] and path[1][:2] == [0, 2]
    assert accept.token.tolist() == [5, 5]


@pytest.mark.parametrize("replacement", [True, False])
def test_ratio_rule_by_hand(replacement):
    """p = (.5, .5, 0, 0), q = (0, .5, .5, 0): token 2 is refused always; then p - q = (.5, 0, ...) leaves
    token 0."""
    tree = static_tree([-1, 0, 0])
    none = -np.inf
    p = np.log(0.5) + np.float32([0, 0, none, none])
    q = np.log(0.5) + np.float32([none, 0, 0, none])
    keys = jax.random.split(jax.random.key(0), (500, 2))
    logits, source = (np.broadcast_to(row, (500, 3, 4)).astype(np.float32) for row in (p, q))
    tokens = np.broadcast_to(np.asarray([3, 2, 1]), (500, 3))
    accept = accepted(Sampled(), logits, Draft(tokens, tree, source, replacement), keys)
    # After the refusal p is (1, 0, 0, 0): the second child, token 1, is refused too, and 0 is emitted.
    assert set(accept.count.tolist()) == {1} and set(accept.token.tolist()) == {0}


# Typical acceptance. Three tokens; the model is sure after the root (p = .9, .05, .05; H = .9 ln(1/.9) + .1 ln 20 =
# .0948 + .2996 = .3944 nats, exp(-H) = .674) and unsure below (p = .4, .3, .3; exp(-H) = .337).
SURE, UNSURE = [0.9, 0.05, 0.05], [0.4, 0.3, 0.3]


def typical(rows, tokens, parents, epsilon=0.09, delta=0.3, real=None):
    draft = Draft(np.asarray([tokens]), static_tree(parents, real))
    accept = accepted(Typical(epsilon, delta), np.log(np.float32([rows])), draft)
    return accept.path.tolist()[0][: int(accept.count[0])], accept.token.tolist()


def test_typical_threshold_by_hand():
    rows = [SURE, UNSURE, UNSURE]
    # min(.09, .3 * .674 = .202) = .09: .05 is too little at the root. min(.09, .3 * .337 = .101) = .09 < .3 below.
    assert typical(rows, [0, 0, 2], [-1, 0, 1]) == ([0, 1, 2], [0])
    assert typical(rows, [0, 1, 2], [-1, 0, 1]) == ([0], [0])
    # With epsilon 1 the entropy decides: .202 < .9 at the root; .05 * .674 = .034 < .05 with delta .05.
    assert typical(rows, [0, 1, 2], [-1, 0, 1], epsilon=1, delta=0.05) == ([0, 1, 2], [0])
    # Below, 1 * .337 lies between .3 and .4.
    assert typical(rows, [0, 0, 2], [-1, 0, 1], epsilon=1, delta=1) == ([0, 1], [0])
    assert typical(rows, [0, 0, 0], [-1, 0, 1], epsilon=1, delta=1) == ([0, 1, 2], [0])


def test_typical_takes_the_more_probable_of_equally_long_paths():
    # Two children of the root, .3 first and .4 second, both kept: the second wins, though the first comes first.
    assert typical([UNSURE, SURE, [0.1, 0.1, 0.8]], [0, 1, 0], [-1, 0, 0]) == ([0, 2], [2])
    # A longer path wins over a more probable one: .3 * .9 against .4.
    assert typical([UNSURE, SURE, SURE, UNSURE], [0, 0, 1, 0], [-1, 0, 0, 2]) == ([0, 2, 3], [0])


def test_typical_never_keeps_padding():
    rows = [UNSURE, UNSURE, UNSURE]
    assert typical(rows, [0, 0, 0], [-1, 0, 1], real=[True, False, False]) == ([0], [0])
    assert typical(rows, [0, 1, 0], [-1, 0, 0], real=[True, True, False]) == ([0, 1], [0])


def test_typical_limits():
    tree = static_tree([-1, 0, 0, 1, 1, 3])
    rng = np.random.default_rng(0)
    logits = 3.0 * rng.standard_normal((64, 6, 10)).astype(np.float32)
    draft = Draft(rng.integers(0, 10, (64, 6), np.int32), tree)
    # No threshold: every path is kept, and the deepest is 0 1 3 5.
    assert accepted(Typical(0.0, 0.3), logits, draft).path.tolist() == [[0, 1, 3, 5]] * 64
    # Lower thresholds never shorten what is kept.
    values = (0.0, 0.01, 0.03, 0.09, 0.3, 1.0)

    @jax.jit
    def counts(logits, draft):
        by_epsilon = jnp.stack([Typical(value, 1.0)(logits, draft).count for value in values])
        return by_epsilon, jnp.stack([Typical(1.0, value)(logits, draft).count for value in values])

    for counted in map(np.asarray, counts(logits, draft)):
        assert all(np.all(a >= b) for a, b in itertools.pairwise(counted))
        assert counted[0].sum() > counted[3].sum() > counted[-1].sum()
    # Near temperature 0 the rule is greedy.
    greedy = accepted(Greedy(), logits, draft)
    cold = accepted(Typical(), logits / np.float32(1e-4), draft)
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(greedy), jax.tree.leaves(cold), strict=True)
    )
    assert set(greedy.count.tolist()) != {1}


@pytest.mark.parametrize("thresholds, name", [((-0.1, 0.3), "epsilon"), ((0.09, 3.0), "delta")])
def test_typical_thresholds_are_shares(thresholds, name):
    with pytest.raises(UserError, match=f"{name} must be from 0 to 1"):
        Typical(*thresholds)


# A target that is a Markov chain over four tokens, through the real engine, so that outputs can be
# enumerated.

VOCAB, LENGTH, ROWS, START = 4, 4, 40_000, 0


@jax.jit
def tables():
    normal = lambda seed: jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB))  # noqa: E731
    table, far = jax.nn.softmax(1.2 * normal(3)), jax.nn.softmax(2.0 * normal(4))
    return {"target": table, "far": far, "mixed": 0.5 * table + 0.5 * far}


TABLES = tables()
TABLE, FAR = TABLES["target"], TABLES["far"]


class MarkovModel:
    """The contract of a decoder: the logits after a token are a row of the table; there is nothing to
    cache."""

    def __init__(self, table: jax.Array):
        self.table = table

    def init_cache(self, batch, capacity, dtype, margin):
        return Cache((), jnp.zeros((batch,), jnp.int32))

    def apply(self, variables, tokens, *args, method):
        logits = jnp.log(self.table)[tokens]
        return (logits[:, 0] if method == "prefill" else logits), logits, ()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Draws `fan` children of the root from `table`, and under each a chain down to `levels`."""

    name: str
    fan: int
    levels: int
    replacement: bool = True

    @property
    def size(self) -> int:
        return 1 + self.fan * (self.levels - 1)

    @property
    def table(self) -> jax.Array:
        return TABLES[self.name]

    def init(self, params, target, prompt):
        return ()

    def propose(self, params, target, state, round):
        log_q = jnp.log(self.table)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (self.levels, self.fan, VOCAB)))(round.keys)
        scores = log_q[round.root][:, None] + noise[:, 0]
        # The highest scores under one noise vector are distinct: drawn without replacement.
        level = argmax(scores) if self.replacement else jax.lax.top_k(scores[:, 0], self.fan)[1]
        tokens, parents = [round.root[:, None], level], [-1] + [0] * self.fan
        for depth in range(1, self.levels - 1):
            level = argmax(log_q[level] + noise[:, depth])
            tokens.append(level)
            parents += range(len(parents) - self.fan, len(parents))
        tokens = jnp.concatenate(tokens, axis=1)
        return Draft(tokens, static_tree(parents), log_q[tokens], self.replacement), state

    def observe(self, params, target, state, outcome):
        return state


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Deterministic children: of the root tokens root + 1 and root + 2, below the first root + 3."""

    size: int = 4
    levels: int = 3

    def init(self, params, target, prompt):
        return ()

    def propose(self, params, target, state, round):
        tokens = (round.root[:, None] + jnp.arange(4)) % VOCAB
        return Draft(tokens, static_tree([-1, 0, 0, 1])), state

    def observe(self, params, target, state, outcome):
        return state


@dataclasses.dataclass(frozen=True)
class NoResidual:
    """Broken: after a refusal it draws from p instead of norm(max(p - q, 0))."""

    def __call__(self, logits, draft, keys):
        if draft.tree.size == 1:
            return Sampled()(logits, draft, keys)
        p, q = jax.nn.softmax(logits), jnp.exp(draft.q)
        child = draft.tokens[:, 1]
        ratio = jnp.take_along_axis(p[:, 0] / q[:, 0], child[:, None], axis=1)[:, 0]
        passed = jax.vmap(lambda key: jax.random.uniform(key))(keys[:, 0]) < ratio
        choice = argmax(logits[:, 0] + gumbel(keys[:, 1], VOCAB))
        after = argmax(logits[:, 1] + gumbel(keys[:, 1], VOCAB))
        path = jnp.broadcast_to(jnp.arange(2), (len(child), 2))
        return Accept(path, jnp.where(passed, 2, 1), jnp.where(passed, after, choice))


@dataclasses.dataclass(frozen=True)
class SiblingsAnew:
    """Broken: every sibling is tested with p(t) and a draw of its own, without removing those that were
    refused."""

    def __call__(self, logits, draft, keys):
        if draft.tree.size == 1:
            return Sampled()(logits, draft, keys)
        p = jax.nn.softmax(logits)
        parent = jnp.maximum(draft.tree.parent, 0)
        mass = jnp.take_along_axis(p[:, parent], draft.tokens[..., None], axis=2)[..., 0]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (draft.tree.size,)))(keys[:, 0])
        return follow(uniform < mass, argmax(logits + gumbel(keys[:, 1:2], VOCAB)), draft.tree)


def law(table: np.ndarray) -> np.ndarray:
    """Probabilities of all outputs of LENGTH tokens after START."""
    result = []
    for string in itertools.product(range(VOCAB), repeat=LENGTH):
        result.append(np.prod([table[a, b] for a, b in zip((START, *string[:-1]), string, strict=True)]))
    return np.asarray(result)


@functools.cache  # engines that two tests ask run once
def sampled(proposer, verifier) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [ROWS, LENGTH] and the histogram of tokens gained in a call."""
    engine = engines.Engine(MarkovModel(TABLE), proposer, verifier, capacity=LENGTH + 4)

    @jax.jit
    def run(seed, ones):
        weights, ends = engines.Weights((), (), ()), jnp.zeros((0,), jnp.int32)
        keys = engines.row_keys(seed, jnp.arange(ROWS), 1)
        state = engine.prefill(weights, jnp.full((ROWS, 1), START), ones, LENGTH * ones, keys, ends)
        return engine.decode(weights, state, jnp.zeros((ROWS,), bool), jnp.int32(100), ends)

    state = run(0, np.ones((ROWS,), np.int32))
    assert np.all(np.asarray(state.count) == LENGTH)
    return np.asarray(state.tokens)[:, :LENGTH], np.asarray(state.histogram)


def distance(tokens: np.ndarray) -> float:
    """Total variation between the outputs and the law of plain sampling."""
    numbers = tokens @ VOCAB ** np.arange(LENGTH - 1, -1, -1)
    frequencies = np.bincount(numbers, minlength=VOCAB**LENGTH) / ROWS
    return 0.5 * np.abs(frequencies - law(np.asarray(TABLE, np.float64))).sum()


@pytest.mark.parametrize(
    "proposer",
    [Plain(), Fixed(), Drawn("far", 1, 3), Drawn("mixed", 2, 3), Drawn("mixed", 2, 3, replacement=False)],
    ids=["plain", "fixed-tree", "chain", "tree", "tree-without-replacement"],
)
def test_sampling_keeps_the_law(proposer):
    # 256 outcomes and 40 000 draws: about 0.02 is what exact sampling gives.
    assert distance(sampled(proposer, Sampled())[0]) < 0.03


@pytest.mark.parametrize(
    "proposer, verifier",
    [(Drawn("far", 1, 2), NoResidual()), (Fixed(), SiblingsAnew()), (Fixed(), Typical())],
    ids=["no-residual", "siblings-anew", "typical"],  # the last changes the law by design
)
def test_changes_of_the_law_are_found(proposer, verifier):
    assert distance(sampled(proposer, verifier)[0]) > 0.08


def test_fixed_drafts_give_the_tokens_of_plain_sampling():
    assert np.array_equal(sampled(Fixed(), Sampled())[0], sampled(Plain(), Sampled())[0])


def test_perfect_drafts_are_always_kept():
    tokens, histogram = sampled(Drawn("target", 1, 3), Sampled())
    # Prefill gives 1 token, one call the other 3: root + two drafts kept + the bonus.
    assert histogram.tolist() == [[0, 0, 1]] * ROWS
    assert distance(tokens) < 0.03
