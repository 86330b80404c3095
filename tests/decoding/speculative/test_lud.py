"""LUD: units by hand, what placeholders are taught, what is said in parallel, and when nothing is."""

import functools

import jax
import numpy as np
import pytest

from research.decoding.generator import Generator
from research.decoding.sampling import Sampling
from research.decoding.speculative import lud
from research.decoding.speculative.lud import LUD, LUDState, Unchecked
from research.decoding.speculative.training import Teacher
from research.decoding.speculative.virtual import Inserted
from research.errors import UserError

from .virtual_cases import WIDTH, call, close, continuation, extend, make_batch, prefix, target

# One program a shape instead of one an operation.
mark_units = jax.jit(lud.mark_units, static_argnums=(2, 3))
unit_labels = jax.jit(lud.unit_labels, static_argnums=3)
repeats = jax.jit(lud.repeats, static_argnums=2)

PARAMS = {"placeholder": np.random.default_rng(8).standard_normal(WIDTH).astype(np.float32)}


def document(length: int) -> dict:
    return {"segments": np.ones((1, length), np.int32), "weights": np.ones((1, length), np.float32)}


def places(confidence, batch=None, alpha=0.9, length=3) -> list[list[int]]:
    confidence = np.float32([confidence])
    return mark_units(confidence, batch or document(confidence.shape[1]), alpha, length).tolist()


def test_units_by_hand():
    sure = [0.2, 0.95, 0.9, 0.89, 0.99, 0.1, 0.95, 0.95, 0.95, 0.95]
    # The first is not sure and begins a unit; .89 is below alpha; after three tokens another unit begins.
    assert places(sure) == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]
    assert places(sure, length=2) == [[0, 1, 0, 0, 1, 0, 1, 0, 1, 0]]
    assert places(sure, alpha=1.01) == [[0] * 10]  # single tokens
    assert places(sure, alpha=0.0) == [[0, 1, 2] * 3 + [0]]  # runs of three, whatever they are
    # A document ends after the fourth target, and the seventh does not count.
    batch = {
        "segments": np.asarray([[1] * 4 + [2] * 6]),
        "weights": np.float32([[1] * 6 + [0] + [1] * 3]),
    }
    assert places([0.95] * 10, batch) == [[0, 1, 2, 0, 0, 1, 0, 1, 2, 0]]


def test_units_are_a_maximal_partition():
    random = np.random.default_rng(0)
    for _ in range(4):
        confidence = random.random((3, 40)) ** 0.2
        found = np.asarray(
            mark_units(
                confidence.astype(np.float32),
                {k: np.repeat(v, 3, 0) for k, v in document(40).items()},
                0.8,
                4,
            )
        )
        begins = found == 0
        assert begins[:, 0].all() and found.max() < 4
        assert (found[:, 1:][~begins[:, 1:]] == found[:, :-1][~begins[:, 1:]] + 1).all()
        assert (confidence[~begins] >= 0.8).all()
        # Maximal: where one begins, its first token was not sure or the one before was full.
        full = np.pad(found[:, :-1] == 3, ((0, 0), (1, 0)))
        assert (~begins[:, 1:] | (confidence < 0.8)[:, 1:] | full[:, 1:]).all()


def test_placeholders_are_taught_the_rest_of_the_unit():
    """Targets 11 .. 19 in units of 3, 1, 2 and, in the second document, 1, 2: anchors are where they begin."""
    batch = make_batch() | {"targets": np.broadcast_to(11 + np.arange(9), (2, 9))}
    place = np.asarray([[0, 1, 2, 0, 0, 1, 0, 0, 1]] * 2)
    anchors = np.asarray([[0, 3, 4, 7], [1, 0, 4, 7]])
    labels, weights = unit_labels(batch, place, anchors, 3)
    kept = np.where(np.asarray(weights) > 0, labels, 0)
    # Behind anchor 0, target 11, come 12 and 13; behind 3 nothing; behind 4, target 15, 16; behind 7, 19.
    assert kept[0].T.tolist() == [[12, 13], [0, 0], [16, 0], [19, 0]]
    assert kept[1].T.tolist() == [[0, 0], [12, 13], [16, 0], [19, 0]]  # 1 begins no unit
    # Target 3 of the second row counts not: a unit that reached it would end before.
    place[:, 3] = 3
    weights = np.asarray(unit_labels(batch, place, anchors, 4)[1])
    assert weights[0, :, 0].tolist() == [1, 1, 1] and weights[1, :, 1].tolist() == [1, 1, 0]


