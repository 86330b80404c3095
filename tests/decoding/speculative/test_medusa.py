"""Medusa: heads that start as the target, what each guesses, gradients, low-rank branches, trees through the
model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.matlm import decoder
from research.config import build
from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative import losses
from research.decoding.speculative.medusa import Medusa, Medusa2
from research.decoding.speculative.training import Teacher, ahead
from research.decoding.speculative.trees import RankTree, calibrate, chain_paths
from research.decoding.verify import Accept
from research.errors import UserError
from research.nn.dropout import Dropping
from research.nn.weights import LowRank
from tests.programs import drawn

VOCAB, WIDTH = 32, 16
TREE = RankTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
KEY = jax.random.key(7)


def make_target(tied: bool = False, **fields) -> Target:
    config = decoder(WIDTH, 2, 2, 24, 64, VOCAB)
    model = dataclasses.replace(build(config), tied_head=tied, **fields)
    params = drawn(model, np.zeros((1, 1), np.int32))
    larger = lambda x: jax.device_put(np.float32(2.0) * np.asarray(x))  # noqa: E731
    return Target(jax.tree.map(larger, params), model)  # larger, so that rounding can show


@pytest.fixture(scope="module")
def target() -> Target:
    return make_target()


def make_batch(length: int = 12) -> dict[str, np.ndarray]:
    """Two rows, the second of two documents."""
    text = np.random.default_rng(1).integers(0, VOCAB, (2, length + 1), np.int32)
    segments = np.asarray([[1] * length, [1] * 5 + [2] * (length - 5)], np.int32)
    positions = np.asarray([range(length), [*range(5), *range(length - 5)]], np.int32)
    weights = np.ones((2, length), np.float32)
    weights[1, 4] = 0.0
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "segments": segments, "positions": positions}
    return batch | {"weights": weights}


@functools.partial(jax.jit, static_argnums=1)
def disturbed(params, scale: float = 0.3):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        structure, [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


MEDUSA = Medusa(TREE, num_heads=3)


@functools.partial(jax.jit, static_argnums=1)
def created(target: Target, drafter: Medusa = MEDUSA):
    return drafter.create(KEY, target)


@functools.partial(jax.jit, static_argnums=0)
def _says(drafter, params, target, batch):
    teacher = Teacher(target, batch)
    return drafter.forced(params, teacher, batch), teacher.hidden, teacher.logits


def says(*args):
    """What the heads say along a text; the target's hidden states and logits."""
    return jax.tree.map(np.asarray, _says(*args))


@functools.partial(jax.jit, static_argnums=0)
def measured(drafter, params, target, batch, key=None):
    return drafter.loss(params, Teacher(target, batch), batch, key)


@pytest.mark.parametrize(
    "fields",
    [dict(tied=True), dict(tied=False), dict(tied=True, logit_softcap=5.0)],
    ids=["tied", "untied", "softcap"],
)
def test_every_head_starts_as_the_target_bit_for_bit(fields):
    target, batch = make_target(**fields), make_batch()
    drafter = Medusa(TREE, num_heads=3, num_layers=2)
    guesses, _, expected = says(drafter, created(target, drafter), target, batch)
    for logits, _, _ in guesses:
        assert np.array_equal(logits, expected)
    assert len(guesses) == 3 and np.ptp(expected) > 1


def test_head_k_is_compared_with_the_token_k_further_on(target):
    batch = make_batch()
    guesses = says(Medusa(TREE, num_heads=3), created(target), target, batch)[0]
    tokens = np.asarray(batch["tokens"])
    for k, (_, labels, weights) in enumerate(guesses, start=1):
        # At t = 2 of the first row the target says tokens[3] and head k tokens[3 + k].
        assert labels[0, 2] == tokens[0, 3 + k] and weights[0, 2] == 1
        # In the second row document 1 ends with token 4: head k may be judged up to t = 3 - k.
        assert weights[1, :5].tolist() == [1.0] * (4 - k) + [0.0] * (k + 1)


def test_loss_by_hand(target):
    """At first every head is the target: loss = .8 CE_1 + .64 CE_2, where CE_k compares its logits with labels
    k further on; the sum is divided by the places of head 1."""
    drafter, batch = Medusa(RankTree(chain_paths(2)), num_heads=2), make_batch()
    total, weight = measured(drafter, created(target, drafter), target, batch)["loss"]
    logits = says(drafter, created(target, drafter), target, batch)[2].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = 0.0
    for k, factor in ((1, 0.8), (2, 0.64)):
        labels, weights = (np.asarray(x) for x in ahead(batch, k))
        for b, t in zip(*np.nonzero(weights), strict=True):
            expected -= factor * log_p[b, t, labels[b, t]]
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(weight) == 11 + 3 + 6  # 12 - 1 places in the first row, 5 - 2 and 7 - 1 in the second


