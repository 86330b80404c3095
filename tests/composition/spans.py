"""Attention spans of MoA with the other parts."""

from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.cache import HeadGroups
from research.nn.masks import Window
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.sparse.moa.plan import Plan, Shape, apply_plan
from research.sparse.moa.rules import Grid, Rule
from research.training.model_directory import fingerprint

from .cells import HIDDEN, decoder, drafted_as_plain, init, louder, refused, runs


@runs(
    "MoA",
    "tree decoding (Medusa), mixture of experts, grouped queries",
    "two spans in a layer, rings that wrap behind the tree: the tokens of plain decoding",
)
def _(_):
    attention = Attention(num_heads=6, head_dim=4, num_kv_heads=3, rotary=Rotary())
    experts = MoE(num_experts=4, k=2, hidden_dim=HIDDEN, dispatch="dense")
    model = decoder(blocks=(Block(attention, experts),), num_layers=1)
    params = louder(init(model))
    rules = ((Rule(0, 0.25), Rule(0, 0.5), Rule(0, 0.25)),)
    plan = Plan(rules, Grid(sinks=2, block=2), Shape.of(model), fingerprint(params), (32,), 0.5)
    spread, moved = apply_plan(model, params, plan, 28)  # prompts of up to 6 tokens and 20 more
    cache = spread.init_cache(1, 64, margin=3).layers[0]
    assert isinstance(cache, HeadGroups) and [part.key.shape[2] for part in cache.parts] == [6 + 3, 14 + 3]
    drafted_as_plain("Medusa", spread, moved)


@refused("MoA", "layers that have windows already", "no layer of this model is causal Attention")
def _(_):
    Shape.of(decoder((Window(4),)))
