"""Chains of post-training methods over decoders of other families."""

import jax
import numpy as np

from research.compression.baselines import GPTQ, RoundToNearest
from research.compression.blocks import plain
from research.compression.chain import Chain
from research.compression.decoupleq import DecoupleQ
from research.compression.eora import EoRA
from research.compression.finequant import FineQuant
from research.elastic.matformer import extract
from research.elastic.slicing import ElasticSpec
from research.moe.momentum import MomentumBlock
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.nn.weights import stored_bits
from research.ssm.mamba2 import Mamba2

from .cells import HIDDEN, close, decoder, drafted_as_plain, init, logits, louder, make_batch, refused, runs


def compressed(model, params, *methods):
    """What a chain leaves, calibrated on the batch of the cells."""
    batch = jax.tree.map(np.asarray, make_batch())
    *_, last = Chain(methods).run(model, params, [batch])
    return last.params


def check(model, params, *methods):
    """The chain makes it smaller, and the packed model has the logits of its kernels multiplied out."""
    small = compressed(model, params, *methods)
    assert stored_bits(small) < stored_bits(params)
    close(logits(model, small), logits(model, plain(small)), 1e-4, 1e-4)
    return small


@runs("FineQuant, then EoRA", "a slice of MatFormer, tree decoding (Medusa)", "the tokens of plain decoding")
def _(_):
    model = decoder()
    cut_model, cut = extract(model, louder(init(model)), ElasticSpec((0,), (8,)))
    # In float32, since factors of 16 bits are multiplied out in 16 bits.
    drafted_as_plain(
        "Medusa", cut_model, check(cut_model, cut, FineQuant(4), EoRA(2, factor_dtype="float32"))
    )


@runs("decoupleQ", "Mamba-2", "kernels in the order of the mixer's products; logits as multiplied out")
def _(_):
    model = decoder(blocks=(Block(Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=4), None),))
    check(model, init(model), DecoupleQ(2, turns=2, clips=3, epochs=0))


@runs("GPTQ", "MomentumSMoE", "the state through depth goes from block to block; logits as multiplied out")
def _(_):
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    model = decoder(blocks=(MomentumBlock(attention, GatedMLP(HIDDEN)),))
    check(model, init(model), GPTQ(4))


@refused(
    "EoRA", "a model that nothing has compressed", "eora repairs what was compressed before, and nothing was"
)
def _(_):
    model = decoder()
    compressed(model, init(model), EoRA(1))


@refused("GPTQ", "a quantized model", "gptq rounds arrays, and layer_0/attention/key/kernel is Quantized")
def _(_):
    model = decoder()
    compressed(model, init(model), RoundToNearest(4), GPTQ(2))
