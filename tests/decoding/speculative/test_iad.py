"""Input-guided aggressive decoding: alignment by hand, calls counted on a scripted model, an encoder-decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding import engine as engines
from research.decoding.generator import Generator
from research.decoding.speculative.iad import IAD, align
from research.decoding.verify import Greedy
from research.errors import UserError
from research.nn.cache import Cache

from .tiny_encoder_decoder import SOURCES, tiny_encoder_decoder

BOS, EOS, VOCAB, SOURCE = 1, 2, 40, 16
LINE = [10, 11, 12, 13, 14, 15, 16, 17]  # all different
ABSENT = 30


# Suffixes of the output, newest last, in the source 5 6 7 5 6 8 9 5.
@pytest.mark.parametrize(
    "recent, place",
    [
        ([3, 3, 7], 3),  # 7 occurs once
        ([3, 3, 4], 8),  # 4 nowhere: the end
        ([3, 3, 6], 8),  # 6 occurs twice, 3 6 nowhere
        ([3, 5, 6], 8),  # 6 and 5 6 occur twice, 3 5 6 nowhere
        ([7, 5, 6], 5),  # 7 5 6 occurs once
        ([3, 9, 5], 8),  # 9 5 occurs once, at the end of the source
        ([3, 7, 5], 4),  # 5 thrice, 7 5 once
        ([-1, -1, 5], 8),  # nothing before the only token of the output
    ],
)
def test_alignment_by_hand(recent, place):
    source = jnp.asarray([[5, 6, 7, 5, 6, 8, 9, 5, 7, 4]])  # the last two are padding
    assert _align(source, jnp.asarray([8]), jnp.asarray([recent])).tolist() == [place]


_align = jax.jit(align)


def test_a_suffix_longer_than_three_is_not_looked_at():
    """Twice 5 6 7: the token before tells them apart, but the paper stops at three."""
    source = jnp.asarray([[8, 5, 6, 7, 9, 5, 6, 7, 3, 0]])
    assert _align(source, jnp.asarray([9]), jnp.asarray([[5, 6, 7]])).tolist() == [9]


class Start(Cache):
    """Counts the decoder's tokens: `prefill` gives the start token, whatever the length of the source."""

    def commit(self, fresh, path, count):
        return self.replace(length=self.length + (jnp.ones_like(count) if fresh == "start" else count))


class Scripted:
    """An encoder-decoder that says row b of its parameters int32[B, L], <eos> behind it, whatever it reads."""

    bos = BOS

    def init_cache(self, batch, capacity, dtype, margin):
        return Start((), jnp.zeros((batch,), jnp.int32))

    def apply(self, variables, tokens, *args, method):
        script = jnp.pad(variables["params"], ((0, 0), (0, SOURCE)), constant_values=EOS)
        if method == "prefill":
            logits = jax.nn.one_hot(script[:, 0], VOCAB)
            return logits, logits[:, None], "start"
        cache, _, depth = args
        place = cache.length[:, None] + jnp.broadcast_to(depth, tokens.shape)
        logits = jax.nn.one_hot(jnp.take_along_axis(script, place, axis=1), VOCAB)
        return logits, logits, ()


@functools.cache
def _run(window: int):
    engine = engines.Engine(Scripted(), IAD(window), Greedy(), capacity=64)

    def run(sources, lengths, script):
        rows = len(lengths)
        weights, ends = engines.Weights(script, (), ()), jnp.asarray([EOS])
        keys, limit = jax.random.split(jax.random.key(0), rows), jnp.full((rows,), 60)
        state = engine.prefill(weights, sources, lengths, limit, keys, ends)
        return engine.decode(weights, state, jnp.zeros((rows,), bool), jnp.int32(60), ends)

    return jax.jit(run)


