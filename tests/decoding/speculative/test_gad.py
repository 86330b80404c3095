"""Generalized aggressive decoding: what its drafter sees, how it is trained, lossless and relaxed verification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding import engine as engines
from research.decoding.generator import Generator
from research.decoding.proposers import Prompt, Target
from research.decoding.sampling import Sampling, argmax
from research.decoding.speculative.gad import GAD, cut, distil, glance
from research.decoding.speculative.training import Teacher
from research.decoding.tree import chain
from research.decoding.verify import Draft, Greedy, TopBeta
from research.errors import UserError
from research.nn.masks import Full

from .tiny_encoder_decoder import SOURCES, VOCAB, network, tiny_encoder_decoder

BLOCK, EOS, ROOM = 4, 2, 20


def drafter(**fields) -> GAD:
    return GAD(network(VOCAB + 1, Full()), **{"block": BLOCK, "eos": EOS, **fields})


@functools.cache
def target() -> Target:
    model, params = tiny_encoder_decoder()
    return Target(params, model)


@functools.cache
def created():
    return jax.jit(lambda key: drafter().create(key, target()))(jax.random.key(5))


@functools.cache
def params():
    return jax.tree.map(lambda x: x * 2.0, created())  # sharper: drafts that vary


def batch(lengths=(6, 3, 9), width=ROOM):
    sources = np.zeros((3, 16), np.int32)
    for row, source in enumerate(SOURCES):
        sources[row, : len(source)] = source
    targets = np.random.default_rng(0).integers(3, VOCAB, (3, width)).astype(np.int32)
    real = np.arange(width) < np.asarray(lengths)[:, None]
    return {
        "source": jnp.asarray(sources),
        "source_lengths": jnp.asarray([len(source) for source in SOURCES]),
        "targets": jnp.asarray(np.where(real, targets, 0)),
        "weights": jnp.asarray(real, jnp.float32),
        "record": jnp.asarray([0, 500, 2000]),
    }


# Generators are kept: a program is compiled for each.
@functools.cache
def generator(which: str) -> Generator:
    model, own = tiny_encoder_decoder()
    if which == "plain":
        return Generator(model, own, ends=(EOS,))
    fields = dict(proposer=drafter(), proposer_params=params(), ends=(EOS,))
    if which == "one":
        fields["proposer"] = drafter(block=1)
    if which == "anything":
        fields["verifier"] = TopBeta(beta=VOCAB, gap=float("inf"))
    return Generator(model, own, **fields)


def tokens(which: str, **options):
    result = generator(which).generate(SOURCES, **{"max_new_tokens": 18, **options})
    return [sample.tokens for sample in result.samples], result.stats


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8)], ids=["greedy", "sampled"])
def test_output_is_the_targets_own(sampling):
    """Drafts are a function of the context, so that the tokens of sampling are those of plain sampling too."""
    expected, _ = tokens("plain", sampling=sampling, seed=4)
    found, stats = tokens("gad", sampling=sampling, seed=4)
    assert found == expected and stats.drafted > 0
    assert len({token for row in expected for token in row}) > 8


def test_a_block_of_one_gives_at_most_two_tokens_a_call():
    expected, _ = tokens("plain")
    found, stats = tokens("one")
    assert found == expected and len(stats.gained) == 2


def test_a_row_does_not_depend_on_the_batch():
    together, _ = tokens("gad")
    moved = generator("gad").generate([SOURCES[i] for i in (2, 0, 1)], max_new_tokens=18)
    assert [sample.tokens for sample in moved.samples] == [together[i] for i in (2, 0, 1)]


@jax.jit
def _init(given, found):
    root = jnp.zeros((3,), jnp.int32)
    prompt = Prompt(found["source"], found["source_lengths"], None, root, ROOM)
    return drafter().init(given, target(), prompt)


def read(tokens_: list[list[int]], count: list[int], given=None):
    """The drafter's state with these outputs behind the start token, for every source."""
    state = _init(params() if given is None else given, batch())
    rows = jnp.asarray([[1, *row] + [0] * (state.tokens.shape[1] - 1 - len(row)) for row in tokens_])
    return state.replace(tokens=rows, count=jnp.asarray(count))


@jax.jit
def _fill(given, state):
    return drafter().fill(given, state)


def test_masks_hide_what_is_behind_them_and_see_all_before():
    outputs = [[4, 9, 12, 30], [8, 8, 3, 5], [7, 6, 20, 22]]
    state = read(outputs, [5, 5, 5])
    drafted = _fill(params(), state)
    noise = jnp.where(jnp.arange(state.tokens.shape[1]) < 5, state.tokens, 11)
    np.testing.assert_array_equal(_fill(params(), state.replace(tokens=noise)), drafted)

    # Hidden states instead of tokens, which a small change does not move, and attention that is not sharp.
    state = read(outputs, [5, 5, 5], created())

    def hidden(tokens):
        seen = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < 9, (3, tokens.shape[1], tokens.shape[1]))
        variables = {"params": created()}
        return drafter().model.apply(variables, tokens, state.memory, seen, method="extend")[1]

    masked = jnp.where(jnp.arange(state.tokens.shape[1]) < 5, state.tokens, VOCAB)
    run = jax.jit(hidden)
    before = run(masked)
    for place in range(5):  # every token of the prefix, the start token included, moves every mask
        after = run(masked.at[:, place].add(1))
        assert np.all(np.any(np.asarray(after != before)[:, 5:9], axis=-1))
    beyond = run(masked.at[:, 9:].set(3))
    np.testing.assert_array_equal(beyond[:, :9], before[:, :9])


