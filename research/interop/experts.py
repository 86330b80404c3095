"""Mixtures of experts as `config.json` and the files describe them: what the families of sparse models have and the
dense ones have not, and JetMoE, whose attention is sparse too."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.interop.fields import Fields
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.moe.routing import UNIT_SUM_NORMS
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block

Names = Mapping[str, tuple[str, tuple[int, int]]]

# transformers gives the norms of JetMoE's layers this epsilon whatever `rms_norm_eps` says, which the last norm has.
JETMOE_EPSILON = 1e-6

_WHOLE = (0, 1)
_FIRST, _SECOND = (0, 2), (1, 2)


@dataclasses.dataclass(frozen=True)
class Experts:
    """How the experts of a family are described.

    Args:
        names: where the parameters of a layer are in files: our module -> the tensor below `model.layers.0.`, with
            `*` for the number of an expert, and which of its equal parts.
        number: the entry with how many there are; `num_experts` and `num_local_experts` are read alike.
        width: the entry with the hidden units of one.
        renormalised: whether the gates of a token add up to 1; None: as `norm_topk_prob` says.
        shared: whether there is an expert for all tokens, behind a sigmoid.
        some_layers: whether layers may be dense.
        attention: whether queries and outputs of the attention are experts too, and sums have a bias.
    """

    names: Names
    number: str = "num_experts"
    width: str = "moe_intermediate_size"
    renormalised: bool | None = None
    shared: bool = False
    some_layers: bool = False
    attention: bool = False


_QWEN = {
    "mlp/router": ("mlp.gate.weight", _WHOLE),
    "mlp/experts/gate": ("mlp.experts.*.gate_proj.weight", _WHOLE),
    "mlp/experts/up": ("mlp.experts.*.up_proj.weight", _WHOLE),
    "mlp/experts/down": ("mlp.experts.*.down_proj.weight", _WHOLE),
    "mlp/shared/gate": ("mlp.shared_expert.gate_proj.weight", _WHOLE),
    "mlp/shared/up": ("mlp.shared_expert.up_proj.weight", _WHOLE),
    "mlp/shared/down": ("mlp.shared_expert.down_proj.weight", _WHOLE),
    "mlp/shared_gate": ("mlp.shared_expert_gate.weight", _WHOLE),
}
_MIXTRAL = {
    "mlp/router": ("block_sparse_moe.gate.weight", _WHOLE),
    "mlp/experts/gate": ("block_sparse_moe.experts.*.w1.weight", _WHOLE),
    "mlp/experts/up": ("block_sparse_moe.experts.*.w3.weight", _WHOLE),
    "mlp/experts/down": ("block_sparse_moe.experts.*.w2.weight", _WHOLE),
}
_JETMOE = {
    "mlp": ("mlp.bias", _WHOLE),
    "mlp/router": ("mlp.router.layer.weight", _WHOLE),
    "mlp/experts/gate": ("mlp.input_linear.weight", _FIRST),
    "mlp/experts/up": ("mlp.input_linear.weight", _SECOND),
    "mlp/experts/down": ("mlp.output_linear.weight", _WHOLE),
    "attention": ("self_attention.experts.bias", _WHOLE),
    "attention/router": ("self_attention.experts.router.layer.weight", _WHOLE),
    "attention/experts/query": ("self_attention.experts.input_linear.weight", _WHOLE),
    "attention/experts/output": ("self_attention.experts.output_linear.weight", _WHOLE),
    "attention/key": ("self_attention.kv_proj.weight", _FIRST),
    "attention/value": ("self_attention.kv_proj.weight", _SECOND),
}
# All families but JetMoE as transformers 5 holds them in memory, and writes them on request.
_STACKED = {
    **_QWEN,
    "mlp/experts/gate": ("mlp.experts.gate_up_proj", _FIRST),
    "mlp/experts/up": ("mlp.experts.gate_up_proj", _SECOND),
    "mlp/experts/down": ("mlp.experts.down_proj", _WHOLE),
}

MIXTRAL = Experts(_MIXTRAL, "num_local_experts", "intermediate_size", renormalised=True)
QWEN2 = Experts(_QWEN, shared=True, some_layers=True)
QWEN3 = Experts(_QWEN, some_layers=True)
OLMOE = Experts(_QWEN, width="intermediate_size")
JETMOE = Experts(_JETMOE, "num_local_experts", "intermediate_size", renormalised=True, attention=True)


def as_stored(experts: Experts, names: list[str]) -> Experts:
    """The experts with the names that these tensors go by: one by one, or stacked."""
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    return dataclasses.replace(experts, names=_STACKED) if stacked else experts


# Reading


def read_number(config: Fields, experts: Experts) -> int:
    """How many experts a layer has."""
    other = "num_experts" if experts.number == "num_local_experts" else "num_local_experts"
    return config.integer(experts.number if config.entries.get(other) is None else other)


def sparse_layers(config: Fields, experts: Experts, count: int) -> list[bool]:
    """Which of `count` layers have experts."""
    if not experts.some_layers:
        return [True] * count
    step, dense = config.integer("decoder_sparse_step"), config.raw("mlp_only_layers") or []
    whole = isinstance(dense, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in dense)
    if not whole:
        raise config.refuse("mlp_only_layers", dense, "a list of layers, counted from 0")
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def read_moe(config: Fields, experts: Experts, activation: str) -> MoE:
    """The FFN of a sparse layer."""
    number, k = read_number(config, experts), config.integer("num_experts_per_tok")
    if k > number:
        raise config.refuse("num_experts_per_tok", k, f"at most {number}, the number of experts")
    renormalised = experts.renormalised
    if renormalised is None:
        renormalised = config.boolean("norm_topk_prob")
    shared = None
    if experts.shared:
        shared = GatedMLP(config.integer("shared_expert_intermediate_size"), activation)
    return MoE(
        num_experts=number,
        k=k,
        hidden_dim=config.integer(experts.width),
        activation=activation,
        norm="topk_softmax" if renormalised else "softmax_topk",
        shared=shared,
        gate_shared=experts.shared,
        output_bias=experts.attention,
    )


def read_jetmoe_block(config: Fields, experts: Experts, activation: str, rotary: Rotary) -> Block:
    """A layer of JetMoE."""
    head_dim = config.integer("kv_channels")
    if head_dim % 2:
        raise config.refuse("kv_channels", head_dim, "an even number")
    mlp = read_moe(config, experts, activation)
    attention = MixtureOfAttention(
        num_experts=mlp.num_experts,
        k=mlp.k,
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=head_dim,
        rotary=rotary,
    )
    return Block(attention, mlp, RMSNorm(JETMOE_EPSILON))


# Writing


def foreign_experts(mlp: MoE) -> dict[str, str]:
    """Options of a layer that no family has -> what the families have instead."""
    found = {}
    for name, standard, instead in (
        ("gated", True, "gated experts"),
        ("use_bias", False, "experts without biases"),
        ("router_bias", False, "routers without a bias"),
        ("ranks", None, "the k best experts"),
        ("capacity_factor", None, "room for every token: nothing is dropped"),
    ):
        if getattr(mlp, name) != standard:
            found[f"MoE.{name}={getattr(mlp, name)}"] = instead
    if mlp.norm not in (*UNIT_SUM_NORMS, "softmax_topk"):
        found[f"MoE.norm={mlp.norm!r}"] = "gates from a softmax"
    if mlp.shared is not None and not (type(mlp.shared) is GatedMLP and mlp.gate_shared):
        found["MoE.shared"] = "a GatedMLP behind a sigmoid (gate_shared)"
    elif mlp.shared is not None and (mlp.shared.use_bias or mlp.shared.activation != mlp.activation):
        found["MoE.shared"] = "a shared expert like the others, without biases and with their activation"
    return found


def renormalised(mlp: MoE) -> bool:
    """Whether the gates of a token add up to 1."""
    return mlp.norm in UNIT_SUM_NORMS


def write_experts(experts: Experts, blocks: list[Block], widths: Mapping[str, int]) -> dict[str, Any]:
    """The entries of `config.json` about experts. widths: of "mlp" (dense layers), "experts" and "shared"."""
    mlp = next(block.mlp for block in blocks if isinstance(block.mlp, MoE))
    config = {
        experts.number: mlp.num_experts,
        "num_experts_per_tok": mlp.k,
        "intermediate_size": widths.get("mlp", widths["experts"]),
        experts.width: widths["experts"],
    }
    if experts.renormalised is None:
        config["norm_topk_prob"] = renormalised(mlp)
    if experts.shared:
        config["shared_expert_intermediate_size"] = widths["shared"]
    if experts.some_layers:
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [i for i, block in enumerate(blocks) if not isinstance(block.mlp, MoE)]
    return config


def check_number(config: Fields, experts: Experts, found: int) -> None:
    """Raises `UserError` where the tensors are of another number of experts than the entry says."""
    wanted = read_number(config, experts)
    if found and found != wanted:
        raise UserError(
            f"{config.where}: {experts.number} is {wanted}, but the tensors are of {found} experts"
        )
