"""Contrastive decoding against the formula over whole sequences, without a cache."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.decoding.generator import Generator
from research.decoding.guidance.contrast import EXCLUDED, contrast, contrasted
from research.decoding.proposers import Target
from research.decoding.sampling import Sampling
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from tests.programs import drawn

VOCAB = 12
PROMPTS = [[8], [3, 9, 2, 3, 9]]  # unequal lengths


@functools.cache
def decoders():
    """(strong, weak, params): the weak one flattens its attention, so its caches differ from layer 1 on."""

    def model(scale):
        attention = of(Attention, num_heads=2, head_dim=8, rotary=of(Rotary), scale=scale)
        block = of(Block, attention=attention, mlp=of(GatedMLP, hidden_dim=24))
        return build(of(DecoderLM, blocks=(block,), num_layers=2, vocab_size=VOCAB, width=16, max_length=24))

    strong, weak = model(8**-0.5), model(0.01)
    params = drawn(strong, jnp.zeros((1, 2), jnp.int32))
    return strong, weak, jax.tree.map(lambda x: 3 * x, params)  # far from uniform


@functools.cache
def logits_of(which):
    model, params = decoders()[which], decoders()[2]
    return jax.jit(lambda tokens: model.apply({"params": params}, tokens))


def greedy(prompt, count, beta, alpha):
    """Tokens and strong probabilities of the formula, both passes computed anew over the whole sequence."""
    out, ratios = [], []
    for _ in range(count):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt) + len(out)] = prompt + out
        place = len(prompt) + len(out) - 1
        strong, weak = (np.asarray(logits_of(i)(row)[0, place], np.float64) for i in (0, 1))
        plausible = strong >= strong.max() + math.log(alpha)
        out.append(int(np.argmax(np.where(plausible, (1 + beta) * strong - beta * weak, -np.inf))))
        ratios.append(math.exp(strong[out[-1]] - strong.max()))
    return out, ratios


def decode(beta, alpha, which=(0, 1), **options):
    strong, weak = (decoders()[i] for i in which)
    model, params = contrasted(strong, weak, decoders()[2], beta=beta, alpha=alpha)
    result = Generator(model, params, **options).generate(PROMPTS, max_new_tokens=8)
    return [sample.tokens for sample in result.samples]


@functools.cache
def plain():
    result = Generator(decoders()[0], decoders()[2]).generate(PROMPTS, max_new_tokens=8)
    return [sample.tokens for sample in result.samples]


def test_by_hand():
    """max 2, alpha = e^-1: the third is implausible; 2 + 0.5 (2 - 1) = 2.5 and 1 + 0.5 (1 + 3) = 3."""
    got = contrast(
        jnp.array([2.0, 1.0, 0.9]), jnp.array([1.0, -3.0, -9.0]), jnp.float32(0.5), jnp.float32(-1.0)
    )
    np.testing.assert_array_equal(got, np.float32([2.5, 3.0, EXCLUDED]))


def test_a_constant_changes_nothing():
    strong, weak = jnp.array([[2.0, 1.0, -4.0]]), jnp.array([[0.5, 0.25, 1.0]])
    numbers = jnp.float32(0.5), jnp.float32(-2.0)
    base = jax.nn.softmax(contrast(strong, weak, *numbers))
    for moved in ((strong + 8, weak), (strong, weak - 16)):
        np.testing.assert_allclose(jax.nn.softmax(contrast(*moved, *numbers)), base, rtol=1e-6)


@pytest.mark.parametrize(("beta", "alpha"), [(0.5, 0.1), (2.0, 0.01)])
def test_decoding_follows_the_formula(beta, alpha):
    """Step by step with two caches = both passes from scratch, for prompts of unequal lengths at once."""
    expected = [greedy(prompt, 8, beta, alpha) for prompt in PROMPTS]
    assert decode(beta, alpha) == [tokens for tokens, _ in expected]
    assert min(ratio for _, ratios in expected for ratio in ratios) >= alpha


def test_contrast_changes_the_output():
    assert decode(2.0, 0.01) != plain()


@pytest.mark.parametrize(
    ("beta", "alpha", "which"), [(0.0, 0.1, (0, 1)), (0.9, 1.0, (0, 1)), (0.9, 0.1, (0, 0))]
)
def test_what_must_be_plain_decoding_is(beta, alpha, which):
    assert decode(beta, alpha, which) == plain()


def test_drafts_change_nothing():
    assert decode(2.0, 0.01, proposer=PromptLookup(num_tokens=3)) == decode(2.0, 0.01)


def test_sampling_stays_plausible():
    model, params = contrasted(*decoders(), beta=0.5, alpha=0.3)
    result = Generator(model, params).generate(
        PROMPTS[:1], max_new_tokens=4, sampling=Sampling(temperature=1.0), samples=16
    )
    for sample in result.samples:
        row = np.zeros((1, 16), np.int32)
        row[0, : 1 + len(sample.tokens)] = PROMPTS[0] + sample.tokens
        strong = np.asarray(logits_of(0)(row)[0])
        for place, token in enumerate(sample.tokens):
            assert strong[place, token] >= strong[place].max() + math.log(0.3) - 1e-4


def test_scanned_layers_are_unrolled():
    strong, weak, params = decoders()
    scanned = [model.clone(scan_layers=True) for model in (strong, weak)]
    model, params = contrasted(*scanned, scan_params(params, 1), beta=2.0, alpha=0.01)
    result = Generator(model, params).generate(PROMPTS, max_new_tokens=8)
    assert [sample.tokens for sample in result.samples] == decode(2.0, 0.01)


def test_the_model_contract_of_logits():
    model, params = contrasted(*decoders(), beta=2.0, alpha=0.01)
    tokens, lengths = jnp.array([PROMPTS[1]]), jnp.array([5])
    last, hidden, _ = model.apply({"params": params}, tokens, lengths, method="prefill")
    np.testing.assert_allclose(Target(params, model).logits(hidden)[:, -1], last, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(beta=-1.0), "beta=-1.0: a number from 0"),
        (dict(beta=math.nan), "beta=nan"),
        (dict(alpha=0.0), "alpha=0.0: a number in"),
        (dict(alpha=1.5), "alpha=1.5"),
    ],
)
def test_bad_numbers_are_refused(numbers, message):
    with pytest.raises(UserError, match=message):
        contrasted(*decoders(), **numbers)
