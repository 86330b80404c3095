"""Guided decoding against the formula over whole sequences, without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.decoding.generator import Generator
from research.decoding.guidance.classifier_free import guided
from research.decoding.proposers import Target
from research.decoding.sampling import Sampling
from research.decoding.tree import chain
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from tests.programs import call, drawn

VOCAB, CONDITIONS, NONE = 12, (8, 11), 11
PROMPTS = [[8], [3, 9, 2, 10]]  # unequal lengths, conditions at different places


@functools.cache
def decoder():
    attention = of(Attention, num_heads=2, head_dim=8, rotary=of(Rotary))
    block = of(Block, attention=attention, mlp=of(GatedMLP, hidden_dim=24))
    model = build(of(DecoderLM, blocks=(block,), num_layers=2, vocab_size=VOCAB, width=16, max_length=24))
    params = drawn(model, jnp.zeros((1, 2), jnp.int32))
    return model, jax.tree.map(lambda x: 3 * x, params)  # far from uniform


def expected(prompt, scale, count):
    """Greedy tokens of scale * (with - without) + without, each computed anew over the whole sequence."""
    model, params = decoder()
    out = []
    for _ in range(count):
        row = np.array(prompt + out)
        rows = np.stack([row, np.where((row >= CONDITIONS[0]) & (row < CONDITIONS[1]), NONE, row)])
        rows[1, len(prompt) :] = out  # what is decoded stays as it is
        padded = np.zeros((2, 16), np.int32)
        padded[:, : rows.shape[1]] = rows
        logits = call(model, params, jnp.asarray(padded))[:, rows.shape[1] - 1]
        out.append(int(jnp.argmax(scale * (logits[0] - logits[1]) + logits[1])))
    return out


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_decoding_follows_the_formula(scale):
    model, params = guided(*decoder(), scale, conditions=CONDITIONS, unconditional=NONE)
    result = Generator(model, params).generate(PROMPTS, max_new_tokens=8)
    assert [sample.tokens for sample in result.samples] == [expected(prompt, scale, 8) for prompt in PROMPTS]


def test_guidance_changes_the_output():
    assert expected(PROMPTS[0], 3.0, 8) != expected(PROMPTS[0], 1.0, 8) != expected(PROMPTS[0], 0.0, 8)


def test_samples_of_a_prompt_do_not_depend_on_the_batch():
    model, params = guided(*decoder(), 2.0, conditions=CONDITIONS, unconditional=NONE)
    options = dict(max_new_tokens=6, sampling=Sampling(temperature=3.0))
    together = Generator(model, params).generate(PROMPTS, samples=2, **options).samples
    alone = Generator(model, params).generate(PROMPTS[1:], samples=2, ids=[1], **options).samples
    assert [s.tokens for s in together[2:]] == [s.tokens for s in alone]
    assert alone[0].tokens != alone[1].tokens


def test_scanned_models_are_unrolled():
    model, params = decoder()
    scanned = model.clone(scan_layers=True), scan_params(params, 1)
    results = [
        Generator(*guided(m, p, 3.0, conditions=CONDITIONS, unconditional=NONE)).generate(
            PROMPTS, max_new_tokens=4
        )
        for m, p in ((model, params), scanned)
    ]
    assert results[0].samples == results[1].samples


def test_logits_of_hidden_states_and_rows_of_a_tree():
    """`extend` after `prefill` gives what the formula gives over the whole sequence, at every node of a chain, shared
    or one for each row; `logits` of the hidden states gives it once more."""
    model, params = guided(*decoder(), 3.0, conditions=CONDITIONS, unconditional=NONE)
    prompts, lengths = jnp.asarray([[8, 0, 0, 0], [3, 9, 2, 10]]), jnp.asarray([1, 4])
    _, _, fresh = call(model, params, prompts, lengths, method="prefill")
    cache = model.init_cache(2, 24, jnp.float32, margin=4).commit(fresh, None, lengths)
    assert cache.length.tolist() == [1, 4]
    drafts = jnp.asarray([[5, 1, 7], [0, 6, 8]])
    tree = chain(3)
    logits, hidden, _ = call(
        model, params, drafts, cache, jnp.asarray(tree.mask), jnp.asarray(tree.depth), method="extend"
    )
    own = (
        jnp.broadcast_to(jnp.asarray(tree.mask), (2, 3, 3)),
        jnp.broadcast_to(jnp.asarray(tree.depth), (2, 3)),
    )
    np.testing.assert_array_equal(call(model, params, drafts, cache, *own, method="extend")[0], logits)
    np.testing.assert_allclose(Target(params, model).logits(hidden), logits, rtol=1e-5, atol=1e-5)
    plain, plain_params = decoder()
    for row, prompt in enumerate(PROMPTS):
        without = [NONE if CONDITIONS[0] <= t < CONDITIONS[1] else t for t in prompt]
        both = jnp.asarray([[*start, *drafts[row].tolist()] for start in (prompt, without)])
        first, second = call(plain, plain_params, both)[:, len(prompt) :]
        np.testing.assert_allclose(logits[row], 3 * (first - second) + second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scale=float("nan")), "guidance scale nan: a number is expected"),
        (dict(conditions=(8, 13)), "ids from 0 to the vocabulary of 12"),
        (dict(unconditional=12), "token 12 is outside the vocabulary of 12"),
    ],
)
def test_mistakes_are_told(options, message):
    options = dict(scale=1.0, conditions=CONDITIONS, unconditional=NONE) | options
    with pytest.raises(UserError, match=message):
        guided(*decoder(), options.pop("scale"), **options)


def test_a_drafter_that_needs_the_targets_embedding_is_refused():
    model, params = guided(*decoder(), 1.0, conditions=CONDITIONS, unconditional=NONE)
    with pytest.raises(UserError, match="a guided model has no 'embed'"):
        Target(params, model).embed(jnp.zeros((1, 1), jnp.int32))
