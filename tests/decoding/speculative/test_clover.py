"""Clover: what its parts are by definition, drafting as the training pass continued, its tree in plain Python."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.proposers import Prompt, Round, Target
from research.decoding.speculative.clover import AttentionDecoder, Clover, cosine
from research.decoding.speculative.training import Teacher
from research.errors import UserError
from research.nn.accounting import count_parameters
from tests.programs import call

from .members import WIDTH, Walks, tiny_target

TEXT = [5, 9, 2, 30, 7, 11]  # and then the root
ROOT = 8
DRAFTER = Clover(depth=4, budget=6, layers=2, num_heads=4)


@pytest.fixture(autouse=True, scope="module")
def made():
    """The target is written to disk when it is first asked for, which must not be inside of tracing."""
    tiny_target()


def target() -> Target:
    return Target(tiny_target().params, tiny_target().model)


@functools.cache
def created():
    return jax.jit(lambda key: DRAFTER.create(key, target()))(jax.random.key(0))


def random_params():
    """Unlike those that `create` gives, tokens matter, and some guesses are surer than others."""
    params = jax.tree.map(lambda x: x, created())  # a copy of the dicts
    for number, name in enumerate(("first_decoder", "next_decoder")):
        noise = jax.random.normal(jax.random.key(number), (WIDTH, WIDTH)) / WIDTH**0.5
        params[name]["value"]["kernel"] = noise
    params["next_head"]["projection"]["kernel"] += (
        jax.random.normal(jax.random.key(2), (2 * WIDTH, WIDTH)) / WIDTH**0.5
    )
    return params


def test_gates_are_cosines():
    """(3, 4) . (4, 3) = 24, both of length 5: 24 / 25; opposite vectors give -1, a zero vector 0."""
    a = jnp.asarray([[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]])
    b = jnp.asarray([[4.0, 3.0], [-2.0, -4.0], [1.0, 1.0]])
    np.testing.assert_allclose(cosine(a, b)[:, 0], [24 / 25, -1.0, 0.0], rtol=1e-6)
    assert not np.any(np.isnan(jax.jacobian(lambda x: cosine(x, b))(a)))


def test_one_gate_a_head_by_hand():
    """Two heads of two; queries and keys are what comes in, values twice the token."""
    params = {
        "norm": {"scale": jnp.ones(4)},
        "query": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "key": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "value": {"kernel": 2 * jnp.eye(4), "bias": jnp.zeros(4)},
    }
    state, token = jnp.asarray([3.0, 4.0, 1.0, 0.0]), jnp.asarray([4.0, 3.0, 0.0, 5.0])
    # The norm scales the whole query, which no cosine notices. Head 0: 24 / 25 = 0.96; head 1: at right angles, 0.
    # (3, 4) + 0.96 * 2 * (4, 3) = (10.68, 9.76); (1, 0) stays.
    out = call(AttentionDecoder(2), params, state, token)
    np.testing.assert_allclose(out, [10.68, 9.76, 1.0, 0.0], rtol=1e-6)


def test_gates_do_not_depend_on_the_size_of_embeddings():
    """With no bias on keys: what is merged in from 4 e is exactly 4 times what is merged in from e."""
    params = random_params()["first_decoder"]
    params["query"]["bias"] = jax.random.normal(jax.random.key(1), (WIDTH,))  # the query of a state of zeros
    state, token = jax.random.normal(jax.random.key(0), (2, 50, WIDTH))
    merge = jax.jit(lambda t: AttentionDecoder(4).apply({"params": params}, jnp.zeros_like(state), t))
    assert np.array_equal(4 * merge(token), merge(4 * token)) and np.any(merge(token))
    # |a| <= 1: no head is longer than its value.
    values = (token @ params["value"]["kernel"]).reshape(50, 4, -1)
    heads = call(AttentionDecoder(4), params, state, token) - state
    lengths = jnp.linalg.norm(heads.reshape(50, 4, -1), axis=-1)
    assert bool(jnp.all(lengths <= jnp.linalg.norm(values, axis=-1) * (1 + 1e-5)))


def test_without_values_the_regressive_connection_is_the_identity():
    params = random_params()
    for name in ("first_decoder", "next_decoder"):
        params[name]["value"]["kernel"] *= 0.0
    network = DRAFTER.network(target())
    state, token, other = jax.random.normal(jax.random.key(0), (3, 1, 5, WIDTH))
    after = call(network, params, state, token, method="next")[0]
    assert np.array_equal(after, state)
    assert np.array_equal(after, call(network, params, state, other, method="next")[0])
    assert np.array_equal(call(network, params, state, token, method="merge"), state)


def test_what_it_starts_from():
    params, theirs = created(), target().params
    for layer in ("layer_0", "layer_1"):  # both are copies of the target's last
        for mine, last in zip(
            jax.tree.leaves(params[layer]), jax.tree.leaves(theirs["layer_1"]), strict=True
        ):
            assert np.array_equal(mine, last)
    for norm in ("augment_norm", "head_norm"):
        assert np.array_equal(params[norm]["scale"], theirs["final_norm"]["scale"])
    identity, nothing = np.eye(WIDTH), np.zeros((WIDTH, WIDTH))
    both = np.concatenate([identity, nothing])
    expected = {("first_head", "projection"): identity, ("next_head", "projection"): both}
    for decoder in ("first_decoder", "next_decoder"):
        expected |= {(decoder, "query"): identity, (decoder, "key"): identity, (decoder, "value"): nothing}
    drawn = []
    for path, start in expected.items():
        found = params[path[0]][path[1]]
        gap = np.asarray(found["kernel"]) - start
        assert gap.min() >= -1e-6 and gap.max() < 0.0101 and gap.std() > 0.002 and not np.any(found["bias"])
        drawn.append(gap[0, 1])
    assert len(set(drawn)) == len(drawn)  # every kernel has draws of its own


def test_no_parameters_for_more_depth():
    counts = {
        count_parameters(
            jax.eval_shape(lambda key, k=k: Clover(depth=k).create(key, target()), jax.random.key(0))
        )
        for k in (1, 3, 6)
    }
    assert len(counts) == 1


@functools.cache
def training_pass():
    """The guesses of the training pass at the last place of TEXT: log p [depth, V] of a text of TEXT, root and
    drafts."""
    network, found, params = DRAFTER.network(target()), target(), random_params()

    @jax.jit
    def run(text):
        hidden, _ = call(found.model, found.params, text[:, : len(TEXT)], method="features")
        tokens = [found.embed(text[:, k : k + len(TEXT)]) for k in range(1, DRAFTER.depth + 1)]
        places = jnp.arange(len(TEXT))[None], jnp.ones((1, len(TEXT)), jnp.int32)
        guesses = call(network, params, hidden, tokens, *places, method="forced")
        return jnp.stack([jax.nn.log_softmax(found.logits(y[0, -1])) for y in guesses])

    return run


def says(path: tuple[int, ...]) -> np.ndarray:
    """log p(. | text, root, path) in the training pass, float64[V]."""
    text = np.zeros((1, len(TEXT) + DRAFTER.depth), np.int32)
    text[0, : len(TEXT) + 1 + len(path)] = [*TEXT, ROOT, *path]  # guess k depends on k - 1 drafts
    return np.asarray(training_pass()(text), np.float64)[len(path)]


def draft(drafter: Clover, params):
    """What is drafted for one row after TEXT and the root: tokens, parents and flags."""

    @jax.jit
    def run(params, tokens, root):
        hidden, _ = target().model.apply({"params": target().params}, tokens, method="features")
        lengths = jnp.asarray([len(TEXT)])
        state = drafter.init(params, target(), Prompt(tokens, lengths, hidden, root, capacity=32))
        round_ = Round(root, lengths, jax.random.split(jax.random.key(0), 1), lambda logits, *_: logits)
        return drafter.propose(params, target(), state, round_)[0]

    return run(params, jnp.asarray([TEXT]), jnp.asarray([ROOT]))


def tree_by_definition(drafter: Clover) -> list[tuple[int, ...]]:
    """Which paths are drafted, as the paper describes it."""
    front, left, kept = [(1.0, ())], drafter.budget, []
    for _ in range(drafter.depth):
        candidates = []
        for score, path in front:
            p = np.exp(says(path))
            order = np.argsort(-p, kind="stable")
            for rank, token in enumerate(order):
                together = p[order[: rank + 1]].sum()
                if rank and (together > drafter.top_p or p[token] < drafter.floor * p[order[0]]):
                    break
                candidates.append((score * p[token], (*path, int(token))))
        front = sorted(candidates, reverse=True)[:left]
        kept += front
        left -= len(front)
        if not left:
            break
    return [path for _, path in kept]


@pytest.mark.parametrize(
    "fields",
    [{}, {"top_p": 0.3, "depth": 3}, {"floor": 0.7, "budget": 8}, {"top_p": 1.0, "floor": 0.0}],
    ids=["default", "top_p", "floor", "fan"],
)
def test_the_tree_by_definition_and_drafting_is_the_training_pass(fields):
    """Every guess below a drafted path is the training pass's on a text that goes on with that path."""
    drafter = dataclasses.replace(DRAFTER, **fields)
    expected, drafted = tree_by_definition(drafter), draft(drafter, random_params())
    tokens, parent = np.asarray(drafted.tokens[0]), np.asarray(drafted.tree.parent[0])
    real, paths = np.asarray(drafted.tree.real[0]), [()]
    for node in range(1, drafter.size):
        assert parent[node] < node and (not real[node] or real[parent[node]])
        paths.append((*paths[parent[node]], int(tokens[node])))
    found = [path for path, flag in zip(paths[1:], real[1:], strict=True) if flag]
    assert sorted(found) == sorted(expected) and len(found) <= drafter.budget
    assert (drafted.tree.size, drafted.tree.levels) == (drafter.size, drafter.levels)
    if fields == {"top_p": 1.0, "floor": 0.0}:  # everything is offered: the first level takes the budget
        assert {len(path) for path in found} == {1}


