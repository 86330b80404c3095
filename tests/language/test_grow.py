"""Grown models say what the model before said."""

import jax
import numpy as np
import pytest

from research.elastic.matformer import nest
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.language.grow import deepen, widen
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.fuse import fuse_projections
from research.nn.masks import Causal, Window
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.quantized import quantize, quantize_kernels
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from tests.programs import call, drawn

TOKENS = np.random.default_rng(0).integers(0, 16, (2, 7), np.int32)


def llama(**fields) -> DecoderLM:
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    fields = dict(blocks=(Block(attention, GatedMLP(16)),), num_layers=2) | fields
    return DecoderLM(vocab_size=16, width=8, max_length=16, **fields)


def gemma() -> DecoderLM:
    """Two kinds of layers, shared key heads, biases, norms with offsets behind the branches and in the heads."""

    def norm() -> RMSNorm:  # one each: a module that is shared shares its parameters
        return RMSNorm(unit_offset=True)

    attention = Attention(
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        rotary=Rotary(),
        use_bias=True,
        output_bias=True,
        query_norm=norm(),
        key_norm=norm(),
    )
    blocks = tuple(
        Block(attention.clone(rule=rule), MLP(16), norm(), post_norms=True) for rule in (Window(3), Causal())
    )
    return llama(
        blocks=blocks, num_layers=3, final_norm=norm(), embedding_multiplier=8**0.5, logit_softcap=5.0
    )


def normed() -> DecoderLM:
    """Layer norms, whose biases are added, and a head of its own."""
    attention = Attention(num_heads=2, head_dim=4, num_kv_heads=1)
    block = Block(attention, GatedMLP(16, use_bias=True), LayerNorm(), post_norms=True)
    return llama(blocks=(block,), final_norm=LayerNorm(), tied_head=False)


@pytest.mark.parametrize("make", [llama, gemma, normed])
def test_logits_are_those_of_before(make):
    model = make()
    params = drawn(model, TOKENS)
    grown, larger = deepen(*widen(model, params), 5)
    assert (grown.width, grown.num_layers) == (16, 5)
    wanted = jax.eval_shape(lambda: grown.init(jax.random.key(0), TOKENS)["params"])
    assert jax.tree.map(np.shape, larger) == jax.tree.map(np.shape, wanted)
    expected, found = call(model, params, TOKENS), call(grown, larger, TOKENS)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_nested_widths_stay_nested():
    model = llama()
    params = drawn(model, TOKENS)
    grown, larger = deepen(*widen(model, params), 3)
    expected = call(model, nest(params, 4), TOKENS)
    assert np.max(np.abs(expected - call(model, params, TOKENS))) > 0.05
    np.testing.assert_allclose(call(grown, nest(larger, 4), TOKENS), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(blocks=(Block(Attention(2, 4), MoE(4, 1, 16)),)), "a MoE can't be grown; MLP or GatedMLP can"),
        (dict(blocks=(Block(Attention(2, 4, rule=Window((2, 3))), MLP(16)),)), "a span for every head"),
        (dict(blocks=(Block(Attention(2, 4, query_norm=RMSNorm(axes=2)), MLP(16)),)), "several axes"),
        (dict(scan_layers=True), "unscan_layers it first"),
    ],
)
def test_models_that_do_not_grow(fields, message):
    for grow in (widen, lambda model, params: deepen(model, params, 4)):
        with pytest.raises(UserError, match=message):
            grow(llama(**fields), {})


def test_parameters_that_do_not_grow():
    model = llama()
    params = drawn(model, TOKENS)
    packed = quantize_kernels(params, lambda kernel: quantize(kernel, 8, 4))
    for grow in (widen, lambda model, params: deepen(model, params, 3)):
        with pytest.raises(UserError, match="grow a model before it is compressed"):
            grow(model, packed)
    with pytest.raises(UserError, match="(qkv|gate_up)/kernel is no parameter that can be widened"):
        widen(model, fuse_projections(params))
    with pytest.raises(UserError, match="a model of 2 layers in patterns of 1 does not grow to 1"):
        deepen(model, params, 1)
