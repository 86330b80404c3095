"""Decoders whose every kernel is quantized."""

import jax
import numpy as np

from research.elastic.matformer import extract
from research.elastic.slicing import ElasticSpec
from research.moe.layer import MoE
from research.nn.quantized import quantize, quantize_kernels
from research.nn.transformer import Block
from research.nn.weights import Weight, materialize, stored_bits
from research.ssm.mamba2 import Mamba2

from .cells import HIDDEN, close, decoder, drafted_as_plain, init, logits, louder, refused, runs


def int4(params, group=2):
    """All kernels in 4 bits."""
    return quantize_kernels(louder(params), lambda kernel: quantize(kernel, 4, group))


def plain(params):
    return jax.tree.map(materialize, params, is_leaf=lambda node: isinstance(node, Weight))


@runs("int4 weights", "tree decoding (Medusa)", "the tokens of plain decoding, in a batch")
def _(_):
    model = decoder()
    drafted_as_plain("Medusa", model, int4(init(model)))


@runs("int4 weights", "mixture of experts, Mamba-2", "logits are those of the kernels multiplied out")
def _(_):
    mamba = Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=4)
    model = decoder(blocks=(Block(mamba, MoE(num_experts=4, k=2, hidden_dim=HIDDEN)),))
    params = int4(init(model))
    close(logits(model, params), logits(model, plain(params)), 1e-4, 1e-4)


@runs(
    "int4 weights",
    "MatFormer",
    "a slice by groups takes a part of the codes, and has the slice's logits exactly",
)
def _(_):
    model = decoder()
    params = int4(init(model))
    cut_model, cut = extract(model, params, ElasticSpec((0,), (4,)))
    mlp, whole = (tree["layer_0"]["mlp"] for tree in (cut, params))
    assert stored_bits(mlp) * HIDDEN == stored_bits(whole) * 4
    _, expected = extract(model, plain(params), ElasticSpec((0,), (4,)))
    jax.tree.map(np.testing.assert_array_equal, plain(cut), expected)
    close(logits(cut_model, cut), logits(cut_model, expected), 1e-4, 1e-4)


@refused("int4 weights", "a MatFormer slice through a group", "a slice of 6 inputs cuts a group of 4")
def _(_):
    model = decoder()
    extract(model, int4(init(model), group=4), ElasticSpec((0,), (6,)))