def decode(pairs, window):
    """-> the output of every pair of source and target, and how many tokens each call after prefill gave it."""
    sources, script = np.full((len(pairs), SOURCE), 35), np.full((len(pairs), 32), EOS)
    for row, (source, target) in enumerate(pairs):
        sources[row, : len(source)] = source
        script[row, : len(target)] = target
    lengths = np.asarray([len(source) for source, _ in pairs])
    state = _run(window)(*(jnp.asarray(x, jnp.int32) for x in (sources, lengths, script)))
    outputs = [row[:count].tolist() for row, count in zip(np.asarray(state.tokens), state.count, strict=True)]
    return outputs, np.asarray(state.histogram)


# Calls after prefill, which itself is the beginning of the first parallel step.
CASES = {
    "the source": (LINE, LINE, 1),
    "a substitution": (LINE, [*LINE[:4], ABSENT, *LINE[5:]], 3),  # parallel, one ordinary step, parallel
    "the last token": (LINE, [*LINE[:-1], ABSENT], 2),  # parallel, and an ordinary step for the end
    "the first token": (LINE, [ABSENT, *LINE[1:]], 2),  # prefill ends the parallel step; ordinary, parallel
    "an insertion": (LINE, [*LINE[:4], ABSENT, *LINE[4:]], 3),
    "a deletion": (LINE, [*LINE[:3], *LINE[4:]], 2),  # the token after it is in the source: copied at once
    # .. 11 13 | behind 13 comes 12 and not 14 | behind 12 comes 14 and not 13 | 15 ..
    "two swapped": (LINE, [10, 11, 13, 12, *LINE[4:]], 4),
    "one token": ([10], [10], 1),
    "nothing": ([], [], 0),  # prefill says the end
    "nothing of it": (LINE, [30, 31, 32, 33], 4),  # one token a call, the end included
}


def test_calls_are_those_of_the_paper():
    outputs, gained = decode([([BOS, *source], target) for source, target, _ in CASES.values()], 15)
    for (name, (_, target, calls)), output, row in zip(CASES.items(), outputs, gained, strict=True):
        assert output == [*target, EOS], name
        assert row.sum() == calls, name
    counts = dict(zip(CASES, gained, strict=True))
    # Behind the first token, which prefill says, 7 are copied and the end is its own.
    assert counts["the source"].nonzero()[0].tolist() == [8 - 1]
    # 11 12 13 copied and ABSENT | 15 | 16 17 copied and the end.
    assert counts["a substitution"].nonzero()[0].tolist() == [1 - 1, 3 - 1, 4 - 1]


def test_the_source_needs_no_start_token():
    outputs, gained = decode([(LINE, LINE), (LINE, [*LINE[:4], ABSENT, *LINE[5:]])], 15)
    assert gained.sum(1).tolist() == [1, 3] and outputs[0] == [*LINE, EOS]


def test_a_window_shorter_than_the_source_goes_on():
    """10 | 11 12 13 copied, 14 its own | 15 16 17 copied, the end its own."""
    outputs, gained = decode([([BOS, *LINE], LINE)], 3)
    assert outputs == [[*LINE, EOS]] and gained[0].tolist() == [0, 0, 0, 2]
    # Going on needs no unique suffix: here none is.
    line = [10, 11, 10, 11, 10, 11, 10, 11]
    assert decode([([BOS, *line], line)], 3)[1][0].tolist() == [0, 0, 0, 2]


def test_an_encoder_decoder_says_what_it_says_without_drafts():
    model, params = tiny_encoder_decoder()
    plain = Generator(model, params).generate(SOURCES, max_new_tokens=18)
    expected = [sample.tokens for sample in plain.samples]
    fast = Generator(model, params, proposer=IAD(7))
    result = fast.generate(SOURCES, max_new_tokens=18)
    assert [sample.tokens for sample in result.samples] == expected and result.stats.drafted > 0
    assert len({token for row in expected for token in row}) > 8


def test_a_window_of_nothing_is_refused():
    with pytest.raises(UserError, match="IAD.window: 0"):
        IAD(0)
