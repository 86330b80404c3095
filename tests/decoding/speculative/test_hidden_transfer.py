"""Hidden Transfer: what the pseudo states see and say, the linear head it becomes, who is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.speculative.hidden_transfer import HiddenTransfer, Transferred, TransferState
from research.decoding.speculative.training import Teacher
from research.errors import UserError

from .virtual_cases import LAYERS, WIDTH, call, close, continuation, extend, make_batch, prefix, target


@jax.jit
def random_maps():
    kernel = jnp.eye(WIDTH) + 0.3 * jax.random.normal(jax.random.key(8), (2, WIDTH, WIDTH))
    return kernel, jax.random.normal(jax.random.key(9), (2, WIDTH))


KERNEL, BIAS = map(np.asarray, random_maps())


def maps(kernel=KERNEL, bias=BIAS):
    return {"projection": {"kernel": kernel, "bias": bias}}


PARAMS = maps()


@functools.partial(jax.jit, static_argnums=0)
def _forced(drafter, params, batch):
    teacher = Teacher(target(), batch)
    return drafter.forced(params, teacher, batch), teacher.hidden, teacher.logits


def forced(*args):
    return jax.tree.map(np.asarray, _forced(*args))


@functools.partial(jax.jit, static_argnums=0)
def loss(drafter, params, batch, key=None):
    return drafter.loss(params, Teacher(target(), batch), batch, key)


def test_after_the_last_layer_it_is_a_linear_head():
    """t_j = L: the head reads norm(h W_j + b_j), where h is the state after the last layer, and Medusa's shares
    the model's own head. Here norm(h) = h / rms(h) goes through the same norm again, so a map that is linear
    and a bias of 0 give the logits of norm(h) W_j normalised."""
    batch = make_batch()
    params = maps(bias=np.zeros((2, WIDTH), np.float32))
    guesses, hidden, _ = forced(HiddenTransfer((LAYERS, LAYERS)), params, batch)
    scale = np.asarray(target().params["final_norm"]["scale"])
    for j in range(2):
        mapped = hidden / scale @ KERNEL[j]
        normed = mapped / np.sqrt((mapped**2).mean(-1, keepdims=True)) * scale
        close(
            guesses[j][0], normed @ np.asarray(target().params["embedding"]["table"]).T, rtol=1e-3, atol=1e-3
        )


def test_the_identity_after_the_last_layer_says_what_the_model_says():
    batch = make_batch()
    identity = np.broadcast_to(np.eye(WIDTH, dtype=np.float32), (2, WIDTH, WIDTH))
    params = maps(identity, np.zeros((2, WIDTH), np.float32))
    start = jax.jit(HiddenTransfer((1, LAYERS)).create)(jax.random.key(0), target())
    jax.tree.map(np.testing.assert_array_equal, start, params)
    guesses, _, logits = forced(HiddenTransfer((1, LAYERS)), params, batch)
    close(guesses[1][0], logits)
    assert np.abs(guesses[0][0] - logits).max() > 0.1  # at the place of the next token it differs


def test_guesses_do_not_see_the_future():
    batch, drafter = make_batch(), HiddenTransfer((0, 1))
    before, _, _ = forced(drafter, PARAMS, batch)
    changed = batch | {"tokens": (np.asarray(batch["tokens"]) + (np.arange(9) >= 5)).astype(np.int32) % 32}
    after, _, _ = forced(drafter, PARAMS, changed)
    for (said, *_), (again, *_) in zip(before, after, strict=True):
        np.testing.assert_array_equal(said[:, :5], again[:, :5])
        assert (said[:, 5:] != again[:, 5:]).any(-1).all()


def test_a_step_sees_the_steps_before_where_they_exist():
    """Step 2 follows another map of step 1 if both have a layer in common; step 1 never follows step 2."""
    batch = make_batch()
    first, second = (maps(bias=BIAS + np.eye(2, dtype=np.float32)[:, [j]]) for j in (0, 1))
    for layers, sees in (((0, 1), True), ((1, LAYERS), False)):
        drafter = HiddenTransfer(layers)
        said, other_first, other_second = (forced(drafter, p, batch)[0] for p in (PARAMS, first, second))
        assert bool((said[1][0] != other_first[1][0]).any()) == sees
        np.testing.assert_array_equal(said[0][0], other_second[0][0])


def test_only_the_maps_are_trained():
    batch = make_batch()

    def objective(params, model_params):
        found = target().replace(params=model_params)
        return HiddenTransfer((1, 1)).loss(params, Teacher(found, batch), batch, None)["loss"][0]

    own, others = jax.jit(jax.grad(objective, (0, 1)))(PARAMS, target().params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(others))
    assert all(
        np.asarray(leaf).any((1, 2) if leaf.ndim == 3 else 1).all() for leaf in own["projection"].values()
    )


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_loss_sums_the_divergences_from_the_model_at_the_true_places():
    batch, drafter = make_batch(), HiddenTransfer((1, 1))
    measured = loss(drafter, PARAMS, batch)
    guesses, _, logits = forced(drafter, PARAMS, batch)
    log_q = [log_softmax(said) for said, *_ in guesses]
    log_p = log_softmax(logits)
    total, places = 0.0, 0
    for row, begin, end in (
        (0, 0, 9),
        (1, 0, 3),
        (1, 4, 9),
    ):  # the last target of the first document counts not
        for n in range(begin, end - 2):
            places += 1
            for j in (1, 2):
                p = log_p[row, n + j]
                total += np.sum(np.exp(p) * (p - log_q[j - 1][row, n]))
    assert float(measured["loss"][1]) == places
    close(measured["loss"][0], total, rtol=1e-4)
    assert float(loss(HiddenTransfer((1, 1), anchors=1), PARAMS, batch)["loss"][1]) == 2.0


@pytest.mark.parametrize("layers", [(0, 1), (1, 1), (1, LAYERS)], ids=str)
def test_guesses_are_what_the_maps_say_behind_the_accepted_text(layers):
    paths = ((0,), (1,), (1, 0))
    drafter, cache = HiddenTransfer(layers, paths), prefix()[0]
    root, first, second, *_ = continuation()
    wrong = (first + 1) % 32
    for tokens, accepted in (([first, second], 2), ([first, wrong], 1), ([wrong, wrong], 0)):
        guesses = np.asarray([[[(tokens[0] + 2) % 32, tokens[0]], [tokens[1], 0]]], np.int32)
        outcome, state = call(drafter, PARAMS, TransferState(np.asarray([True]), guesses))
        assert outcome.accept.count.tolist() == [accepted + 1]
        # The same text as a chain, with pseudo states behind its last token alone.
        text = np.asarray([[root, first, second][: accepted + 1]], np.int32)
        rows = Transferred(KERNEL, BIAS, np.asarray([[accepted]], np.int32), layers, 1)
        logits, _, _ = extend(cache, text, virtual=rows)
        best = np.argsort(-np.asarray(logits)[:, accepted + 1 :], axis=-1)[:, :, :2]
        assert state.guesses.tolist() == best.tolist()


def test_the_first_call_has_no_candidates():
    outcome, after = call(HiddenTransfer((1, 1)), PARAMS)
    assert np.sum(outcome.draft.tree.real) == 1 and outcome.accept.count.tolist() == [1]
    assert after.ready.tolist() == [True]


def test_wrong_layers_are_refused():
    with pytest.raises(UserError, match="ascend"):
        HiddenTransfer((2, 1))
    with pytest.raises(UserError, match="3 deep for 2"):
        HiddenTransfer((1, 1), ((0,), (0, 0), (0, 0, 0)))
    with pytest.raises(UserError, match="layer 3 of a model with 2"):
        HiddenTransfer((1, 3)).create(jax.random.key(0), target())
