"""Which family a DecoderLM is a member of, why not of the others, and its `config.json`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from research.interop import experts as sparse
from research.interop import mamba2
from research.interop.experts import Experts
from research.interop.families import ACTIVATIONS, FAMILIES, FULL, SLIDING, Family
from research.interop.rope import write_scaling
from research.language.decoder import DecoderLM
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.masks import Causal, MaskRule, Window
from research.nn.rotary import Rotary
from research.nn.transformer import Block

Need = Callable[[bool, str], None]


def layers_of(model: DecoderLM) -> list[Block]:
    """The block of every layer."""
    return [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]


def _scalar(attention: Attention) -> int | None:
    """Gemma's `query_pre_attn_scalar`: the whole number whose inverse root is the scale, or None."""
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    scalar = round(scale**-2) if 0 < scale < math.inf else 0
    return scalar if scalar and scalar**-0.5 == scale else None


def _layer_type(rule: MaskRule) -> str:
    return SLIDING if isinstance(rule, Window) else FULL


def candidates(model: DecoderLM) -> list[Family]:
    """The families that have the kinds of layers that a model has."""
    blocks = layers_of(model)
    any_experts = any(isinstance(block.mlp, MoE) for block in blocks)
    attention = any(isinstance(block.attention, MixtureOfAttention) for block in blocks)
    return [
        family
        for family in FAMILIES.values()
        if not family.recurrent
        and (family.experts is not None) == (any_experts or attention)
        and (family.experts is not None and family.experts.attention) == attention
    ]


def obstacles(family: Family, model: DecoderLM) -> list[str]:
    """Why `model`, made of the standard parts, is not a member of one of its `candidates`; empty if it is."""
    name, blocks = family.model_type, layers_of(model)
    found = []

    def need(holds: bool, reason: str) -> None:
        if not holds:
            found.append(f"{name} {reason}")

    if family.experts is not None:
        _need_experts(family.experts, blocks, need)
    need(family.logit_softcap or model.logit_softcap is None, "has no soft cap of the logits")
    multiplier = model.width**0.5 if family.gemma else 1.0
    need(model.embedding_multiplier == multiplier, f"multiplies embeddings by {multiplier:.6g}")
    need(family.gemma == blocks[0].post_norms, _has(family.gemma, "norms after both branches (post_norms)"))
    need(
        family.gemma == blocks[0].norm.unit_offset,
        _has(family.gemma, "norm scales stored minus one (unit_offset)"),
    )
    if family.experts is not None and family.experts.attention:
        _need_attention_experts(blocks, need)
    else:
        _need_attention(family, model, blocks, need)
    return found


def _need_experts(experts: Experts, blocks: list[Block], need: Need) -> None:
    mixtures = [block.mlp for block in blocks if isinstance(block.mlp, MoE)]
    need(experts.some_layers or len(mixtures) == len(blocks), "has experts in every layer")
    for mlp in mixtures[:1]:
        if experts.renormalised:
            need(sparse.renormalised(mlp), "has gates that add up to 1 (norm)")
        need(
            experts.shared == (mlp.shared is not None),
            _has(experts.shared, "expert for all tokens (shared)", "an "),
        )
        need(
            experts.attention == mlp.output_bias,
            _has(experts.attention, "bias of the FFN (output_bias)", "a "),
        )


def _need_attention_experts(blocks: list[Block], need: Need) -> None:
    """JetMoE."""
    everywhere = all(isinstance(block.attention, MixtureOfAttention) for block in blocks)
    need(everywhere, "has experts in every attention")
    if not everywhere:
        return
    first = blocks[0].attention
    mlp = next((block.mlp for block in blocks if isinstance(block.mlp, MoE)), first)
    need((mlp.num_experts, mlp.k) == (first.num_experts, first.k), "has as many experts in attention and FFN")
    need(first.output_bias, "has a bias of the attention (output_bias)")
    need(sparse.renormalised(first), "has gates that add up to 1 (norm)")
    need(first.scale in (None, first.head_dim**-0.5), "scales scores by the inverse root of head_dim")
    need(isinstance(first.rule, Causal), "has no windowed layers")
    need(
        blocks[0].norm.epsilon == sparse.JETMOE_EPSILON,
        f"has layers with norms of epsilon {sparse.JETMOE_EPSILON}",
    )


