"""PEARL: exact output, its modes, its closed form, its clock, its ablations, and two devices at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding import engine as engines
from research.decoding.generator import Generator
from research.decoding.proposers import Round, Target
from research.decoding.sampling import Sampling, gumbel
from research.decoding.speculative.draft_model import DraftModel
from research.decoding.speculative.pearl import Pearl, PreVerify, concurrent, expected_tokens, pre_share
from research.decoding.verify import Accept, Greedy, Sampled, Typical
from research.errors import UserError

from .laws import MIXED, TABLE, VOCAB, Markov, distance, run
from .test_draft_model import PROMPTS, decoder, init, noisy

MODES = {"pearl": {}, "no pre-verify": {"pre_verify": False}, "no post-verify": {"post_verify": False}}


@dataclasses.dataclass(frozen=True)
class AnyBonus:
    """Broken: the block is taken over although its first token was not tested, and counts as the bonus."""

    def __call__(self, logits, draft, keys):
        accept = Sampled()(logits, draft, keys)
        if draft.tree.size == 1:
            return accept
        whole = accept.count == jnp.sum(draft.tree.real, axis=-1)
        return accept.replace(token=jnp.where(whole, draft.ahead.tokens[:, 0], accept.token))


@dataclasses.dataclass(frozen=True)
class NoResidual:
    """Broken: the token that replaces a rejected one is drawn from p, not from norm(max(p - q, 0))."""

    def __call__(self, logits, draft, keys):
        accept = PreVerify()(logits, draft, keys)
        if draft.tree.size == 1:
            return accept
        end = jnp.take_along_axis(logits, (accept.count - 1)[:, None, None], axis=1)[:, 0]
        other = jnp.argmax(end + gumbel(keys[:, 0], VOCAB), axis=-1)
        whole = accept.count == jnp.sum(draft.tree.real, axis=-1)
        kept = whole & (accept.token == draft.ahead.tokens[:, 0])
        return Accept(accept.path, accept.count, jnp.where(kept, accept.token, other))


@pytest.mark.parametrize("mode", MODES)
def test_sampling_keeps_the_law(mode):
    state = run(Pearl(Markov(MIXED), 2, **MODES[mode]), (), PreVerify())
    assert distance(state) < 0.03
    assert np.all(np.asarray(state.proposer.rounds).sum(0) > 0)


def test_any_exact_verifier_keeps_the_law():
    """`Sampled` draws a bonus token, and the block goes on where it happens to be y_1."""
    assert distance(run(Pearl(Markov(MIXED), 2), (), Sampled())) < 0.03


@pytest.mark.parametrize("broken", [AnyBonus(), NoResidual()])
def test_broken_rules_are_found(broken):
    assert distance(run(Pearl(Markov(MIXED), 2), (), broken)) > 0.08


def test_a_draft_that_is_the_target_never_pauses():
    """11 tokens: 1 by prefill, 1 by the first round, in PRE, then gamma = 3 a round, in POST."""
    state = run(Pearl(Markov(TABLE), 3), (), PreVerify(), length=11, rows=50)
    assert state.proposer.rounds.tolist() == [[1, 3]] * 50
    assert state.histogram.tolist() == [[1, 0, 3]] * 50


def test_disjoint_drafts_stay_in_pre():
    """p lives on tokens 0 and 1, q on 2 and 3: one token a round."""
    low = np.float32([[0.5, 0.5, 0.0, 0.0]] * VOCAB)
    state = run(Pearl(Markov(low[:, ::-1]), 3), (), PreVerify(), target=Markov(low), length=5, rows=50)
    assert state.proposer.rounds.tolist() == [[4, 0]] * 50
    assert state.histogram.tolist() == [[4, 0, 0]] * 50


# Independent acceptance: p and q do not depend on the context. sum min(p, q) = .5 + .3 = .8.
P = jnp.asarray([[0.5, 0.5, 0.0, 0.0]] * VOCAB)
Q = jnp.asarray([[0.5, 0.3, 0.2, 0.0]] * VOCAB)
LONG, MANY = 201, 200


def rounds(proposer, verifier=PreVerify()):  # noqa: B008
    state = run(proposer, (), verifier, target=Markov(P), length=LONG, rows=MANY)
    return np.asarray(state.proposer.rounds).sum(0)


def test_closed_form():
    """alpha = .8, gamma = 5: 1 - alpha^5 = .67232 and (1 - .8)(1 + .8 - .32768) = .294464, so 2.2832 tokens a
    round, and .67232 / 1.47232 = .45664 of the rounds in PRE."""
    assert expected_tokens(0.8, 5) == pytest.approx(2.2832, abs=5e-5)
    assert pre_share(0.8, 5) == pytest.approx(0.45664, abs=5e-6)
    pre, post = rounds(Pearl(Markov(Q), 5))
    # 40 000 tokens in 17 500 rounds, of standard deviation below 2: 0.7 %; the last round of a row is cut: 0.5 %.
    assert MANY * (LONG - 1) / (pre + post) == pytest.approx(2.2832, rel=0.02)
    assert pre / (pre + post) == pytest.approx(0.45664, abs=0.012)


@pytest.mark.parametrize("mode", ["no pre-verify", "no post-verify"])
def test_ablations_by_their_closed_forms(mode):
    """alpha = .8, gamma = 5; E = (1 - alpha^5) / (1 - alpha) = 3.3616 tokens of a round that tests 5.

    Without pre-verify every round tests 5, and is in PRE after a rejection, 1 - alpha^5 = .67232 of the time.
    Without post-verify a round in PRE gives 1 token, and with probability .8 is followed by one in POST, which
    tests 4 and has a bonus: (1 - alpha^5) / (1 - alpha) = 3.3616 again. (1 + .8 * 3.3616) / 1.8 = 2.0496."""
    pre, post = rounds(Pearl(Markov(Q), 5, **MODES[mode]))
    found = MANY * (LONG - 1) / (pre + post), pre / (pre + post)
    expected = (3.3616, 0.67232) if mode == "no pre-verify" else (2.0496, 1 / 1.8)
    assert found == pytest.approx(expected, rel=0.03)


def test_clock_by_hand():
    """gamma t_draft = 4, t_target = 5; 2 rounds in PRE and 3 in POST."""
    model = Markov(Q)
    times = {mode: Pearl(model, 4, **MODES[mode]).seconds((2, 3), 1.0, 5.0) for mode in MODES}
    assert times == {"pearl": 25.0, "no pre-verify": 2 * (4 + 5) + 3 * 5, "no post-verify": 2 * 5 + 3 * 5}
    assert Pearl(model, 4).seconds((2, 3), 2.0, 5.0) == 5 * 8.0  # the draft is the slower
    assert Pearl(model, 4, post_verify=False).seconds((2, 3), 2.0, 5.0) == 2 * 8.0 + 3 * 5.0


# A real draft: a decoder and the same with noise.


@functools.cache
def models():
    model = decoder()
    return model, init(model), noisy(model, 0.1)


@functools.cache
def plainly(max_new_tokens):
    """What plain decoding says."""
    model, params, _ = models()
    return Generator(model, params).generate(PROMPTS, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_output_is_that_of_plain_decoding(mode):
    model, params, noise = models()
    proposer = Pearl(model, 3, **MODES[mode])
    result = Generator(model, params, proposer=proposer, proposer_params=noise).generate(
        PROMPTS, max_new_tokens=30
    )
    assert [s.tokens for s in result.samples] == [s.tokens for s in plainly(30).samples]
    assert all(result.stats.gained)


def test_what_is_pending_and_what_the_caches_hold():
    """Round by round: the target's cache holds all verified tokens but the newest, the draft's the text but for
    its last token, and in POST the text goes on with gamma - 1 tokens, those that the draft model gives."""
    model, params, noise = models()
    proposer = Pearl(model, 3)
    engine = engines.Engine(model, proposer, Greedy(), capacity=64)
    weights, ends = engines.Weights(params, noise, ()), np.zeros((0,), np.int32)
    tokens = np.asarray([row + [0] * (6 - len(row)) for row in PROMPTS])
    lengths, limit = np.asarray([3, 1, 6]), np.full((3,), 30)
    state = jax.jit(engine.prefill)(
        weights, tokens, lengths, limit, engines.row_keys(0, np.arange(3), 1), ends
    )
    step = jax.jit(engine.decode)
    forward = jax.jit(lambda text: jnp.argmax(model.apply({"params": noise}, text), -1))
    seen = set()
    while not np.all(state.done):
        state = step(weights, state, np.zeros((3,), bool), np.int32(1), ends)
        host = jax.device_get(state.replace(keys=None))
        for row in range(3):
            if host.done[row]:
                continue
            output = host.tokens[row, : host.count[row]].tolist()
            post = bool(host.proposer.post[row])
            assert int(host.cache.length[row]) == lengths[row] + len(output) - 1
            text = PROMPTS[row] + output + (host.proposer.pending.tokens[row].tolist() if post else [])
            # Rows beyond what is kept are written before the next round, which first cuts them off.
            assert int(host.proposer.cache.length[row]) >= len(text) - 1
            if post:
                choices = forward(np.asarray([text + [0] * (48 - len(text))])).tolist()[0]
                assert text[-2:] == choices[len(text) - 3 : len(text) - 1]
            seen.add(post)
    assert seen == {False, True}


def test_a_round_makes_gamma_forwards():
    seen = []

    class Counting(Markov):
        def apply(self, variables, tokens, *args, method):
            seen.append((method, tokens.shape[1]))
            return super().apply(variables, tokens, *args, method=method)

    proposer = Pearl(Counting(MIXED), 3)
    engine = engines.Engine(Markov(TABLE), proposer, PreVerify(), capacity=16)

    def a_round():
        zero, ends = jnp.zeros((1,), jnp.int32), jnp.zeros((0,), jnp.int32)
        keys, weights = engines.row_keys(0, zero, 1), engines.Weights((), (), ())
        state = engine.prefill(weights, zero[:, None], zero + 1, zero + 9, keys, ends)
        warp = lambda logits, tokens, tree: logits  # noqa: E731
        round_ = Round(state.root, zero + 1, keys, warp)
        return proposer.propose((), Target((), engine.model), state.proposer, round_)[0].tokens

    with jax.disable_jit():  # loops are unrolled, and every forward is traced
        jax.eval_shape(a_round)
    assert seen == [("prefill", 1), ("extend", 1), ("extend", 1), ("extend", 1)]


def test_without_post_verify_it_is_plain_speculation_in_more_calls():
    """Greedy: the first token of a chain of gamma is tested a call earlier than the others. Every chain that
    plain speculation tests in one call takes one where its first token fails, and two where it does not."""
    model, params, noise = models()
    plain = Generator(model, params, proposer=DraftModel(model, 3), proposer_params=noise)
    early = Generator(model, params, proposer=Pearl(model, 3, post_verify=False), proposer_params=noise)
    gained = plain.generate(PROMPTS, max_new_tokens=31).stats.gained
    found = early.generate(PROMPTS, max_new_tokens=31).stats.gained
    assert all(gained) and sum(found) == gained[0] + 2 * sum(gained[1:])


# Two devices


@pytest.mark.parametrize(
    "verifier, sampling", [(Greedy(), Sampling()), (PreVerify(), Sampling(0.9, top_p=0.95))]
)
def test_two_devices_give_the_same_tokens(verifier, sampling):
    model, params, noise = models()
    engine = engines.Engine(model, Pearl(model, 3), verifier, capacity=64)
    weights = engines.Weights(params, noise, sampling.chain(model.vocab_size))
    tokens = np.asarray([row + [0] * (6 - len(row)) for row in PROMPTS])
    lengths, limit, ends = np.asarray([3, 1, 6]), np.asarray([30, 25, 20]), np.asarray([31])
    keys = engines.row_keys(3, np.arange(3), 1)
    start = jax.jit(engine.prefill)(weights, tokens, lengths, limit, keys, ends)
    rest = np.zeros((3,), bool), np.int32(100), ends
    alone = jax.jit(engine.decode)(weights, start, *rest)
    together = concurrent(engine, jax.devices()[:2])(weights, start, *rest)
    assert np.asarray(alone.done).all() and np.asarray(alone.proposer.rounds).sum(0).all()
    for name in ("tokens", "count", "histogram", "root", "drafted"):
        np.testing.assert_array_equal(getattr(together, name), getattr(alone, name))
    np.testing.assert_array_equal(together.proposer.rounds, alone.proposer.rounds)
    # Both caches are those of the models that own them.
    for mine, its in ((alone.cache, together.cache), (alone.proposer.cache, together.proposer.cache)):
        np.testing.assert_array_equal(its.length, mine.length)
        theirs, ours = (np.asarray(cache.layers[1].key) for cache in (its, mine))
        for row, length in enumerate(mine.length.tolist()):
            np.testing.assert_allclose(theirs[row, :, :length], ours[row, :, :length], rtol=1e-5, atol=1e-5)


def test_each_device_runs_one_of_the_models():
    """The exchange is the only collective of the loop, and the forwards are in branches."""
    engine = engines.Engine(Markov(TABLE), Pearl(Markov(MIXED), 3), PreVerify(), capacity=16)
    one, ends = np.ones((1,), np.int32), np.zeros((0,), np.int32)
    keys, weights = engines.row_keys(0, one, 1), engines.Weights((), (), ())
    start = jax.eval_shape(engine.prefill, weights, one[:, None], one, 9 * one, keys, ends)
    decode = concurrent(engine, jax.devices()[:2])
    text = str(jax.make_jaxpr(decode)(weights, start, one < 0, np.int32(9), ends))
    assert text.count("psum") == 1 and text.count("axis_index[") == 2 and text.count("cond[") >= 2


# Mistakes


@pytest.mark.parametrize(
    "make, because",
    [
        (lambda: Pearl(decoder(), 1), "gamma must be at least 2, not 1"),
        (lambda: Pearl(decoder(), 3, False, False), "is plain speculation: use DraftModel"),
        (lambda: two(DraftModel(decoder())), "needs a Pearl with pre_verify and post_verify"),
        (lambda: two(Pearl(decoder(), 3, pre_verify=False)), "needs a Pearl with pre_verify and post_verify"),
        (lambda: two(Pearl(decoder(), 3), Typical()), "needs Greedy or PreVerify, not Typical"),
        (lambda: two(Pearl(decoder(), 3), devices=jax.devices()[:1]), "needs 2 devices, not 1"),
    ],
)
def test_mistakes_are_told(make, because):
    with pytest.raises(UserError) as error:
        make()
    assert because in str(error.value) and "\n" not in str(error.value)


def two(proposer, verifier=Greedy(), devices=None):  # noqa: B008
    engine = engines.Engine(decoder(), proposer, verifier, capacity=64)
    return concurrent(engine, jax.devices()[:2] if devices is None else devices)