def test_medusa_1_gives_the_target_no_gradient(target):
    drafter, batch = Medusa(TREE, num_heads=3), make_batch()
    params = disturbed(created(target))

    def loss(params, target):
        return measured(drafter, params, target, batch, KEY)["loss"][0]

    own, frozen = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, target)
    assert all(not np.any(x) for x in jax.tree.leaves(frozen))
    assert all(np.any(x) for x in jax.tree.leaves(own))


def test_medusa_2_without_the_heads_loss_is_language_modelling(target):
    """With head_weight 0 the gradient in the target is that of its own loss."""
    batch = make_batch()
    tuned = Medusa2(TREE, num_heads=3, rank=4)
    params = disturbed(created(target, tuned), 0.1)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(head_weight):
        drafter = dataclasses.replace(tuned, head_weight=head_weight)
        return jax.grad(lambda target: measured(drafter, params, target, batch)["loss"][0])(target).params

    @jax.jit
    @jax.grad
    def expected_gradient(target):
        moved = tuned._tuned(params, target, None)
        places = batch["positions"], batch["segments"]
        logits = moved.model.apply({"params": moved.params}, batch["tokens"], *places)
        return losses.cross_entropy(logits, *ahead(batch, 0))[0]

    expected, without, with_heads = expected_gradient(target).params, gradient(0.0), gradient(0.2)
    expected, without, with_heads = jax.device_get((expected, without, with_heads))
    size = jax.tree.map(lambda x: float(np.max(np.abs(x))), expected)
    gap = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), expected, without)
    assert all(g < 1e-4 * s for g, s in zip(jax.tree.leaves(gap), jax.tree.leaves(size), strict=True))
    gap = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), expected, with_heads)
    kernel = lambda tree: tree["layer_0"]["attention"]["query"]["kernel"]  # noqa: E731
    assert kernel(gap) > 1e-2 * kernel(size)


def test_self_distillation_begins_at_the_target(target):
    """With B = 0 the tuned target is the target: KL and its gradient are 0, whatever A is."""
    batch = make_batch()
    drafter = Medusa2(TREE, num_heads=3, reference="self", rank=4)

    @jax.jit
    def parts(params):
        """KL and the heads' loss, and the gradients of both."""

        def both(params):
            metrics = measured(drafter, params, target, batch)
            return metrics["target"][0], metrics["heads"][0]

        (kl, heads), pullback = jax.vjp(both, params)
        return kl, heads, pullback((1.0, 0.0))[0], pullback((0.0, 1.0))[0]

    params = created(target, drafter)
    kl, heads, kl_gradient, heads_gradient = parts(params)
    assert float(kl) == 0.0 < float(heads)
    assert max(float(np.max(np.abs(x))) for x in jax.tree.leaves(kl_gradient)) < 1e-4
    # The heads' loss does move the branches, and then the KL is not 0.
    assert float(np.max(np.abs(heads_gradient["branches"]["layer_0"]["mlp"]["up"]["kernel"]["up"]))) > 1.0
    assert float(parts(disturbed(params, 0.1))[0]) > 1.0


@pytest.mark.parametrize("scanned", [False, True])
def test_the_tuned_target_is_the_one_that_was_trained(scanned):
    target, batch = make_target(tied=True, scan_layers=scanned), make_batch()
    drafter = Medusa2(TREE, num_heads=3, rank=4, alpha=8.0, dropout=0.3)
    fresh = created(target, drafter)
    jax.tree.map(np.testing.assert_array_equal, drafter.tuned(fresh, target), target.params)
    params = disturbed(fresh, 0.1)
    tuned = target.replace(params=jax.jit(drafter.tuned)(params, target))
    assert jax.tree.structure(tuned.params) == jax.tree.structure(target.params)
    place = ("layers", "layer_0") if scanned else ("layer_0",)
    kernel, before, branch = tuned.params, target.params, params["branches"]
    for name in (*place, "attention", "query", "kernel"):
        kernel, before, branch = kernel[name], before[name], branch[name]
    kernel, before, branch = jax.device_get((kernel, before, branch))
    np.testing.assert_allclose(
        kernel, before + 2.0 * branch["down"] @ branch["up"], rtol=1e-5
    )  # alpha / rank
    # The loss of the heads on the tuned target, without dropout, is what training measured.
    branched = measured(drafter, params, target, batch)["heads"]
    merged = measured(Medusa(TREE, num_heads=3), params, tuned, batch)["loss"]
    assert float(branched[0]) == pytest.approx(float(merged[0]), rel=1e-5)
    # Dropout is for training alone, and has a mask for every layer, stacked or not.
    assert float(measured(drafter, params, target, batch, KEY)["heads"][0]) != float(branched[0])


def test_dropout_of_a_kernel():
    kernel = LowRank(np.ones((1000, 1), np.float32), np.ones((1, 1), np.float32))
    x = np.ones((200, 1000), np.float32)
    y = np.asarray(jax.jit(lambda kernel, x: Dropping(kernel, KEY, 0.25).dot(x)[:, 0])(kernel, x))
    # Sums of 1000 terms that are 4/3 with probability 3/4: mean 1000, deviation sqrt(1000 / 3) = 18.3.
    assert abs(float(y.mean()) - 1000) < 5 * 18.3 / 200**0.5
    assert 14 < float(y.std()) < 23


