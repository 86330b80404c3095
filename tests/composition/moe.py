"""Mixtures of experts with the other parts."""

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.generator import Generator
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.elastic.matformer import MatFormer, extract, parse_widths
from research.elastic.slicing import ElasticSpec
from research.interop import huggingface
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.moe.momentum import HeavyBall, MomentumBlock
from research.moe.placement.hecate import FSSDP
from research.moe.placement.task import ExpertPlacement
from research.moe.scmoe import self_contrast
from research.moe.selective_attention import SMHA
from research.moe.union import UoME
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from research.training.partitioning import make_mesh
from research.training.task import LanguageModelling

from .cells import (
    HIDDEN,
    KEY,
    NESTED,
    close,
    decoder,
    drafted_as_plain,
    init,
    logits,
    louder,
    make_batch,
    mean,
    nested,
    refused,
    runs,
    train,
)

# Union of Experts: heads that keep only their own tokens, with positions among these, and slices of an FFN.


def union(slices=UoME(2, 1, HIDDEN // 2, "silu", gated=True, use_bias=False), **fields):  # noqa: B008
    heads = SMHA(2, 4, 1, rotary=Rotary(), rope_positions="compact", capacity_factor=1.0)
    return decoder(blocks=(Block(heads, slices),), **fields)


@runs(
    "Union of Experts", "tree decoding", "drafted by Medusa, heads with slots: the tokens of plain decoding"
)
def _(_):
    drafted_as_plain("Medusa", union(), louder(init(union())))


@refused("Union of Experts", "decoding of ranked slices", "selection='ranked' looks at the whole sequence")
def _(_):
    model = union(UoME(2, 1, HIDDEN // 2, selection="ranked", capacity_factor=1.0))
    token = jnp.zeros((1, 1), jnp.int32)
    jax.eval_shape(lambda: model.init(KEY, token, model.init_cache(1, 4), method="extend"))


@runs(
    "Union of Experts",
    "MatFormer",
    "every slice is cut to its first units; extracted, it has the same logits",
)
def _(_):
    mat = MatFormer(LanguageModelling(union()), divisors=(4, 1))
    params = init(mat.model)
    cut_model, cut = extract(mat.model, params, parse_widths("1/4", mat))
    down = cut["layer_0"]["mlp"]["experts"]["down"]["kernel"]
    np.testing.assert_array_equal(down, params["layer_0"]["mlp"]["experts"]["down"]["kernel"][:, :2])
    np.testing.assert_array_equal(logits(cut_model, cut), logits(mat.model, mat.granularity(params, 0)))


@runs(
    "Union of Experts",
    "data, FSDP and tensor parallelism on 8 devices; scanned layers, rematerialised",
    "loss and parameters after a step equal those of one device; losses equal those of unrolled layers",
)
def _(_):
    task, params = LanguageModelling(union()), init(union())
    one, rows = train(task, params)
    spread, spread_rows = train(
        task, params, mesh=make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    )
    close(spread.params, one.params)
    close(mean(spread_rows[0]), mean(rows[0]))
    scanned = LanguageModelling(union(scan_layers=True, remat="dots"))
    metrics = jax.jit(scanned.loss)(scan_params(params, 1), make_batch(), KEY)
    close(mean(metrics), mean(rows[0]))


@refused("Union of Experts", "export", "the FFN is UoME, not GatedMLP or MoE")
def _(directory):
    huggingface.save(union(), {"params": init(union())}, directory / "export")


# Momentum from MoE layer to MoE layer, in layers that alternate with dense ones (GLaM).


def momentum(**fields):
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    experts = MoE(num_experts=4, k=2, hidden_dim=HIDDEN, dispatch="dense")
    sparse = MomentumBlock(attention, experts, momentum=HeavyBall(0.7))
    return decoder(blocks=(sparse, Block(attention, GatedMLP(HIDDEN))), num_layers=3, **fields)


@runs("MomentumSMoE", "MatFormer", f"every expert is cut to the width of the dense layers: {NESTED}")
def _(_):
    nested(momentum())


@runs(
    "MomentumSMoE",
    "tree decoding with virtual rows (Hidden Transfer)",
    "every node and joining row has a momentum of its own: the tokens of plain decoding",
)
def _(_):
    drafted_as_plain("Hidden Transfer", momentum(), louder(init(momentum())))


@refused("MomentumSMoE", "export", "the block is MomentumBlock, not Block")
def _(directory):
    huggingface.save(momentum(), {"params": init(momentum())}, directory / "export")


# JetMoE: experts in attention and FFN.


def jetmoe(num_layers=1):
    attention = MixtureOfAttention(4, 2, 2, 4, rotary=Rotary())
    blocks = (Block(attention, MoE(4, 2, HIDDEN, output_bias=True)),)
    return decoder(blocks=blocks, num_layers=num_layers)


@runs(
    "JetMoE",
    "tree decoding",
    "drafted by Medusa, keys and values shared: the tokens of plain decoding",
)
def _(_):
    drafted_as_plain("Medusa", jetmoe(), louder(init(jetmoe())))


@runs("JetMoE", "MatFormer", f"every FFN expert is cut, attention experts are not: {NESTED}")
def _(_):
    nested(jetmoe())


@runs(
    "JetMoE",
    "data, expert and tensor parallelism on 8 devices",
    "loss and parameters after a step equal those of one device; experts of attention and FFN lie in quarters",
)
def _(_):
    task = LanguageModelling(jetmoe())
    params = init(task.model)
    one, rows = train(task, params)
    spread, spread_rows = train(
        task, params, mesh=make_mesh(dict(data=2, expert=2, tensor=2), jax.devices()[:8])
    )
    for layer in (spread.params["layer_0"]["attention"], spread.params["layer_0"]["mlp"]):
        for projection in layer["experts"].values():
            kernel = projection["kernel"]
            assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    close(spread.params, one.params)
    close(mean(spread_rows[0]), mean(rows[0]))


@runs(
    "JetMoE",
    "extraction, transformers",
    "a submodel with narrower experts, exported and read back: the same logits",
)
def _(directory):
    model = jetmoe(2)
    small, cut = extract(model, init(model), ElasticSpec((0, 1), (2, 16)))
    assert huggingface.save(small, {"params": cut}, directory / "export").family == "jetmoe"
    again, variables, _ = huggingface.load(directory / "export")
    close(logits(again, variables["params"]), logits(small, cut))


# Experts placed anew in every step.


@runs(
    "Hecate",
    "JetMoE",
    "its FFN's experts placed, those of attention not: loss and parameters after a step on 8 devices, two replicas of "
    "four, equal those of one",
)
def _(_):
    task = LanguageModelling(jetmoe())
    params = init(task.model)
    one, rows = train(task, params)
    placed = ExpertPlacement(task, FSSDP(overlap=2, memory=1))
    mesh = make_mesh(dict(data=2, expert=4), jax.devices()[:8])
    spread, spread_rows = train(placed, placed.pack(params), mesh=mesh)
    close(placed.unpack(spread.params), one.params)
    close(mean(spread_rows[0]), mean(rows[0]))


@refused("Hecate", "Union of Experts", "no layer of the model has an FFN that is a mixture of experts")
def _(_):
    ExpertPlacement(LanguageModelling(union()))


# Self-contrast: two passes with a cache each.


@runs(
    "SCMoE",
    "tree decoding (prompt lookup)",
    "of JetMoE, whose attention is routed too: the contrasted tokens",
)
def _(_):
    model, params = self_contrast(jetmoe(2), louder(init(jetmoe(2))), beta=1.0, alpha=0.01)
    options = dict(max_new_tokens=20)
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]
    drafted = Generator(model, params, proposer=PromptLookup(num_tokens=3)).generate(prompts, **options)
    assert drafted.samples == Generator(model, params).generate(prompts, **options).samples


@refused("SCMoE", "a dense model", "has no MoE layer: there are no experts to contrast")
def _(_):
    self_contrast(decoder(), init(decoder()))
