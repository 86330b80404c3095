"""SJD on targets whose laws are known: the law of the output with broken rules beside, then the paper's properties."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.guidance.classifier_free import Guided
from research.decoding.proposers import Round, Target
from research.decoding.sampling import EXCLUDED, Sampling
from research.decoding.speculative.sjd import SJD, Window
from research.decoding.verify import Greedy, Sampled
from research.errors import UserError

from ..recalling import Recalling, calls, run

VOCAB, LENGTH, ROWS, START = 4, 4, 40_000, 0


@jax.jit
def drawn():
    """A chain's table; logits under two conditions."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    return jax.nn.softmax(1.2 * normal(3, VOCAB, VOCAB)), 1.5 * normal(5, 2, 6, VOCAB)


TABLE, LOGITS = drawn()
MARKOV = Recalling(lambda first, total, last: jnp.log(TABLE)[last], VOCAB)


def sjd(proposer=SJD, **fields):
    return proposer(**{"codes": VOCAB, "rows": 2, "columns": 2, "window": 3} | fields)


def distance(tokens, table=TABLE, start=START):
    """Total variation between outputs [ROWS, LENGTH] and the law of plain sampling from a Markov chain."""
    table, strings = np.asarray(table, np.float64), itertools.product(range(VOCAB), repeat=LENGTH)
    law = [np.prod([table[a, b] for a, b in zip((start, *s[:-1]), s, strict=True)]) for s in strings]
    numbers = tokens @ VOCAB ** np.arange(LENGTH - 1, -1, -1)
    return 0.5 * np.abs(np.bincount(numbers, minlength=VOCAB**LENGTH) / ROWS - law).sum()


def law_distance(proposer, **options):
    return distance(run(MARKOV, proposer, Sampled(), rows=ROWS, length=LENGTH, start=START, **options)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"window": 1},
        {"window": 5, "init_rule": "repeat_horizontal"},
        {"init_rule": "repeat_vertical"},
        {"init_rule": "sample_horizontal"},
        {"init_rule": "sample_vertical"},
        {"rows": 1, "header": 1},
    ],
    ids=str,
)
def test_sampling_keeps_the_law(fields):
    # 256 outcomes and 40 000 draws: about 0.02 is what exact sampling gives.
    assert law_distance(sjd(**fields)) < 0.03


@dataclasses.dataclass(frozen=True)
class OldTokens(SJD):
    """Broken: a token that was not tested stays, and only what it counts as drawn from is new."""

    def init(self, params, target, prompt):
        batch = prompt.root.shape[0]
        none = jnp.zeros((batch, self.window), jnp.int32), jnp.zeros((batch,), jnp.int32)
        return super().init(params, target, prompt), *none

    def propose(self, params, target, state, round):
        window, old, kept = state
        draft, window = super().propose(params, target, window, round)
        tokens = jnp.where(jnp.arange(self.window) < kept[:, None], old, draft.tokens[:, 1:])
        return draft.replace(tokens=draft.tokens.at[:, 1:].set(tokens)), (window, old, kept)

    def observe(self, params, target, state, outcome):
        count = outcome.accept.count
        place = jnp.minimum(count[:, None] + jnp.arange(self.window), self.window - 1)
        old = jnp.take_along_axis(outcome.draft.tokens[:, 1:], place, axis=1)
        return super().observe(params, target, state[0], outcome), old, self.window - count


@dataclasses.dataclass(frozen=True)
class RawRows(SJD):
    """Broken: tests tokens drawn from logits / 4 as if they were drawn from the logits."""

    def propose(self, params, target, state, round):
        draft, state = super().propose(params, target, state, round)
        return draft.replace(q=4 * draft.q), state


def test_an_old_token_with_a_new_distribution_is_found():
    assert law_distance(sjd(OldTokens)) > 0.08


def test_unprocessed_rows_are_found():
    processors = Sampling(temperature=4.0).chain(VOCAB)
    flatter = np.asarray(TABLE) ** 0.25
    flatter /= flatter.sum(axis=1, keepdims=True)
    options = dict(rows=ROWS, length=LENGTH, start=START, processors=processors)
    assert distance(run(MARKOV, sjd(), Sampled(), **options)[0], flatter) < 0.03
    assert distance(run(MARKOV, sjd(RawRows), Sampled(), **options)[0], flatter) > 0.08


