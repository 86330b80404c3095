"""The engine with real models: exactness, independence of the batch, ends, stop strings, programs,
statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.tokenizer import Tokenizer
from research.decoding import engine as engines
from research.decoding.generator import Generator
from research.decoding.prepare import prepare
from research.decoding.sampling import Sampling
from research.decoding.text import RowText
from research.decoding.tree import static_tree
from research.decoding.verify import Draft, Greedy
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.cache import RingCache
from research.nn.masks import Window
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.panels import Panels
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from tests.programs import call, drawn

VOCAB, CONTEXT = 97, 48
PROMPTS = [[5, 9, 2], list(range(20, 41)), [7]]  # unequal lengths


def make_model(scan: bool = False, blocks: int = 1, **fields):
    attention = dict(num_heads=2, head_dim=8, rotary=Rotary(), **fields)
    logit_softcap = 20.0 if "softcap" in fields else None
    pattern = [Block(Attention(**attention), GatedMLP(24))]
    if blocks == 2:
        pattern.append(Block(Attention(**{**attention, "rule": Window(6)}), GatedMLP(24)))
    model = DecoderLM(
        blocks=tuple(pattern),
        num_layers=2,
        vocab_size=VOCAB,
        width=16,
        max_length=CONTEXT,
        scan_layers=scan,
        logit_softcap=logit_softcap,
        tied_head=logit_softcap is not None,
    )
    params = drawn(model, np.zeros((1, 1), np.int32), seed=1)
    larger = lambda x: jax.device_put(np.asarray(x) * np.float32(2.0))  # noqa: E731
    return model, jax.tree.map(larger, params)  # sharper logits: no near ties, outputs that vary


@pytest.fixture(scope="module")
def plain():
    return Generator(*make_model())


def without_cache(model, params, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by a full forward pass for every token."""
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        tokens[0, at] = np.argmax(np.asarray(call(model, params, tokens))[0, at - 1])
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