def test_the_draft_is_the_block_and_ends_with_the_end():
    state = read([[4, 9], [8, 8], [7, 6]], [3, 3, 3])
    drafted = np.asarray(_fill(params(), state))
    assert drafted.shape == (3, BLOCK) and drafted.max() < VOCAB  # the mask itself is never named
    ends = int(drafted[0, 1])
    round_ = engines.Round(jnp.asarray([9, 8, 6]), None, None, None)
    propose = jax.jit(lambda state: drafter(eos=ends).propose(params(), target(), state, round_)[0])
    draft = propose(state)
    np.testing.assert_array_equal(draft.tokens[:, 1:], drafted)
    first = [row.tolist().index(ends) + 1 if ends in row else BLOCK for row in drafted]
    assert first[0] <= 2
    assert draft.tree.real.sum(1).tolist() == [1 + count for count in first]


def test_training_sees_the_places_that_drafting_fills():
    """With r tokens given, the predictions of training are those of `fill` behind the same r tokens."""
    found = batch()
    given = cut(jax.random.split(jax.random.key(0), 3)[0], jnp.asarray([6, 3, 9]))  # evaluation's own key
    rows = np.asarray(found["targets"])
    state = read([row[:count].tolist() for row, count in zip(rows, given, strict=True)], (given + 1).tolist())
    drafted = _fill(params(), state)
    places = given[:, None] + np.arange(BLOCK)
    labelled = places < np.asarray([[6], [3], [9]])
    labels = np.take_along_axis(rows, np.minimum(places, ROOM - 1), axis=1)
    expected = np.sum((np.asarray(drafted) == labels) & labelled), np.sum(labelled)
    # One label is made right, so that there is something to count.
    rows = rows.copy()
    rows[2, int(given[2])] = drafted[2, 0]
    found["targets"] = jnp.asarray(rows)
    metrics = jax.jit(lambda b: drafter(distilled=False).loss(params(), Teacher(target(), b), b, None))(found)
    right = int(expected[0]) + int(labels[2, 0] != drafted[2, 0])
    assert (int(metrics["accuracy"][0]), int(metrics["accuracy"][1])) == (right, int(expected[1])) and right
    assert metrics["loss"][1] == expected[1]


def test_cut_by_hand():
    """L = 5, u = 0, .2, .999: floor(u L) = 0, 1, 4, so r = 4, 3, 0. Every r from 0 to L - 1 occurs."""
    found = np.asarray(cut(jax.random.key(0), jnp.full((4000,), 5)))
    assert sorted(set(found.tolist())) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(np.bincount(found) / 4000, 0.2, atol=0.03)
    assert cut(jax.random.key(0), jnp.asarray([0])).tolist() == [0]  # a row of padding


@pytest.mark.parametrize(
    "ratio, counts", [(0.5, [2, 0, 1]), (0.3, [1, 0, 0]), (1.0, [5, 1, 2]), (0.0, [0, 0, 0])]
)
def test_as_many_are_shown_as_the_paper_says(ratio, counts):
    """Wrong are 5, 1 and 2 of the labelled places: floor(.5 * 5) = 2, floor(.5 * 1) = 0, floor(.5 * 2) = 1."""
    labels = jnp.asarray([[1] * 6, [2] * 6, [3] * 6])
    guesses = jnp.asarray([[0, 0, 0, 0, 0, 1], [2, 2, 0, 2, 2, 2], [0, 0, 3, 0, 0, 0]])
    labelled = jnp.asarray([[True] * 6, [True] * 6, [True] * 3 + [False] * 3])
    run = jax.jit(lambda key: glance(jax.nn.one_hot(guesses, 4), labels, labelled, jnp.full(3, ratio), key))
    shown = [np.asarray(run(jax.random.key(seed))) for seed in range(20)]
    assert all(s.sum(1).tolist() == counts and not np.any(s & ~np.asarray(labelled)) for s in shown)
    if 0 < ratio < 1:
        assert len({s.tobytes() for s in shown}) > 1  # at random, also among the right ones
        assert any(s[0, 5] for s in shown)


