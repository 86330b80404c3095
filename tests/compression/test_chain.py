"""Chains of methods over blocks: what each block's kernels see, in which order, with experts and scanned layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.baselines import GPTQ, RoundToNearest
from research.compression.blocks import Walk, plain, replace
from research.compression.chain import Chain, unrolled
from research.compression.decoupleq import DecoupleQ
from research.compression.eora import EoRA
from research.compression.finequant import FineQuant
from research.compression.methods import make_methods
from research.compression.rounding import Affine, Uniform, feed_back
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.quantized import Quantized, quantize
from research.nn.transformer import Block
from research.nn.weights import LowRank, Sum, dot, stored_bits
from research.training.observe import collect_grams
from tests.programs import drawn

EXPERTS, WIDTH, VOCAB = 3, 8, 16
# With a bias, so that a router can be kept from an expert.
MOE = MoE(num_experts=EXPERTS, k=2, hidden_dim=8, router_bias=True)
SCANNED = DecoderLM(
    vocab_size=VOCAB,
    width=WIDTH,
    max_length=12,
    num_layers=2,
    blocks=(Block(Attention(num_heads=2, head_dim=4), MOE),),
    scan_layers=True,
)
SEGMENTS = np.array([[1] * 9 + [0] * 3, [1] * 12], np.int32)


@pytest.fixture(scope="module")
def params():
    tree = drawn(SCANNED, np.zeros((1, 2), np.int32))
    bias = tree["layers"]["layer_0"]["mlp"]["router"]["bias"].at[:, 2].set(-100.0)  # nobody's expert
    tree["layers"]["layer_0"]["mlp"]["router"]["bias"] = bias
    return tree


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    make = lambda: {"tokens": rng.integers(0, VOCAB, (2, 12)).astype(np.int32), "segments": SEGMENTS}  # noqa: E731
    return [make(), make()]


@pytest.fixture(scope="module")
def rounded(params, batches):
    """The model, its parameters unrolled, and what GPTQ leaves."""
    model, flat = unrolled(SCANNED, params)
    *_, last = Chain((GPTQ(bits=4),)).run(SCANNED, params, batches)
    return model, flat, last


def test_a_block_is_observed_behind_the_compressed_ones(rounded, batches):
    """GPTQ's second block: Gram matrices by its original weights, inputs from the first block as it was rounded."""
    model, flat, last = rounded
    before = plain(last.params) | {"layer_1": flat["layer_1"]}
    grams = collect_grams(model, before, batches)
    walk = Walk(model, last.params, batches)
    assert walk.stages(last.params["layer_0"]) == [
        ("attention/query/kernel", "attention/key/kernel", "attention/value/kernel"),
        ("attention/output/kernel",),
        # Within a grouped product every kernel has the rows as an input of its own.
        ("mlp/experts/up/kernel",),
        ("mlp/experts/gate/kernel",),
        ("mlp/experts/down/kernel",),
    ]
    walk.advance(last.params["layer_0"])
    paths = walk.paths(flat["layer_1"])
    found = walk.grams(flat["layer_1"], paths)
    for path in paths:
        gram = grams[f"layer_1/{path}"]
        np.testing.assert_allclose(found[path].total, gram.total, rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(found[path].count, gram.count)
    kernel = last.params["layer_1"]["mlp"]["experts"]["down"]["kernel"]
    assert isinstance(kernel, Quantized) and kernel.bits == 4 and kernel.scale.dtype == jnp.float16
    grid = Affine(kernel.scale.astype(jnp.float32), kernel.zero.astype(jnp.float32))
    w = flat["layer_1"]["mlp"]["experts"]["down"]["kernel"]
    again = feed_back(
        w, jnp.asarray(found["mlp/experts/down/kernel"].total), Uniform(4), None, grid, order=True
    )
    np.testing.assert_array_equal(kernel.unpacked(), again.codes)
    # Nobody's expert, in both layers, three kernels each; its rounding is to nearest.
    assert any("1 of 3 experts saw no token" in note and "5 more" in note for note in last.notes)
    np.testing.assert_array_equal(again.codes[2], jnp.round(w[2] / grid.scale[2] + grid.zero[2]))


def test_a_full_rank_correction_gives_the_weights_back(rounded, params, batches):
    """Also of experts, singular ones aside; then in pieces: the base is still packed, and all bits are counted."""
    model, flat, last = rounded
    method = EoRA(rank=WIDTH, factor_dtype="float32")
    *_, repaired = Chain((method,)).run(model, last.params, batches, original=flat)
    layer, exact = repaired.params["layer_1"], flat["layer_1"]
    for name in ("query", "key", "value", "output"):
        kernel = layer["attention"][name]["kernel"]
        assert isinstance(kernel, Sum) and isinstance(kernel.terms[0], Quantized)
        np.testing.assert_allclose(kernel.materialize(), exact["attention"][name]["kernel"], atol=2e-5)
        # Codes of 4 bits; a scale of 16 and a zero of 8 bits for each of 8 outputs; two factors of float32.
        assert kernel.stored_bits() == 64 * 4 + 8 * 24 + 2 * 64 * 32
    unseen = layer["mlp"]["experts"]["up"]["kernel"].materialize()[2]
    np.testing.assert_allclose(unseen, exact["mlp"]["experts"]["up"]["kernel"][2], atol=2e-5)
    assert any("saw no token: corrected by plain SVD" in note for note in repaired.notes)
    # In chains, of which every step is smaller than the model; what is not a kernel of a block stays.
    chain = Chain((FineQuant(4), EoRA(1, "plain", factor_bits=8, factor_dtype="float32")))
    fine, plain_svd = chain.run(SCANNED, params, ())
    kernel = plain_svd.params["layer_0"]["attention"]["query"]["kernel"]
    assert isinstance(kernel.terms[1], LowRank) and isinstance(kernel.terms[1].down, Quantized)
    assert stored_bits(fine.params) < stored_bits(plain_svd.params) < stored_bits(flat)
    routers = [tree["layer_0"]["mlp"]["router"]["kernel"] for tree in (plain_svd.params, flat)]
    np.testing.assert_array_equal(*routers)


def test_experts_are_rounded_in_the_groups_that_the_worst_of_them_needs(params):
    """FineQuant of an MoE model: the stack of `up`, one of whose experts has a row of outliers, in groups of two
    inputs; every other matrix by channels. Each expert is what rounding it by itself gives, in products as well."""
    model, flat = unrolled(SCANNED, params)
    name = ("layer_0", "mlp", "experts", "up")
    kernel = flat["layer_0"]["mlp"]["experts"]["up"]["kernel"]
    planted = replace(flat, {"/".join((*name, "kernel")): kernel.at[1, 3].multiply(50)})
    (step,) = Chain((FineQuant(4, smallest=2, alpha=0.6),)).run(model, planted, ())
    assert step.notes == ["groups: 2 of 8 inputs in 1, 8 of 8 inputs in 13 kernels"]
    experts = step.params["layer_0"]["mlp"]["experts"]
    assert (experts["up"]["kernel"].group, experts["down"]["kernel"].group) == (2, 8)
    wanted = planted["layer_0"]["mlp"]["experts"]["up"]["kernel"]
    for number in range(EXPERTS):
        alone = quantize(wanted[number], 4, 2, scale_dtype=jnp.float16)
        mine = jax.tree.map(lambda leaf: leaf[number], experts["up"]["kernel"])  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, mine, alone)
    by_channel = np.asarray(quantize(wanted, 4).materialize() - wanted)[1]
    in_groups = np.asarray(experts["up"]["kernel"].materialize() - wanted)[1]
    assert np.linalg.norm(in_groups) < 0.6 * np.linalg.norm(by_channel)
    x = jnp.arange(EXPERTS * 2 * WIDTH, dtype=jnp.float32).reshape(EXPERTS, 2, WIDTH)
    by_expert = jnp.einsum("enk,eko->eno", x, experts["up"]["kernel"].materialize())
    np.testing.assert_allclose(jax.vmap(dot)(x, experts["up"]["kernel"]), by_expert, rtol=1e-5, atol=1e-4)