CASES = {
    "plain": dict(),
    "grouped, soft cap": dict(num_kv_heads=1, query_norm=RMSNorm(), key_norm=RMSNorm(), softcap=5.0),
    "window": dict(blocks=2),
    "scanned": dict(scan=True),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_decoding_without_cache(case):
    model, params = make_model(**CASES[case])
    generator = Generator(model, params)
    result = generator.generate(PROMPTS, max_new_tokens=20)
    for prompt, sample in zip(PROMPTS, result.samples, strict=True):
        assert sample.tokens == without_cache(model, params, prompt, 20)
        assert sample.finish == "length" and sample.text is None
    varied = {token for sample in result.samples for token in sample.tokens}
    assert len(varied) > 8  # a constant output would prove little


def test_window_layers_use_a_ring():
    model, _ = make_model(blocks=2)
    layers = jax.eval_shape(lambda: model.init_cache(1, 64, jnp.float32, margin=1)).layers
    assert isinstance(layers[1], RingCache) and layers[1].key.shape[2] == 7


class Guess:
    """Drafts a fixed tree around the prompt's habits: root + 1 and the tokens that greedy decoding gave
    before."""

    size, levels = 5, 3

    def __init__(self, table: tuple[int, ...]):
        self.table = table  # the token to guess after each token

    def init(self, params, target, prompt):
        return ()

    def propose(self, params, target, state, round):
        after = jnp.asarray(self.table)
        first = after[round.root]
        columns = [round.root, (first + 1) % VOCAB, first, after[first], (after[first] + 1) % VOCAB]
        return Draft(jnp.stack(columns, axis=1), static_tree([-1, 0, 0, 2, 2])), state

    def observe(self, params, target, state, outcome):
        return state


@pytest.mark.parametrize(
    "case, sampling",
    [("plain", Sampling()), ("window", Sampling(0.7, top_p=0.9, repetition_penalty=1.2))],
    ids=["greedy", "sampled, window"],
)
def test_tree_drafts_give_the_tokens_of_plain_decoding(case, sampling):
    model, params = make_model(**CASES[case])
    expected = Generator(model, params).generate(PROMPTS, max_new_tokens=24, sampling=sampling)
    table = list(range(VOCAB))
    for sample in expected.samples:
        for token, following in zip(sample.tokens, sample.tokens[1:], strict=False):
            table[token] = following
    drafted = Generator(model, params, proposer=Guess(tuple(table)))
    result = drafted.generate(PROMPTS, max_new_tokens=24, sampling=sampling)
    assert [s.tokens for s in result.samples] == [s.tokens for s in expected.samples]
    assert result.stats.tokens_per_call > 1.3 and result.stats.calls < expected.stats.calls
    # Every row gains 23 tokens after prefill: n1 + 2 n2 + 3 n3 over three rows.
    assert sum((k + 1) * n for k, n in enumerate(result.stats.gained)) == 3 * 23


def test_samples_do_not_depend_on_the_batch(plain):
    options = dict(max_new_tokens=12, sampling=Sampling(0.9, top_k=20), seed=3)
    together = plain.generate(PROMPTS, ids=[4, 5, 6], samples=2, **options).samples
    for prompt, number in ((0, 4), (2, 6)):
        alone = plain.generate([PROMPTS[prompt]], ids=[number], samples=1, **options).samples
        assert alone[0].tokens == together[2 * prompt].tokens
    assert together[0].tokens != together[1].tokens
    assert [(s.prompt, s.sample) for s in together] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_seeds(plain):
    def run(seed):
        return (
            plain.generate([PROMPTS[0]], max_new_tokens=12, sampling=Sampling(1.0), seed=seed)
            .samples[0]
            .tokens
        )

    assert run(0) == run(0) and run(0) != run(1)


def test_streaming_gives_the_same_tokens_in_pieces(plain):
    expected = plain.generate(PROMPTS, max_new_tokens=12).samples
    stream = plain.stream(PROMPTS, max_new_tokens=12, block=5)
    pieces = list(stream)
    for row, sample in enumerate(expected):
        assert [len(p.tokens) for p in pieces if p.row == row] == [1, 5, 5, 1]
        assert sum((p.tokens for p in pieces if p.row == row), []) == sample.tokens
    assert [s.tokens for s in stream.result.samples] == [s.tokens for s in expected]


def test_one_program_for_a_bucket(plain):
    def run(length, **options):
        before = engines.programs()
        plain.generate([[3] * length], **options)
        return engines.programs() - before

    run(5, max_new_tokens=7)  # prompts of up to 16 tokens, up to 63 slots
    assert run(9, max_new_tokens=20) == 0
    assert run(16, max_new_tokens=3, seed=5) == 0
    assert run(17, max_new_tokens=3) == 1  # a longer prompt: only prefill is new
    assert run(5, max_new_tokens=7, sampling=Sampling(0.5, top_p=0.5)) == 2
    assert run(5, max_new_tokens=7, sampling=Sampling(0.7, top_p=0.9)) == 0
    list(plain.stream([[3] * 5], max_new_tokens=7, block=2))
    assert run(5, max_new_tokens=8) == 0


def test_end_tokens(plain):
    free = [s.tokens for s in plain.generate(PROMPTS, max_new_tokens=20).samples]
    end = free[1][6]
    ended = Generator(plain.model, plain.params, ends=(end, VOCAB - 1))
    for sample, tokens in zip(ended.generate(PROMPTS, max_new_tokens=20).samples, free, strict=True):
        cut = tokens.index(end) if end in tokens else 20
        assert sample.tokens == tokens[:cut]
        assert sample.finish == ("eos" if cut < 20 else "length")
    drafted = Generator(plain.model, plain.params, ends=(end,), proposer=Guess(tuple([end] * VOCAB)))
    result = drafted.generate([PROMPTS[1]], max_new_tokens=20).samples[0]
    assert result.tokens == free[1][: free[1].index(end)] and result.finish == "eos"


def test_context_ends_a_row(plain):
    prompts = [[3] * (CONTEXT - 4), [3] * 5]
    first, second = plain.generate(prompts, max_new_tokens=10).samples
    assert (len(first.tokens), first.finish) == (4, "context")
    assert (len(second.tokens), second.finish) == (10, "length")
    (all_that_fit,) = plain.generate(prompts[:1], max_new_tokens=1 << 31).samples
    assert (all_that_fit.tokens, all_that_fit.finish) == (first.tokens, "context")
    assert first.tokens == without_cache(plain.model, plain.params, prompts[0], 4)


def test_banned_tokens_are_never_chosen(plain):
    usual = set(plain.generate(PROMPTS, max_new_tokens=10).samples[1].tokens)
    banned = plain.generate(PROMPTS, max_new_tokens=10, sampling=Sampling(banned=sorted(usual)))
    assert not usual & {token for sample in banned.samples for token in sample.tokens}


def test_statistics(plain):
    stats = plain.generate(PROMPTS, max_new_tokens=9).stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.calls) == (3 + 21 + 1, 27, 9)
    assert stats.gained == (3 * 8,) and stats.tokens_per_call == 1.0
    seconds = stats.prefill_seconds + stats.decode_seconds
    assert stats.tokens_per_second == pytest.approx(27 / seconds)


def parts(layer: dict) -> tuple[set[str], set[str]]:
    return set(layer["attention"]), set(layer["mlp"])


SEPARATE = {"query", "key", "value", "output"}, {"gate", "up", "down"}
FUSED = {"qkv", "output"}, {"gate_up", "down"}


