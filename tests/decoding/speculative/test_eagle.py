"""EAGLE: drafting is the training pass continued, and its trees are what their definitions say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.proposers import Prompt, Round, Target
from research.decoding.speculative.eagle import ConfidenceTree, Eagle
from research.decoding.speculative.training import Teacher
from research.decoding.speculative.trees import RankTree
from research.errors import UserError
from tests.programs import drawn_like

from .members import VOCAB, WIDTH, Walks, tiny_target

TEXT = [5, 9, 2, 30, 7, 11]  # and then the root
ROOT = 8
PATHS = ((0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0), (2, 0, 0), (2, 0, 1))


@pytest.fixture(autouse=True, scope="module")
def made():
    """The target is written to disk when it is first asked for, which must not be inside of tracing."""
    tiny_target()


def target() -> Target:
    return Target(tiny_target().params, tiny_target().model)


def random_params(drafter: Eagle):
    """Unlike those that `create` gives, with a projection that lets the drafter be sure of some guesses."""
    params = drawn_like(lambda: drafter.create(jax.random.key(0), target()))
    params["projection"]["kernel"] *= 3.0
    return params


def draft(drafter: Eagle, params):
    """What is drafted for one row after TEXT and the root, on compiled code."""

    @jax.jit
    def run(params, tokens, root):
        hidden, _ = target().model.apply({"params": target().params}, tokens, method="features")
        lengths = jnp.asarray([len(TEXT)])
        prompt = Prompt(tokens, lengths, hidden, root, capacity=32)
        state = drafter.init(params, target(), prompt)
        round_ = Round(root, lengths, jax.random.split(jax.random.key(0), 1), lambda logits, *_: logits)
        return drafter.propose(params, target(), state, round_)[0]

    return run(params, jnp.asarray([TEXT]), jnp.asarray([ROOT]))


class Continued:
    """log p(. | path) of the drafter, one path at a time, each in one pass over text, root and path: the
    features of the target where there are any, the drafter's own behind."""

    def __init__(self, drafter: Eagle, params):
        network, found, self._length = drafter.network(target()), target(), len(TEXT)
        self._states: dict[tuple[int, ...], np.ndarray] = {}

        @jax.jit
        def run(hidden, tokens):
            states, _ = network.apply({"params": params}, hidden, found.embed(tokens))
            return states[0], jax.nn.log_softmax(found.logits(states[0]))

        @jax.jit
        def features(tokens):
            return found.model.apply({"params": found.params}, tokens, method="features")[0][0]

        self._run, self._hidden = run, np.asarray(features(jnp.asarray([TEXT])))

    def __call__(self, path: tuple[int, ...]) -> np.ndarray:
        for known in range(len(path)):
            if path[:known] not in self._states:
                self(path[:known])
        # What is beyond the path is padding: no place sees what comes after it.
        hidden, tokens = (
            np.zeros((1, self._length + 3, WIDTH), np.float32),
            np.zeros((1, self._length + 3), int),
        )
        hidden[0, : self._length] = self._hidden
        for i in range(len(path)):
            hidden[0, self._length + i] = self._states[path[:i]]
        tokens[0, : self._length + len(path)] = [*TEXT[1:], ROOT, *path]
        states, log_p = self._run(hidden, tokens)
        last = self._length - 1 + len(path)
        self._states[path] = np.asarray(states)[last]
        return np.asarray(log_p)[last]


def paths_of(drafted) -> list[tuple[int, ...]]:
    """The tokens below the root of every real node but the root."""
    tokens, parent = np.asarray(drafted.tokens[0]), np.asarray(drafted.tree.parent).reshape(-1)
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        found.append((*found[parent[node]], int(tokens[node])))
    return found[1:]


def test_static_tree_holds_the_guesses_of_its_ranks():
    drafter = Eagle(RankTree(PATHS))
    params = random_params(drafter)
    says = Continued(drafter, params)
    expected = []
    for ranks in RankTree(PATHS).paths:
        path = ()
        for rank in ranks:
            path = (*path, int(np.argsort(-says(path), kind="stable")[rank]))
        expected.append(path)
    assert paths_of(draft(drafter, params)) == expected


@pytest.mark.parametrize("shape", [ConfidenceTree(3, 3, 8), ConfidenceTree(4, 2, 6), ConfidenceTree(1, 4, 3)])
def test_confidence_tree_is_the_best_of_the_expanded(shape):
    """The definition in plain Python, one path at a time: expand the best `width`, keep the best `budget`."""
    drafter = Eagle(shape)
    params = random_params(drafter)
    says = Continued(drafter, params)
    front: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    candidates: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(shape.depth):
        level = []
        for score, path in front:
            log_p = says(path)
            best = np.argsort(-log_p, kind="stable")[: shape.width]
            level += [(score + float(log_p[token]), (*path, int(token))) for token in best]
        candidates += level
        front = sorted(level, reverse=True)[: shape.width]
    expected = sorted(candidates, reverse=True)[: shape.budget]
    drafted = draft(drafter, params)
    assert sorted(paths_of(drafted)) == sorted(path for _, path in expected)
    assert bool(jnp.all(drafted.tree.real)) and drafted.tree.levels == drafter.levels
    kept = {path for _, path in expected}
    assert all(path[:-1] in kept or len(path) == 1 for path in kept)  # ancestors are kept too