def _need_attention(family: Family, model: DecoderLM, blocks: list[Block], need: Need) -> None:
    name, first = family.model_type, blocks[0].attention
    types = {_layer_type(block.attention.rule) for block in blocks}
    windowed = SLIDING in types
    need(family.windows != "none" or not windowed, "has no windowed layers")
    need(family.windows != "all" or len(types) == 1, "has windowed layers everywhere or nowhere")
    if family.bias == "none":
        need(not first.use_bias and not first.output_bias, "has no attention biases")
    elif family.bias == "qkv":
        need(
            first.use_bias and not first.output_bias,
            "has biases on query, key and value and none on the output",
        )
    elif family.bias == "qkv_bias":
        need(not first.output_bias, "has no bias on the output of the attention")
    else:
        need(first.use_bias == first.output_bias, "has biases on all four attention projections or on none")
    need(family.mlp_bias or not any(block.mlp.use_bias for block in blocks), "has no FFN biases")
    axes = 0 if first.query_norm is None else first.query_norm.axes
    norms = {
        None: "no query and key norms",
        "head": "query and key norms",
        "heads": "query and key norms over all heads",
    }
    need(
        {0: None, 1: "head", 2: "heads"}.get(axes) == family.query_key_norm,
        f"has {norms[family.query_key_norm]}",
    )
    if family.gemma:
        need(_scalar(first) is not None, "scales scores by the inverse root of a whole number")
    else:
        need(first.scale in (None, first.head_dim**-0.5), "scales scores by the inverse root of head_dim")
    need(family.attention_softcap or first.softcap is None, "has no soft cap of the scores")
    if family.query_key_norm == "heads":
        need(model.width == first.num_heads * first.head_dim, "needs a width of num_heads times head_dim")
    if name == "llama" or family.gemma:
        need(model.width % first.num_heads == 0, "needs a width that is a multiple of num_heads")
    ropes = _ropes(blocks)
    if family.local_rope:
        need(
            SLIDING not in ropes or ropes[SLIDING].scaling is None,
            "doesn't scale the positions of windowed layers",
        )
        truncated = getattr(ropes[FULL].scaling, "truncate", True) if FULL in ropes else True
        need(truncated, "has no truncate=False in YaRN")
    else:
        need(len(set(ropes.values())) == 1, "has one rotary embedding for all layers")


def _has(wanted: bool, what: str, article: str = "") -> str:
    return f"has {article}{what}" if wanted else f"has no {what}"


def _ropes(blocks: list[Block]) -> dict[str, Rotary]:
    return {_layer_type(block.attention.rule): block.attention.rotary for block in blocks}


def write_config(family: Family, model: DecoderLM, widths: Mapping[str, int]) -> dict[str, Any]:
    """The entries of `config.json` that say what is computed; the model must be a member of the family.

    widths: hidden units of "mlp" (dense FFNs), and of "experts" and "shared" where there are any.
    """
    if family.recurrent:
        named = {"model_type": family.model_type, "architectures": [family.architecture]}
        return named | mamba2.write_entries(model)
    blocks = layers_of(model)
    attention, mlp = blocks[0].attention, blocks[0].mlp
    ropes = _ropes(blocks)
    whole = ropes.get(FULL) or ropes[SLIDING]
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.final_norm.epsilon,
        "tie_word_embeddings": model.tied_head,
        "rope_theta": whole.base,
        "rope_scaling": write_scaling(whole),
        family.activation: next(theirs for theirs, ours in ACTIVATIONS.items() if ours == mlp.activation),
    }
    config["kv_channels" if isinstance(attention, MixtureOfAttention) else "head_dim"] = attention.head_dim
    if family.experts is None:
        config["intermediate_size"] = widths["mlp"]
    else:
        config |= sparse.write_experts(family.experts, blocks, widths)
    types = [_layer_type(block.attention.rule) for block in blocks]
    sizes = [block.attention.rule.size for block in blocks if isinstance(block.attention.rule, Window)]
    if family.windows != "none":
        config["sliding_window"] = sizes[0] if sizes else None
    if family.windows == "some":
        config["layer_types"] = types
    if family.window_switch:
        config["use_sliding_window"] = bool(sizes)
    if family.bias == "all":
        config["attention_bias"] = attention.use_bias
    if family.bias == "qkv_bias":
        config["qkv_bias"] = attention.use_bias
    if family.mlp_bias:
        config["mlp_bias"] = mlp.use_bias
    if family.gemma:
        config["query_pre_attn_scalar"] = _scalar(attention)
        config["final_logit_softcapping"] = model.logit_softcap
        config["attn_logit_softcapping"] = attention.softcap
    if family.local_rope:
        config["rope_local_base_freq"] = ropes[SLIDING].base if SLIDING in ropes else 10_000.0
    return config
