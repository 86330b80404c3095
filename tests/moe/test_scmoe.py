"""Self-contrast: routing by rank, two passes with a cache each, plain decoding where the two agree."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.generator import Generator
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.moe.scmoe import self_contrast, with_ranks
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from tests.programs import drawn

VOCAB, EXPERTS = 12, 4
PROMPTS = [[8], [3, 9, 2, 3, 9]]


def decoder(layers=2, **fields) -> DecoderLM:
    moe = MoE(num_experts=EXPERTS, k=fields.pop("k", 2), hidden_dim=16, **fields)
    block = Block(Attention(num_heads=2, head_dim=8, rotary=Rotary()), moe)
    return DecoderLM(blocks=(block,), num_layers=layers, vocab_size=VOCAB, width=16, max_length=24)


@functools.cache
def trained(layers=2):
    model = decoder(layers)
    params = drawn(model, jnp.zeros((1, 2), jnp.int32))
    return model, jax.tree.map(lambda x: jnp.asarray(4 * np.asarray(x)), params)  # far from uniform


@functools.lru_cache
def _program(model):
    return jax.jit(lambda params, tokens, rngs: model.apply({"params": params}, tokens, rngs=rngs))


def logits(model, tokens, **rngs):
    """Padded on the right, which a causal model does not see: one program for all lengths."""
    row = np.zeros((1, 16), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_program(model)(trained()[1], row, rngs))[0, : len(tokens)]


def decode(model, params, **options):
    result = Generator(model, params, **options).generate(PROMPTS, max_new_tokens=8)
    return [sample.tokens for sample in result.samples]


@functools.cache
def plain():
    return decode(*trained())


def greedy(prompt, weak, beta, alpha, **rngs):
    """The formula, both passes computed anew over the whole sequence."""
    model = trained()[0]
    out = []
    for _ in range(8):
        z_strong = logits(model, prompt + out)[-1].astype(np.float64)
        z_weak = logits(with_ranks(model, weak), prompt + out, **rngs)[-1].astype(np.float64)
        plausible = z_strong >= z_strong.max() + math.log(alpha)
        out.append(int(np.argmax(np.where(plausible, (1 + beta) * z_strong - beta * z_weak, -np.inf))))
    return out


def test_ranks_0_to_k_are_the_trained_routing_to_the_bit():
    model, tokens = trained()[0], PROMPTS[1]
    np.testing.assert_array_equal(logits(with_ranks(model, (0, 1)), tokens), logits(model, tokens))


def test_rank_1_is_the_model_with_one_expert():
    model, tokens = trained()[0], PROMPTS[1]
    one = logits(with_ranks(model, (0,)), tokens)
    np.testing.assert_array_equal(one, logits(decoder(k=1), tokens))
    assert not np.allclose(one, logits(with_ranks(model, (1,)), tokens))


@pytest.mark.parametrize("weak", [(1,), (3,), "random"])
def test_decoding_follows_the_formula(weak):
    rngs = {"routing": jax.random.key(5)} if weak == "random" else {}
    expected = [greedy(prompt, weak, 1.5, 0.01, **rngs) for prompt in PROMPTS]
    got = decode(*self_contrast(*trained(), weak=weak, beta=1.5, alpha=0.01, seed=5))
    assert got == expected != plain()


@pytest.mark.parametrize(
    "options",
    [dict(beta=0.0), dict(alpha=1.0), dict(weak=(0, 1)), dict(weak=(2, 3), strong=(2, 3), beta=0.0)],
)
def test_what_must_be_plain_decoding_is(options):
    model, params = trained(layers=1)  # that the caches of two passes are two is seen above
    expected = decode(with_ranks(model, (2, 3)) if "strong" in options else model, params)
    assert decode(*self_contrast(model, params, **options)) == expected


def test_drafts_change_nothing():
    model, params = self_contrast(*trained(), beta=1.5, alpha=0.01)
    assert decode(model, params, proposer=PromptLookup(num_tokens=3)) == decode(model, params)


def test_a_capacity_of_training_drops_nothing_in_either_pass():
    tight = decoder(capacity_factor=0.5)
    options = dict(beta=1.5, alpha=0.01)
    assert with_ranks(tight, (1,)).blocks[0].mlp.capacity_factor is None
    fresh = [[8], [3]]  # of one token: no capacity in prefill either way
    pair = [self_contrast(model, trained()[1], **options) for model in (tight, trained()[0])]
    found = [Generator(*one).generate(fresh, max_new_tokens=8).samples for one in pair]
    assert found[0] == found[1]


def test_mistakes_are_told():
    model, params = trained()
    with pytest.raises(UserError, match="ranks from 0 to 3 are expected"):
        self_contrast(model, params, weak=(4,))
    with pytest.raises(UserError, match="ranks from 0 to 3 are expected"):
        self_contrast(model, params, weak=())
    dense = model.clone(blocks=(model.blocks[0].clone(mlp=GatedMLP(hidden_dim=16)),))
    with pytest.raises(UserError, match="no MoE layer"):
        self_contrast(dense, params)