def prompt_of(target: Target, tokens: jax.Array, lengths: jax.Array) -> Prompt:
    logits, hidden, _ = target.model.apply({"params": target.params}, tokens, lengths, method="prefill")
    return Prompt(tokens, lengths, hidden, jnp.argmax(logits, -1), 32)


def test_drafts_are_the_best_guesses_of_the_heads(target):
    """After a prompt, and after a call that accepted a path."""
    drafter = Medusa(TREE, num_heads=3)
    params, batch = disturbed(created(target)), make_batch()
    guesses, text_hidden, _ = says(drafter, params, target, batch)
    guesses = [np.argsort(-logits, axis=-1, kind="stable")[..., :2] for logits, _, _ in guesses]
    lengths, root = np.asarray([6, 4], np.int32), np.asarray([3, 4], np.int32)
    round_ = Round(root, lengths, None, None)
    propose = jax.jit(lambda state: drafter.propose(params, target, state, round_))
    begin = lambda tokens: drafter.init(params, target, prompt_of(target, tokens, lengths))  # noqa: E731
    state = jax.jit(begin)(batch["tokens"])

    def expected(row, t):
        first, second, third = (g[row, t] for g in guesses)
        return [int(root[row]), first[0], first[1], second[0], second[1], second[0], third[0]]

    draft, state = propose(state)
    assert draft.tokens.tolist() == [expected(0, 5), expected(1, 3)]
    # The call accepts nodes 0, 1, 4 in row 0 and the root alone in row 1: the states of nodes 4 and 0 count. Any
    # states will do: here those of places 8 and 4 of the text.
    hidden = np.zeros((2, TREE.size, WIDTH), np.float32)
    hidden[0, 4], hidden[1, 0] = text_hidden[0, 8], text_hidden[1, 4]
    accept = jax.device_put(Accept(np.asarray([[0, 1, 4, 0]] * 2), np.asarray([3, 1]), root))
    observe = lambda state, hidden: drafter.observe(  # noqa: E731
        params, target, state, Outcome(draft, accept, None, None, hidden)
    )
    state = jax.jit(observe)(state, hidden)
    assert propose(state)[0].tokens.tolist() == [
        expected(0, 8),
        expected(1, 4),
    ]


def test_a_tree_is_scored_as_each_of_its_paths_and_its_rows_may_move(target):
    """The model's side of the bargain: a tree in one call, and the accepted rows, moved, are the text's."""
    variables = {"params": target.params}
    rng = np.random.default_rng(3)
    prompt, tokens = (jnp.asarray(rng.integers(0, VOCAB, (1, n), np.int32)) for n in (9, TREE.size))
    tree = TREE.tree
    accepted, more = jnp.asarray([[0, 1, 4, 0]]), jnp.asarray([6, 2])

    @jax.jit
    def in_two_calls():
        _, _, fresh = target.model.apply(variables, prompt, jnp.asarray([9]), method="prefill")
        cache = target.model.init_cache(1, 32).commit(fresh, None, jnp.asarray([9]))
        logits, _, rows = target.model.apply(variables, tokens, cache, tree.mask, tree.depth, method="extend")
        cache = cache.commit(rows, accepted, jnp.asarray([3]))
        return logits[0], target.model.apply(variables, tokens[:, more], cache, method="extend")[0][0]

    @jax.jit
    def whole(nodes):
        text = jnp.concatenate([jnp.broadcast_to(prompt, (len(nodes), 9)), tokens[0, nodes]], axis=1)
        return target.model.apply(variables, text)[:, 9:]

    logits, after = map(np.asarray, in_two_calls())
    # To the leaves 4, 5 and 6; what follows a leaf is not seen.
    paths = [[0, 1, 4, 6, 2], [0, 2, 5, 0, 0], [0, 1, 3, 6, 0]]
    expected = np.asarray(whole(np.asarray(paths)))
    for row, depth in enumerate((3, 3, 4)):
        np.testing.assert_allclose(logits[paths[row][:depth]], expected[row, :depth], atol=5e-5)
    # Nodes 0, 1 and 4 were accepted; 6 and 2 go on from there as a chain.
    np.testing.assert_allclose(after, expected[0, 3:], atol=5e-5)


def test_calibration_counts_what_the_heads_get_right(target):
    drafter, batch = Medusa(TREE, num_heads=3), make_batch()
    params = disturbed(created(target))
    accuracy = calibrate(drafter, params, target, [batch, batch], top=VOCAB)
    metrics = measured(drafter, params, target, batch)
    for k in (1, 2, 3):
        hits, weight = metrics[f"agreement_{k}"]
        assert accuracy[k - 1, 0] == pytest.approx(float(hits / weight))
    assert np.allclose(accuracy.sum(1), 1.0)  # some rank is right


def test_a_tree_deeper_than_the_heads_is_told():
    with pytest.raises(UserError, match="3 deep and there are 2 heads"):
        Medusa(TREE, num_heads=2)