# Tokens 0..3 are codes, 4 is a condition and 5 its absence. The law of a code depends on which of the two came first.
CONDITION, NONE = 4, 5
CONDITIONED = Recalling(
    lambda first, total, last: jnp.pad(
        LOGITS[jnp.clip(first - CONDITION, 0, 1), last],
        ((0, 0), (0, 0), (0, 2)),
        constant_values=EXCLUDED,
    ),
    6,
)


def test_guidance_and_top_k_act_alike_on_drafts_and_target():
    model = Guided(CONDITIONED, (CONDITION, NONE), NONE)
    with_condition, without = np.asarray(LOGITS, np.float64)[:, [0, 1, 2, 3, CONDITION]]
    first = np.asarray(LOGITS, np.float64)[1, NONE]
    without[4] = first  # the first code follows another token there: 5 instead of 4
    logits = 2.0 * (with_condition - without) + without
    logits[logits < np.sort(logits, axis=1)[:, [1]]] = -np.inf  # the best 3 of 4
    table = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    tokens, _ = run(
        model,
        sjd(),
        Sampled(),
        rows=ROWS,
        length=LENGTH,
        start=CONDITION,
        processors=Sampling(temperature=1.0, top_k=3).chain(6),
        params={"model": (), "scale": np.float32(2.0)},
    )
    assert distance(tokens, table, CONDITION) < 0.03
    # The unguided table is another one: the test can tell.
    plain = np.exp(with_condition) / np.exp(with_condition).sum(axis=1, keepdims=True)
    assert distance(tokens, plain, CONDITION) > 0.08


def test_without_context_every_drawn_token_is_kept():
    """Where p ignores what came before, it equals the q of every token drawn after a first look."""
    model = Recalling(
        lambda first, total, last: jnp.broadcast_to(jnp.log(TABLE[1]), (*last.shape, VOCAB)), VOCAB
    )
    proposer = sjd(rows=5, columns=4, window=4)
    done = calls(model, proposer, Sampled(), rows=100, length=20, start=START)[1]
    place = np.ones(100, int)
    for call in done:
        drawn = np.minimum(4 - np.asarray(call.before.guesses), 20 - 1 - place)  # and inside the image
        assert np.all((call.gained >= drawn + 1) | (place == 20))
        place += call.gained
    gained = np.stack([call.gained for call in done])
    assert np.any(gained[1:] == 5) and len(done) < 15


def jacobi(rule, image, columns, window, length):
    """Greedy Jacobi decoding of a deterministic model, as the paper tells it: (tokens, gained in every call).

    rule(prefix) -> next token. A guess is the token at the left or above (`image` says which), followed back to one
    that is known, and 0 in the first column or row, or always (`random` with one code).
    """
    out = [rule([0])]
    refreshed, history = {}, []
    while len(out) < length:
        start = len(out)
        known = {**dict(enumerate(out)), **refreshed}
        drafts = []
        for place in range(start, start + window):
            if place in refreshed:
                drafts.append(refreshed[place])
            elif image == "horizontal" and place % columns:
                drafts.append(known[max(known)])
            elif image == "vertical" and place >= columns:
                above = place - columns
                while above >= start and above not in known:
                    above -= columns
                drafts.append(known.get(above, 0))
            else:
                drafts.append(0)
        scored = [rule([0, *out, *drafts[:j]]) for j in range(window + 1)]
        kept = 0
        while kept < window and start + kept < length and drafts[kept] == scored[kept]:
            kept += 1
        refreshed = {start + j: scored[j] for j in range(kept + 1, window + 1)}
        new = [*drafts[:kept], scored[kept]][: length - start]
        out += new
        history.append(len(new))
    return out, history