def test_width_one_is_the_chain():
    chain = RankTree(tuple((0,) * depth for depth in range(1, 4)))
    params = random_params(Eagle(chain))
    static, dynamic = draft(Eagle(chain), params), draft(Eagle(ConfidenceTree(3, 1, 3)), params)
    assert np.array_equal(static.tokens, dynamic.tokens)
    assert np.array_equal(static.tree.parent, dynamic.tree.parent[0])


def teacher(params, batch) -> Teacher:
    return Teacher(Target(params, target().model), batch)


def test_loss_by_hand():
    """Both terms from their definitions, two documents in a row and padding after them."""
    batch = Walks(length=10).rows(np.arange(2))
    batch["segments"] = np.asarray([[1] * 4 + [2] * 6, [1] * 10])
    batch["positions"] = np.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], range(10)])
    batch["weights"] = np.asarray([[1, 1, 1, 0, 1, 1, 1, 1, 1, 1], [1] * 7 + [0] * 3], np.float32)
    drafter, found = Eagle(noise=0.5, feature_weight=2.0, token_weight=0.25), target()
    params = random_params(drafter)
    total, weight = jax.jit(lambda p: drafter.loss(p, teacher(found.params, batch), batch, None)["loss"])(
        params
    )
    # Place t speaks of token t + 2, the target of t + 1: of row 0 the places 0, 1 and 4 .. 8, as the document
    # ends in between for 2 and 3; of row 1 the places 0 .. 5.
    places = [(0, t) for t in (0, 1, 4, 5, 6, 7, 8)] + [(1, t) for t in range(6)]

    @jax.jit
    def run(params):
        hidden = teacher(found.params, batch).hidden
        places = batch["positions"], batch["segments"]
        return hidden, drafter.network(found).apply(
            {"params": params}, hidden, found.embed(batch["targets"]), *places
        )[0]

    hidden, states = (np.asarray(x, np.float64) for x in run(params))
    head = np.asarray(found.params["head"]["kernel"], np.float64)
    expected = 0.0
    for row, t in places:
        f, h = states[row, t], hidden[row, t + 1]
        gap = np.abs(f - h)
        feature = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
        p, q = (np.exp(x @ head) / np.exp(x @ head).sum() for x in (h, f))
        expected += 2.0 * feature - 0.25 * np.sum(p * np.log(q))
    assert float(weight) == len(places)
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)


def test_the_target_gets_no_gradient_and_noise_only_where_it_is_trained():
    batch = Walks(length=8).rows(np.arange(2))
    drafter = Eagle(noise=0.5)
    params = random_params(drafter)

    def loss(own, params, key, noise=0.5):
        eagle = dataclasses.replace(drafter, noise=noise)
        return eagle.loss(own, teacher(params, batch), batch, key)["loss"][0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    own, theirs = gradient(params, target().params, jax.random.key(0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(theirs))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(own))
    compiled = jax.jit(loss, static_argnames="noise")
    clean = compiled(params, target().params, None)
    assert clean == compiled(params, target().params, jax.random.key(0), noise=0.0)
    assert clean != compiled(params, target().params, jax.random.key(0))


@pytest.mark.parametrize(
    "depth, width, budget, message",
    [
        (2, 3, 13, "give 12 candidates: budget is 1 to 12, not 13"),  # 3 + 3 * 3
        (2, 3, 0, "budget is 1 to 12, not 0"),
        (0, 3, 1, "depth is 0"),
        (2, 0, 1, "width is 0"),
    ],
)
def test_impossible_trees(depth, width, budget, message):
    with pytest.raises(UserError, match=message):
        ConfidenceTree(depth, width, budget)


def test_wider_than_the_vocabulary():
    drafter = Eagle(ConfidenceTree(1, VOCAB + 1, 4))
    with pytest.raises(UserError, match=f"a tree {VOCAB + 1} wide is wider than the vocabulary of {VOCAB}"):
        draft(drafter, random_params(drafter))


def test_the_drafter_is_one_layer_and_a_projection():
    params = jax.eval_shape(lambda key: Eagle().create(key, target()), jax.random.key(0))
    assert set(params) == {"projection", "layer_0"}
    assert params["projection"]["kernel"].shape == (2 * WIDTH, WIDTH)
    own = jax.tree.map(lambda leaf: leaf.shape, target().params["layer_1"])
    assert jax.tree.map(lambda leaf: leaf.shape, params["layer_0"]) == own
