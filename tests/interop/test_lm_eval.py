"""The adapter for the lm-evaluation-harness: scores of `model.apply`, texts of plain decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from research.data.tokenizer import Tokenizer, train
from research.decoding import engine
from research.decoding.sampling import Sampling
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")

from lm_eval.api.instance import Instance  # noqa: E402

from research.interop.lm_eval import HarnessModel, adds_bos, generation_options  # noqa: E402
from tests.programs import drawn

CONTEXT = 32
TEXT = "The quick brown fox jumps over the lazy dog; 12 boxing wizards jump. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([TEXT], vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> tuple[DecoderLM, dict]:
    block = Block(Attention(num_heads=2, head_dim=8), GatedMLP(hidden_dim=32))
    decoder = DecoderLM(
        blocks=(block,), num_layers=2, vocab_size=tokenizer.vocab_size, width=16, max_length=CONTEXT
    )
    params = drawn(decoder, jnp.zeros((1, 2), jnp.int32), seed=3)
    # A sharper head than at initialisation, so that wrong scores differ.
    params["embedding"]["table"] = params["embedding"]["table"] * 8
    return decoder, params


@pytest.fixture
def harness(model, tokenizer):
    warnings = []

    def make(batch_size: int = 4, **options) -> HarnessModel:
        made = HarnessModel(*model, tokenizer, batch_size=batch_size, warn=warnings.append, **options)
        made.warnings = warnings
        return made

    return make


def logits_of(model: tuple[DecoderLM, dict], inputs: list[int]) -> np.ndarray:
    """float64[len(inputs), vocabulary]. What follows in the row can't matter: the model is causal."""
    row = jnp.asarray([inputs + [0] * (CONTEXT - len(inputs))])
    return np.asarray(apply(model[0], model[1], row), np.float64)[0, : len(inputs)]


@functools.partial(jax.jit, static_argnums=0)
def apply(decoder: DecoderLM, params: dict, tokens: jax.Array) -> jax.Array:
    return decoder.apply({"params": params}, tokens)


def by_hand(model: tuple[DecoderLM, dict], inputs: list[int], targets: list[int]) -> float:
    """Nats of `targets`, each predicted from the place before it; `inputs` ends before the last target."""
    logits = logits_of(model, inputs)[len(inputs) - len(targets) :]
    normalizer = np.log(np.exp(logits).sum(-1))
    return float(sum(logits[i, t] - normalizer[i] for i, t in enumerate(targets)))


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_loglikelihood_is_that_of_apply(harness, model, tokenizer):
    pairs = [
        ("The quick", " brown fox"),
        ("", "lazy"),
        ("dog; ", "12"),
        ("The quick brown fox jumps", " over"),
    ]
    results = harness().loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (score, _) in zip(pairs, results, strict=True):
        # Contexts begin with <bos>, and a space at their end belongs to the continuation.
        start = len(tokenizer.encode(context.rstrip(), bos=True))
        whole = tokenizer.encode(context + continuation, bos=True)
        assert score == pytest.approx(by_hand(model, whole[:-1], whole[start:]), abs=1e-4)


def test_greedy_flag(harness, model):
    context = [1, 5, 9]
    best = list(context)
    for _ in range(3):
        best.append(int(logits_of(model, best)[-1].argmax()))
    good = best[3:]
    wrong_last, wrong_first = [*good[:2], (good[2] + 1) % 280], [(good[0] + 1) % 280, *good[1:]]
    requests = [(("", ""), context, tokens) for tokens in (good, wrong_last, wrong_first)]
    assert [greedy for _, greedy in harness()._loglikelihood_tokens(requests)] == [True, False, False]


def test_few_programs_any_order_and_shared_rows(harness, model):
    rng = np.random.default_rng(0)
    requests = []
    for length in rng.permutation(np.arange(2, 30)):
        ids = rng.integers(3, 280, length + 1).tolist()
        requests.append((("", ""), ids[:-1], ids[-1:]))
    choices = [(("", ""), [1, 7, 8], [last]) for last in (20, 21, 22, 23)]
    made, rows = harness(), []
    score = made._score
    made._score = lambda batch: rows.extend(batch) or score(batch)
    results = made._loglikelihood_tokens(requests + choices)
    assert set(made.programs) == {16, 32}  # 28 lengths, two compiled shapes
    assert len(rows) == 28 + 1  # the four choices were computed once
    for (_, context, continuation), (value, _) in zip(requests + choices, results, strict=True):
        assert value == pytest.approx(by_hand(model, context, continuation), abs=1e-4)


def test_long_requests_lose_their_beginning(harness, model):
    made = harness()
    context, continuation = [1, *range(20, 69)], [70, 71]  # 50 and 2 tokens, the model takes 32
    (result,) = made._loglikelihood_tokens([(("", ""), context, continuation)])
    inputs = [*context, 70][-32:]
    assert result[0] == pytest.approx(by_hand(model, inputs, continuation), abs=1e-4)
    assert made.warnings == [
        "1 of 1 requests are longer than the 32 tokens that fit the context of lathe: "
        "their beginning was cut off"
    ]
    with pytest.raises(UserError, match="continuation of 33 tokens exceeds the context of lathe, 32"):
        made._loglikelihood_tokens([(("", ""), [1], list(range(33)))])