@pytest.mark.parametrize(
    "rule", ["random", "repeat_horizontal", "sample_horizontal", "repeat_vertical", "sample_vertical"]
)
@pytest.mark.parametrize("window, columns", [(3, 4), (6, 4)])
def test_greedy_is_jacobi_decoding(rule, window, columns):
    """Token by token and call by call. The model repeats, climbs and jumps, depending on all tokens so far."""

    def following(total, last):
        return np.where(total % 7 < 4, last, (3 * last + total) % 8)

    table = following(np.arange(400)[:, None], np.arange(8)[None])
    model = Recalling(
        lambda first, total, last: jnp.where(
            jnp.arange(8) == jnp.asarray(table)[total, last][..., None], 0.0, -9.0
        ),
        8,
    )
    expected, history = jacobi(
        lambda prefix: int(following(sum(prefix) + 1, prefix[-1])),
        rule.partition("_")[2],
        columns,
        window,
        20,
    )
    proposer = SJD(codes=1, rows=5, columns=columns, window=window, init_rule=rule)
    tokens, done = calls(model, proposer, Greedy(), rows=1, length=20, start=0)
    assert tokens[0].tolist() == expected
    assert [int(call.gained[0]) for call in done] == history
    assert len(history) < 19  # fewer calls than tokens, so that windows have moved by more than one


def test_acceptance_is_the_overlap_of_p_and_q():
    """A drawn token is kept with probability sum min(p, q); drawing again and comparing keeps sum p q."""
    rows = 40_000

    @jax.jit
    def counts(p, q, seeds):
        state = Window(
            logits=jnp.broadcast_to(jnp.log(q), (rows, 1, VOCAB)),
            guesses=jnp.zeros((rows,), jnp.int32),
            recent=jnp.zeros((rows, 2), jnp.int32),
            past=jnp.zeros((rows, 0, VOCAB)),
            start=jnp.zeros((rows,), jnp.int32),
        )
        keys = jax.random.split(jax.random.key(seeds[0]), rows)
        round_ = Round(jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), jnp.int32), keys, None)
        draft, _ = sjd(window=1).propose((), Target((), MARKOV), state, round_)
        logits = jnp.broadcast_to(jnp.log(p), (rows, 2, VOCAB))
        tests = jax.random.split(jax.random.key(seeds[1]), (rows, 2))
        return [Sampled()(logits, offered, tests).count for offered in (draft, draft.replace(q=None))]

    p, q = np.asarray(TABLE)[[0, 2]]
    for count, expected in zip(
        counts(p, q, np.asarray([1, 2])), (np.minimum(p, q).sum(), (p * q).sum()), strict=True
    ):
        kept = np.mean(np.asarray(count) == 2)
        assert abs(kept - float(expected)) < 4 * 0.5 / np.sqrt(rows)  # four standard errors


def test_rows_do_not_depend_on_the_batch():
    proposer = sjd(rows=4, columns=3, init_rule="sample_vertical")
    batches = [run(MARKOV, proposer, Sampled(), rows=rows, length=12, start=START)[0] for rows in (1, 5)]
    np.testing.assert_array_equal(batches[0], batches[1][:1])
    assert len(np.unique(batches[1], axis=0)) > 1


def test_only_the_image_is_drafted():
    """A prompt of 5 tokens, a header of 2 and an image of 2 x 3: the image stands at positions 7 to 12."""
    proposer = SJD(codes=VOCAB, rows=2, columns=3, window=4, header=2)
    real = {
        5: [0, 0, 0, 0],  # the next token, 6, is of the header
        6: [1, 1, 1, 1],  # 7 to 10
        10: [1, 1, 0, 0],  # 11 and 12, then the end
        12: [0, 0, 0, 0],
    }

    @jax.jit
    def drafted(length):
        state = Window(
            logits=jnp.zeros((4, 4, VOCAB)),
            guesses=jnp.zeros((4,), jnp.int32),
            recent=jnp.zeros((4, 3), jnp.int32),
            past=jnp.zeros((4, 0, VOCAB)),
            start=jnp.full((4,), 5 + 2),
        )
        round_ = Round(jnp.zeros((4,), jnp.int32), length, jax.random.split(jax.random.key(0), 4), None)
        return proposer.propose((), Target((), MARKOV), state, round_)[0].tree.real

    found = np.asarray(drafted(np.asarray(list(real))))
    assert found.astype(int).tolist() == [[1, *flags] for flags in real.values()]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window": 0}, "SJD.window must be at least 1, not 0"),
        ({"header": -1}, "SJD.header must be at least 0, not -1"),
        ({"init_rule": "repeat_horizontl"}, "no rule 'repeat_horizontl'; did you mean repeat_horizontal?"),
    ],
)
def test_mistakes_are_told(fields, message):
    with pytest.raises(UserError, match=message):
        sjd(**fields)