@functools.partial(jax.jit, static_argnums=0)
def loss(drafter, params, batch, key=None):
    return drafter.loss(params, Teacher(target(), batch), batch, key)


def test_the_loss_is_cross_entropy_at_all_labelled_places():
    batch = make_batch()
    params = PARAMS | {"model": target().params}
    alone = loss(LUD(3, alpha=1.1), params, batch)  # no unit of two tokens: the model's own loss
    assert float(alone["units"][1]) == 0.0 == float(alone["continued"][0])
    log_p = np.asarray(jax.jit(lambda b: jax.nn.log_softmax(Teacher(target(), b).logits))(batch), np.float64)
    own = -np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], -1)[..., 0] * np.asarray(
        batch["weights"]
    )
    close(alone["loss"][0], own.sum(), rtol=1e-4)
    assert float(alone["loss"][1]) == np.sum(np.asarray(batch["weights"])) == 17
    # Units of three: 9 targets; 3 that count and, after one that does not, 5 of the second document. Each
    # unit of c tokens has c - 1 placeholders: 3 x 2; 2 and, 3 + 2, 2 + 1.
    whole = loss(LUD(3, alpha=0.0), params, batch)
    assert float(whole["units"][1]) == 6 + 2 + 3
    close(whole["loss"][0], whole["language"][0] + whole["units"][0])
    assert float(whole["loss"][1]) == 17 + 11
    close(whole["language"][0], alone["loss"][0])  # placeholders change nothing for the tokens
    # One drawn unit a row: at most two placeholders each.
    drawn = loss(LUD(3, alpha=0.0, anchors=1), params, batch, jax.random.key(1))
    assert 2 <= float(drawn["units"][1]) <= 4


def test_the_tuned_model_and_the_placeholder_are_trained_and_the_original_is_not():
    batch = make_batch()

    def objective(params, model_params):
        found = target().replace(params=model_params)
        return LUD(3, alpha=0.0).loss(params, Teacher(found, batch), batch, None)["loss"][0]

    params = jax.jit(LUD().create)(jax.random.key(0), target())
    assert LUD().tuned(params, target()) is params["model"]
    jax.tree.map(np.testing.assert_array_equal, params["model"], target().params)
    own, others = jax.jit(jax.grad(objective, (0, 1)))(params, target().params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(own)) and np.all(own["placeholder"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))


def test_units_are_marked_by_the_original():
    """Another tuned model changes the loss and not the units."""
    batch = make_batch()
    params = PARAMS | {"model": target().params}
    other = params | {"model": jax.tree.map(lambda x: np.float32(0.5) * np.asarray(x), target().params)}
    before, after = (jax.device_get(loss(LUD(3, alpha=0.02), p, batch)) for p in (params, other))
    assert before["continued"] == after["continued"] and before["units"][1] == after["units"][1] > 0
    assert before["loss"][0] != after["loss"][0]


def test_repetitions_by_hand():
    recent = np.asarray([[-1, -2, 5, 6]])
    # 6 repeats 6; 5 6 after 5 6; 9 is new, and 6 9 is no repetition of 9 alone.
    found = lambda guesses, longest: repeats(recent, np.asarray([guesses]), longest).tolist()[0]  # noqa: E731
    assert found([6, 7, 7], 1) == [True, False, True]
    assert found([5, 6, 9], 1) == [False, False, False]
    assert found([5, 6, 9], 2) == [False, True, False]
    assert found([6, 6, 6], 0) == [False] * 3
    assert repeats(np.asarray([[-1, -2, -3, -4]]), np.asarray([[1, 2, 1]]), 2).tolist() == [[False] * 3]