def test_rolling_scores_each_token_once(harness, model, tokenizer):
    text = TEXT * 3
    tokens = tokenizer.encode(text)[:75]
    text = tokenizer.decode(tokens)
    assert tokenizer.encode(text) == tokens
    # 75 = 32 + 32 + 11: the first window is predicted from <bos>; the last is full and scores 11 tokens.
    expected = (
        by_hand(model, [tokenizer.bos_id, *tokens[:31]], tokens[:32])
        + by_hand(model, tokens[31:63], tokens[32:64])
        + by_hand(model, tokens[42:74], tokens[64:75])
    )
    short = tokenizer.encode(TEXT)
    made = harness()
    requests = [request("loglikelihood_rolling", x) for x in (text, TEXT, "")]
    first, second, empty = made.loglikelihood_rolling(requests)
    assert first == pytest.approx(expected, abs=5e-4)
    alone = made.loglikelihood_rolling([requests[1]])
    assert len(short) > 1 and alone == [pytest.approx(second, abs=1e-4)]
    assert empty == 0.0 and made.warnings == []


def greedy_text(model, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Plain decoding without a cache."""
    ids = tokenizer.encode(prompt, bos=True)[-(CONTEXT - count) :]
    new = []
    for _ in range(count):
        token = int(logits_of(model, ids + new)[-1].argmax())
        if token == tokenizer.eos_id:
            break
        new.append(token)
    return tokenizer.decode(new)


def test_generation_is_plain_greedy_decoding(harness, model, tokenizer):
    made = harness()
    prompts = ["The", "boxing wizards jump over the dog", "12", "The quick brown fox", "lazy", TEXT]
    wanted = {"until": [], "max_gen_toks": 6}
    expected = [greedy_text(model, tokenizer, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 1
    stop = expected[0][2]
    cut = {"until": [stop, ""], "max_gen_toks": 6}
    requests = [request("generate_until", prompt, dict(wanted)) for prompt in prompts]
    requests.append(request("generate_until", "The", cut))
    before = engine.programs()
    results = made.generate_until(requests)
    assert results[:-1] == expected
    assert results[-1] == expected[0].split(stop)[0]
    # Three batches; prompts are read at 32 and at 16 tokens, and decoded by one program.
    assert engine.programs() - before == 3
    longer = len(tokenizer.encode(TEXT, bos=True))
    assert longer > 26 and made.warnings == [
        "1 of 6 requests are longer than the 26 tokens that fit the context of lathe: "
        "their beginning was cut off"
    ]


def test_draws_do_not_depend_on_the_batch(harness):
    options = {"until": [], "do_sample": True, "temperature": 2.0, "max_gen_toks": 5}
    requests = [request("generate_until", "fox", dict(options)) for _ in range(3)]
    made = harness()
    alone = made.generate_until(requests)
    longer = request("generate_until", "The fox", dict(options))  # sorted to the front of the batch
    assert made.generate_until([*requests, longer])[:3] == alone
    assert len(set(alone)) > 1  # repeats of a request are other draws


def test_generation_options():
    sampling, stop, count = generation_options({"until": "\n", "temperature": 0.7, "top_k": 0}, 99)
    assert (sampling.temperature, sampling.top_k, stop, count) == (0.7, None, ("\n",), 99)
    greedy, *_ = generation_options({"do_sample": False, "temperature": 0.7, "num_beams": 1}, 9)
    assert greedy.greedy
    assert generation_options({"temperature": 0.0, "top_p": 0.95, "repetition_penalty": 1.5}, 9)[
        0
    ] == Sampling(repetition_penalty=1.5)
    sampled, _, count = generation_options({"do_sample": True, "top_p": 0.9, "max_new_tokens": 3}, 9)
    assert (sampled.temperature, sampled.top_p, count) == (1.0, 0.9, 3)
    with pytest.raises(UserError, match="unknown option temprature; did you mean temperature?"):
        generation_options({"temprature": 1.0}, 9)
    with pytest.raises(UserError, match="num_beams"):
        generation_options({"num_beams": 4}, 9)
    with pytest.raises(UserError, match="max_gen_toks must be at least 1, not 0"):
        generation_options({"max_gen_toks": 0}, 9)


def test_refusals(harness, model, tokenizer):
    with pytest.raises(UserError, match="asks for 32 new tokens and the context of lathe is 32"):
        harness().generate_until([request("generate_until", "fox", {"until": [], "max_gen_toks": 32})])
    with pytest.raises(UserError, match="adds no token"):
        harness()._loglikelihood_tokens([(("", "x"), [1], [])])
    with pytest.raises(UserError, match="tiny has no tokenizer"):
        HarnessModel(*model, None, name="tiny")
    small = model[0].clone(vocab_size=100)
    with pytest.raises(UserError, match="the vocabulary of lathe has 100"):
        HarnessModel(small, model[1], tokenizer).tok_encode("The")


def test_bos_as_the_tokenizer_says(tokenizer):
    assert not adds_bos(tokenizer)
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    assert adds_bos(Tokenizer(backend))