def test_loss_is_on_what_stays_masked():
    """A label that is shown changes no loss but through its place in the input; the weight counts the rest."""
    found, learner = batch(), drafter(distilled=False, records=1000, label_smoothing=0.0)
    key = jax.random.key(7)
    metrics = jax.jit(lambda b, k: learner.loss(params(), Teacher(target(), b), b, k))(found, key)
    cut_key, glance_key, _ = jax.random.split(key, 3)
    given = np.asarray(cut(cut_key, jnp.asarray([6, 3, 9])))
    labelled = np.minimum(np.asarray([6, 3, 9]) - given, BLOCK)
    # 500 of 1000 records: .5 - .5 * .2 = .4; beyond them .3.
    np.testing.assert_allclose(learner.ratio(found["record"]), [0.5, 0.4, 0.3], rtol=1e-6)
    state = read(
        [row[:count].tolist() for row, count in zip(np.asarray(found["targets"]), given, strict=True)],
        (given + 1).tolist(),
    )
    drafted = np.asarray(_fill(params(), state))
    wrong = [
        int(
            np.sum(
                drafted[row, : labelled[row]]
                != np.asarray(found["targets"])[row, given[row] :][: labelled[row]]
            )
        )
        for row in range(3)
    ]
    shown = [int(np.floor(ratio * count + 1e-6)) for ratio, count in zip((0.5, 0.4, 0.3), wrong, strict=True)]
    assert sum(shown) > 0
    assert metrics["loss"][1] == labelled.sum() - sum(shown)
    assert metrics["accuracy"][1] == labelled.sum()


def test_targets_are_the_teachers_own_output():
    found = batch()
    found["source_lengths"] = found["source_lengths"].at[1].set(0)  # a row of padding
    made, weights = jax.jit(lambda b: distil(target(), b, EOS))(found)
    expected, _ = tokens("plain", max_new_tokens=ROOM)
    for row in (0, 2):
        count = int(weights[row].sum())
        assert made[row, :count].tolist()[: len(expected[row])] == expected[row]
        assert count == min(len(expected[row]) + 1, ROOM)
    assert weights[1].sum() == 0


def test_it_starts_from_the_targets_encoder():
    made = created()
    jax.tree.map(np.testing.assert_array_equal, made["encoder"], target().params["encoder"])
    np.testing.assert_array_equal(made["embedding"]["table"][:-1], target().params["embedding"]["table"])
    with pytest.raises(UserError, match="vocab_size=38"):
        jax.eval_shape(GAD(network(VOCAB, Full())).create, jax.random.key(0), target())
    bare = Target({k: v for k, v in target().params.items() if k != "encoder"}, target().model)
    with pytest.raises(UserError, match="the target has no encoder"):
        jax.eval_shape(drafter().create, jax.random.key(0), bare)


def test_top_beta_by_hand():
    """After the root: logits 4 3 2 0, so 1 is second, 1 nat below; after node 1: 5 5 1 1, a tie."""
    logits = jnp.asarray([[[4.0, 3.0, 2.0, 0.0], [5.0, 5.0, 1.0, 1.0], [0.0, 0.0, 0.0, 9.0]]])

    def run(tokens, **fields):
        accept = TopBeta(**fields)(logits, Draft(jnp.asarray([tokens]), chain(3)))
        return int(accept.count[0]), int(accept.token[0])

    assert run([0, 1, 1], beta=2, gap=3.0) == (3, 3)  # both second; then the most probable, 3
    assert run([0, 1, 1], beta=2, gap=0.5) == (1, 0)  # 1 nat is too far
    assert run([0, 2, 1], beta=2, gap=3.0) == (1, 0)  # third
    assert run([0, 0, 1], beta=1, gap=3.0) == (2, 0)  # of a tie the first alone is best: as Greedy
    assert run([0, 0, 0], beta=1, gap=3.0) == (3, 3)
    assert run([0, 3, 2], beta=4, gap=float("inf")) == (3, 3)
    with pytest.raises(UserError, match="beta=0"):
        TopBeta(beta=0)


def test_beta_of_one_is_greedy():
    values = jax.random.randint(jax.random.key(0), (200, 5, 6), 0, 3).astype(jnp.float32)  # with many ties
    drafted = jnp.where(
        jax.random.uniform(jax.random.key(1), (200, 5)) < 0.8, jnp.roll(argmax(values), 1, 1), 0
    )
    draft = Draft(drafted, chain(5))
    expected, found = jax.jit(lambda x: (Greedy()(x, draft), TopBeta(1, float("inf"))(x, draft)))(values)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert len(set(expected.count.tolist())) > 2


def test_with_no_limit_blocks_are_the_drafters():
    """beta = V and an infinite gap: k tokens of the drafter, one of the target, k of the drafter, ..."""
    found, stats = tokens("anything", max_new_tokens=1 + 2 * (BLOCK + 1))
    lengths = {len(row) for row in found}
    assert stats.wasted == 0 or lengths != {11}
    checked = 0
    for row, output in enumerate(found):
        if len(output) < 11:
            continue
        for at in (1, 1 + BLOCK + 1):
            rows = [[0] * 11] * 3
            rows[row] = output[:at]
            state = read(rows, [at + 1] * 3)
            assert _fill(params(), state)[row].tolist() == output[at : at + BLOCK]
            checked += 1
    assert checked


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(block=0), "GAD.block: 0"),
        (dict(records=0), "GAD.records: 0"),
        (dict(label_smoothing=1.0), "not in"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        drafter(**fields)