def test_mistakes_are_one_line(params, batches):
    model, flat = unrolled(SCANNED, params)
    short = [{"tokens": batches[0]["tokens"][:1, :6]}]
    calls = {
        "eora repairs what was compressed before, and nothing was": lambda: run((EoRA(1),)),
        "layer_0/attention/key/kernel: rank=9: .* 8 by 8": lambda: run((RoundToNearest(4), EoRA(9, "plain"))),
        "rounds arrays, and layer_0/attention/key/kernel is Quantized": lambda: run(
            (FineQuant(4), FineQuant(3))
        ),
        "calibration data is empty": lambda: run((GPTQ(4),), ()),
        "layer_0: calibration data too short: .* 8 inputs and saw 6": lambda: run((GPTQ(4),), short),
        "layer_0/attention/key/kernel: group=3 does not divide the 8": lambda: run((RoundToNearest(4, 3),)),
        "bits=5 is not supported": lambda: GPTQ(5),
        "clips=0": lambda: GPTQ(4, clips=0),
        "alpha=2": lambda: FineQuant(4, alpha=2),
        "turns=0": lambda: DecoupleQ(turns=0),
        "space='eigne'": lambda: EoRA(1, "eigne"),
        "no compression method 'finquant'; did you mean finequant": lambda: make_methods(["finquant"], {}),
        "rank=8: none of gptq has this option": lambda: make_methods(["gptq"], {"rank": 8}),
        "can't be walked block by block": lambda: Walk(model.blocks[0], flat, batches),
        "select='nothing' is found in no path": lambda: run((RoundToNearest(4, select="nothing"),)),
        "at least one method": lambda: Chain(()),
        "rows of 12 tokens": lambda: dataclasses.replace(text, tokens=1 << 40).batches(model, None),
        "and the model knows 16": lambda: text.batches(model, None),
    }
    text = Chain((GPTQ(4),), sources="arithmetic", tokens=96, length=12)

    def run(methods, data=batches):
        for _ in Chain(methods).run(model, flat, data):
            pass

    for match, call in calls.items():
        with pytest.raises(UserError, match=match):
            call()
