"""Adapters on models of other families."""

import jax
import jax.numpy as jnp

from research.adapters.corda import CorDA
from research.adapters.lora import LoRA, PiSSA, adapted, flat, merge
from research.adapters.mole import MoLE
from research.adapters.pat import PAT
from research.elastic.matformer import extract
from research.elastic.slicing import ElasticSpec
from research.moe.layer import MoE
from research.nn.transformer import Block
from research.ssm.mamba2 import Mamba2

from .cells import HIDDEN, KEY, close, decoder, drafted_as_plain, init, logits, louder, refused, runs
from .quantized import int4, plain


def tuned(model, params, method=LoRA(rank=2, alpha=4.0)):  # noqa: B008
    """The parameters with an adapter whose factors are not 0."""
    fixed, terms = method.create(model, params, KEY)
    terms = jax.tree.map(lambda leaf: leaf + 0.2, terms)
    return adapted(flat(method.frozen(params, fixed)), flat(terms))


@runs("LoRA", "int4 weights, tree decoding (Medusa)", "the tokens of plain decoding")
def _(_):
    model = decoder()
    drafted_as_plain("Medusa", model, tuned(model, int4(init(model))))


@runs(
    "PiSSA", "mixture of experts, Mamba-2", "experts have factors each; logits are those of the merged model"
)
def _(_):
    mamba = Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=4)
    model = decoder(blocks=(Block(mamba, MoE(num_experts=4, k=2, hidden_dim=HIDDEN)),))
    params = tuned(model, louder(init(model)), PiSSA(rank=2))
    assert params["layer_0"]["mlp"]["experts"]["up"]["kernel"].terms[1].down.shape == (4, 8, 2)
    close(logits(model, params), logits(model, merge(params)[0]), 1e-4, 1e-4)


@runs("LoRA", "MatFormer", "a slice of the adapted model is the merged model's slice")
def _(_):
    model = decoder()
    params = tuned(model, louder(init(model)))
    cut_model, cut = extract(model, params, ElasticSpec((0,), (4,)))
    assert cut["layer_0"]["mlp"]["down"]["kernel"].terms[1].down.shape == (4, 2)
    _, wanted = extract(model, plain(params), ElasticSpec((0,), (4,)))
    close(plain(cut), wanted, 1e-6, 1e-6)


@runs(
    "LLaVA-MoLE",
    "tree decoding (Medusa)",
    "the tokens of plain decoding: a token goes to the same expert in a tree",
)
def _(_):
    method = MoLE(rank=2, alpha=4.0, num_experts=3, dropout=0.0)
    model = decoder()
    params = louder(init(model))
    fixed, adapter = method.create(model, params, KEY)
    keys = iter(jax.random.split(KEY, 99))
    adapter = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), adapter)
    run = {"base": params, "fixed": fixed, "adapter": adapter}
    drafted_as_plain("Medusa", method.model(model), method.unpack(run))


@refused("LLaVA-MoLE", "mixture of experts", "LoRA experts stand in MLP or GatedMLP, not in MoE")
def _(_):
    model = decoder(
        blocks=(Block(decoder().blocks[0].attention, MoE(num_experts=4, k=2, hidden_dim=HIDDEN)),)
    )
    MoLE().model(model)


@refused("PAT", "Mamba-2", "PAT stands behind attention and MLP or GatedMLP; there is Mamba2")
def _(_):
    mamba = Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=4)
    PAT().model(decoder(blocks=(Block(mamba, decoder().blocks[0].mlp),)))


@refused("CorDA", "int4 weights", "CorDA decomposes arrays, and layer_0/attention/key/kernel is Quantized")
def _(_):
    model = decoder()
    CorDA(rank=2, context=[]).create(model, int4(init(model)), jnp.uint32(0))