def test_a_chain_when_nothing_but_the_best_is_offered():
    drafter = dataclasses.replace(DRAFTER, budget=4, top_p=0.0)
    drafted = draft(drafter, random_params())
    assert drafted.tree.parent.tolist() == [[-1, 0, 1, 2, 3]] and bool(jnp.all(drafted.tree.real))


def test_sure_guesses_leave_budget_unused():
    """Certain of every token, and one level: one candidate, and the rest of the budget is padding."""
    drafter = dataclasses.replace(DRAFTER, depth=1, top_p=0.0)
    drafted = draft(drafter, random_params())
    assert drafted.tree.real.tolist() == [[True, True] + [False] * 5]


def test_loss_by_hand():
    """The sum over guesses of decay^(k-1) times both terms, on one document and padding."""
    batch = Walks(length=8).rows(np.arange(1))
    batch["weights"][:, 6:] = 0.0  # the targets of the last two places are none
    drafter = dataclasses.replace(DRAFTER, depth=2, decay=0.5, token_weight=2.0, state_weight=3.0)
    found = target()
    params = random_params()

    @jax.jit
    def run(params):
        teacher = Teacher(found, batch)
        tokens = [found.embed(batch["targets"]), found.embed(jnp.roll(batch["targets"], -1, axis=1))]
        places = batch["positions"], batch["segments"]
        network = drafter.network(found)
        guesses = call(network, params, teacher.hidden, tokens, *places, method="forced")
        return drafter.loss(params, teacher, batch, None)["loss"], teacher.hidden[0], [y[0] for y in guesses]

    (total, weight), hidden, guesses = run(params)
    head = np.asarray(found.params["head"]["kernel"], np.float64)
    expected = 0.0
    for k, y in enumerate(guesses, 1):
        for t in range(6 - k):  # the last labelled place is 5
            mine, theirs = np.asarray(y[t], np.float64), np.asarray(hidden[t + k], np.float64)
            p, q = (np.exp(x @ head) / np.exp(x @ head).sum() for x in (theirs, mine))
            gap = np.abs(mine - theirs)
            state = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            expected += 0.5 ** (k - 1) * (3.0 * state - 2.0 * np.sum(p * np.log(q)))
    assert float(weight) == 5  # places of the first guess
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)


def test_the_target_gets_no_gradient():
    """Not through its head, nor its embedding, nor its layers."""
    batch = Walks(length=8).rows(np.arange(1))
    params = random_params()

    def loss(own, theirs):
        return DRAFTER.loss(own, Teacher(Target(theirs, target().model), batch), batch, None)["loss"][0]

    own, theirs = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, target().params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(theirs))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"budget": 0}, "budget is 0; it must be at least 1"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it is a share from 0 to 1"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(UserError, match=message):
        Clover(**fields)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match=f"num_heads=5 does not divide the target's width {WIDTH}"):
        Clover(num_heads=5).create(jax.random.key(0), target())