def test_prepare_with_the_compilers_products_fuses_large_models_only(monkeypatch):
    model, params = make_model(scan=True)
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    unrolled, small = prepare(model, params)
    assert not unrolled.scan_layers and parts(small["layer_0"]) == SEPARATE
    monkeypatch.setattr("research.decoding.prepare._FUSE_FROM", 1)
    _, large = prepare(model, params, "bfloat16")
    assert parts(large["layer_1"]) == FUSED
    assert {leaf.dtype for leaf in jax.tree.leaves(large)} == {jnp.dtype("bfloat16")}
    tokens = np.asarray([PROMPTS[1]])
    _, fused = prepare(model, params)
    ours, theirs = (call(unrolled, p, tokens) for p in (fused, small))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_prepare_lays_kernels_out(monkeypatch):
    monkeypatch.setattr("research.nn.panels._LARGE", 1)
    model, params = make_model()
    _, found = prepare(model, params)
    assert parts(found["layer_0"]) == FUSED
    assert isinstance(found["layer_1"]["mlp"]["gate_up"]["kernel"], Panels)
    assert isinstance(found["head"]["kernel"], Panels)
    tokens = np.asarray([PROMPTS[1]])
    np.testing.assert_allclose(call(model, found, tokens), call(model, params, tokens), atol=1e-4)
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    assert parts(prepare(model, params)[1]["layer_0"]) == SEPARATE


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1] * CONTEXT], {}, "prompt 1 has 48 tokens and the model's context is 48: at most 47"),
        ([[VOCAB]], {}, "prompt 1 holds token 97, outside the vocabulary of 97"),
        (["text"], {}, "prompt 1 is text, and this model has no tokenizer"),
        ([[1]], {"stop": ["x"]}, "stop strings need a tokenizer"),
        ([[1]], {"samples": 2}, "2 samples at temperature 0"),
        ([[1]], {"seed": 1 << 63}, "seed must be from 0 to 2..32 - 1, not 9223372036854775808"),
        ([[1]], {"seed": -1}, "seed must be from 0"),
        ([[1]], {"samples": 0}, "samples must be at least 1, not 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([[1]], {"ids": [1, 2]}, "2 ids for 1 prompts"),
    ],
)
def test_mistakes(plain, prompts, options, message):
    with pytest.raises(UserError, match=message):
        plain.generate(prompts, **options)


class Letters:
    """A token stream where token t is the t-th piece."""

    pieces = ["a", "b", "en", "d", "<end", ">", "x<e"]

    def push(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return "!"


def test_stop_string_across_tokens():
    text = RowText(Letters(), ["<end>", "zzz"])
    assert text.push([0, 1]) == "ab"
    assert text.push([4]) == ""  # "<end" may begin the stop string
    assert text.push([5, 1]) == ""
    assert (text.text, text.stopped, text.tokens) == ("ab", True, 2)
    assert text.finish() == ""


def test_text_held_back_is_shown_when_it_was_no_stop():
    text = RowText(Letters(), ["<end>"])
    assert text.push([4]) == "" and text.push([0]) == "<enda"
    assert text.push([6]) == "x" and text.push([2]) == "<een"
    assert text.push([4]) == "" and text.finish() == "<end!"
    assert text.text == "<endax<een<end!" and text.tokens == 5 and not text.stopped


def test_stop_inside_a_token_keeps_the_token_that_reaches_beyond():
    text = RowText(Letters(), ["<e"])
    assert text.push([0, 6, 1]) == "ax"
    assert (text.text, text.tokens) == ("ax", 2)


def test_first_token_stops():
    text = RowText(Letters(), ["a"])
    assert text.push([0]) == "" and (text.text, text.tokens, text.stopped) == ("", 0, True)


def test_stop_strings_of_a_batch():
    tokenizer = Tokenizer.load()
    model, params = make_model()
    model = model.clone(vocab_size=tokenizer.vocab_size)
    params = drawn(model, np.zeros((1, 1), np.int32), seed=1)
    generator = Generator(model, params, tokenizer)
    prompts = ["def f(", "x = 1\nimport os\n"]
    free = generator.generate(prompts, max_new_tokens=24)
    assert free.samples[0].text == tokenizer.decode(free.samples[0].tokens)
    stop = free.samples[0].text[9:12]
    stopped = generator.generate(prompts, max_new_tokens=24, stop=[stop])
    for before, after in zip(free.samples, stopped.samples, strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at])
        assert after.finish == ("length" if at < 0 else "stop")
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert tokenizer.decode(after.tokens).startswith(after.text)
    assert stopped.samples[0].finish == "stop"
    stream = generator.stream(prompts, max_new_tokens=24, stop=[stop], block=3)
    texts = ["", ""]
    for piece in stream:
        texts[piece.row] += piece.text
    assert texts == [sample.text for sample in stopped.samples]


def test_cache_is_updated_in_place(plain):
    """Where a compiler can't order the update after the reads, every call copies every layer's cache."""
    engine = engines.Engine(plain.model, plain.proposer, Greedy(), capacity=64)
    weights, ends = engines.Weights(plain.params, (), ()), np.zeros((0,), np.int32)
    ones = np.ones((3,), np.int32)
    keys = engines.row_keys(0, np.arange(3), 1)
    state = jax.eval_shape(engine.prefill, weights, np.ones((3, 16), np.int32), ones, ones, keys, ends)
    program = engines.compiled(engine, "decode", weights, state, np.zeros((3,), bool), np.int32(1), ends)
    assert "f32[3,2,64,8]" in program.as_text()
    assert not [
        line for line in program.as_text().splitlines() if "f32[3,2,64,8]" in line and " copy(" in line
    ]
