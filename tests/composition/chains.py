"""Chains of post-training methods over decoders of other families."""

import jax
import numpy as np

from research.adapters.lora import LoRA
from research.adapters.tuning import AdapterTuning
from research.compression.baselines import GPTQ, RoundToNearest
from research.compression.blocks import plain
from research.compression.chain import Chain
from research.compression.decoupleq import DecoupleQ
from research.compression.eora import EoRA
from research.compression.finequant import FineQuant
from research.config_capture import capture
from research.elastic.matformer import extract
from research.elastic.slicing import ElasticSpec
from research.interop import huggingface
from research.moe.momentum import MomentumBlock
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.nn.weights import stored_bits
from research.ssm.mamba2 import Mamba2
from research.training.model_directory import save_model
from research.training.task import LanguageModelling

from .cells import (
    HIDDEN,
    KEY,
    close,
    decoder,
    drafted_as_plain,
    init,
    logits,
    louder,
    make_batch,
    mean,
    refused,
    runs,
    train,
)


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


@runs(
    "MatFormer, then int4 + EoRA, then LoRA",
    "merge, export to Hugging Face",
    "each step evaluated: the tuned model's loss is lower than before, the merged one's the same, the exported "
    "parameters are the merged ones, exactly",
)
def _(directory):
    whole = decoder()
    model, cut = extract(whole, louder(init(whole)), ElasticSpec((0,), (8,)))
    evaluate = jax.jit(LanguageModelling(model).evaluate)

    def loss(params):
        return mean(evaluate(plain(params), make_batch()))

    small = compressed(model, cut, FineQuant(4), EoRA(2))
    assert abs(loss(small) - loss(cut)) < 0.02 * loss(cut)
    save_model(directory / "int4", capture(model), small)
    tuning = AdapterTuning(LoRA(rank=2, alpha=4.0), str(directory / "int4"))
    state, _ = train(tuning, tuning.start(KEY), steps=3, trainable=("^adapter/",))
    tuned = loss(tuning.unpack(state.params))
    assert tuned < loss(small)
    merged_model, merged, told = tuning.merge(state.params)
    assert merged_model == model and "frozen in fewer bits and are arrays now" in told
    np.testing.assert_allclose(loss(merged), tuned, rtol=1e-5)
    huggingface.save(model, {"params": merged}, directory / "exported")
    exported_model, exported, _ = huggingface.load(directory / "exported")
    jax.tree.map(np.testing.assert_array_equal, exported["params"], merged)
    close(logits(exported_model, exported["params"]), logits(model, merged))