def state_with(tokens, count=None) -> LUDState:
    count = len(tokens) if count is None else count
    return LUDState(*(np.asarray([part], np.int32) for part in (tokens, count, [-1, -2, -3, -4])))


def test_said_tokens_are_kept_unchecked_and_the_next_are_what_placeholders_say():
    """Two pending tokens that the model would not choose: kept without a check, dropped with one."""
    cache = prefix()[0]
    root, first, second, *_ = continuation()
    wrong, other = (first + 1) % 32, (second + 2) % 32
    drafter = LUD(3, beta=0.0, repetition=0)
    outcome, state = call(drafter, PARAMS, state_with([wrong, other]), Unchecked())
    assert outcome.accept.count.tolist() == [3] and outcome.accept.path.tolist() == [[0, 1, 2]]
    text = np.asarray([[root, wrong, other]])
    virtual = Inserted(np.broadcast_to(PARAMS["placeholder"], (1, 2, WIDTH)))
    choice = np.argmax(extend(cache, text, virtual=virtual)[0], -1)
    assert outcome.accept.token.tolist() == [choice[0, 2]]
    assert state.pending.tolist() == [choice[0, 3:].tolist()] and state.count.tolist() == [2]
    # R is 1 here, where nothing looks for repetitions.
    assert state.recent.tolist()[0][-1] == choice[0, 2]
    # Checked, nothing of it is kept; without placeholders under the root there is then nothing to say.
    outcome, state = call(drafter, PARAMS, state_with([wrong, other]))
    assert outcome.accept.count.tolist() == [1] and state.count.tolist() == [0]
    everywhere = LUD(3, beta=0.0, repetition=0, checked=True)
    assert (drafter.size, everywhere.size) == (3 + 2, 3 + 3 * 2)
    outcome, state = call(everywhere, PARAMS, state_with([first, other]))
    assert outcome.accept.count.tolist() == [2] and state.count.tolist() == [2]
    logits, _, _ = extend(cache, np.asarray([[root, first]]), virtual=virtual)
    assert state.pending.tolist() == np.argmax(np.asarray(logits)[:, 2:], -1).tolist()


def test_spans_shrink_as_beta_grows():
    counts, probabilities = [], None
    for beta in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.01):
        outcome, state = call(LUD(4, beta=beta, repetition=0), PARAMS, verifier=Unchecked())
        odds = np.exp(np.asarray(outcome.logits)[0, 4:7])  # three behind the root
        said = odds.max(-1) / odds.sum(-1)
        assert probabilities is None or np.array_equal(said, probabilities)
        probabilities = said
        counts += state.count.tolist()
        expected = next((i for i, p in enumerate(said) if p < beta), 3)  # the first below beta
        assert counts[-1] == expected
    assert counts[0] == 3 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8)], ids=["greedy", "sampled"])
def test_beta_above_one_is_plain_decoding(sampling):
    found, prompts = target(), [[3, 1, 4], [1, 5, 9, 2, 6]]
    options = dict(max_new_tokens=10, sampling=sampling, seed=4)
    expected = Generator(found.model, found.params).generate(prompts, **options)
    lud = functools.partial(
        Generator, found.model, found.params, proposer_params=PARAMS, verifier=Unchecked(not sampling.greedy)
    )
    same = lud(proposer=LUD(3, beta=1.01)).generate(prompts, **options)
    assert [s.tokens for s in same.samples] == [s.tokens for s in expected.samples]
    assert same.stats.drafted == 0
    # And below it is not, for an untrained placeholder.
    other = lud(proposer=LUD(3, beta=0.0, repetition=0)).generate(prompts, **options)
    assert [s.tokens for s in other.samples] != [s.tokens for s in expected.samples]
    assert other.stats.tokens_per_call > 2 and other.stats.wasted <= 2 * len(
        prompts
    )  # cut by the limit alone


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="nothing to say in parallel"):
        LUD(1)
    with pytest.raises(UserError, match="repetition is -1"):
        LUD(repetition=-1)
