"""The text families of transformers as configurations of DecoderLM, both ways.

A `Family` says what its `config.json` can express: `read_config` builds the DecoderLM, `obstacles` lists why
a DecoderLM is not a member, `write_config` is the way back. Entries that transformers does not read for a
family are ignored, as there; entries that change what is computed are honoured or refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from research.errors import UserError, nearest
from research.interop.experts import Experts
from research.interop.fields import Fields
from research.interop.rope import read_rotary, write_scaling
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Causal, MaskRule, Window
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block

FULL, SLIDING = "full_attention", "sliding_attention"

# Names of transformers' activations -> ours. The first name of each is the one written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}

# What transformers takes where an entry is absent, in every family.
_DEFAULTS = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": None,
    "hidden_act": "silu",
    "layer_types": None,
    "mlp_bias": False,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` can express.

    Args:
        model_type, architecture: the names in `config.json`.
        windows: no window, one window for all layers, or for the layers named in `layer_types`.
        bias: biases of the attention: none, of query, key and value, or of all four projections or none.
        mlp_bias: whether the FFN may have biases.
        query_key_norm: whether queries and keys are normalised.
        gemma: norms around both branches with scales stored minus one, embeddings times sqrt(width), a free
            scale of the scores.
        attention_softcap, logit_softcap: which soft caps may be set.
        local_rope: windowed layers have a rotary base of their own.
        experts: how its experts are described, None where FFNs are dense.
        defaults: of entries that may be absent.
    """

    model_type: str
    architecture: str
    windows: Literal["none", "all", "some"]
    bias: Literal["none", "qkv", "all"]
    mlp_bias: bool = False
    query_key_norm: bool = False
    gemma: bool = False
    attention_softcap: bool = False
    logit_softcap: bool = False
    local_rope: bool = False
    experts: Experts | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def activation(self) -> str:
        """The entry that names the activation."""
        return "hidden_activation" if self.gemma else "hidden_act"


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", windows="none", bias="all", mlp_bias=True),
        Family("mistral", "MistralForCausalLM", windows="all", bias="none"),
        Family("qwen2", "Qwen2ForCausalLM", windows="some", bias="qkv", defaults={"max_window_layers": 28}),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            windows="some",
            bias="all",
            query_key_norm=True,
            defaults={"head_dim": 128, "max_window_layers": 28},
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            windows="some",
            bias="all",
            gemma=True,
            attention_softcap=True,
            logit_softcap=True,
            defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            windows="some",
            bias="all",
            query_key_norm=True,
            gemma=True,
            logit_softcap=True,
            local_rope=True,
            defaults={**_GEMMA_DEFAULTS, "sliding_window_pattern": 6},
        ),
    )
}


# Reading


def family_of(entries: Mapping[str, Any], where: str) -> Family:
    """The family a `config.json` belongs to."""
    name = entries.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    supported = ", ".join(FAMILIES)
    if name == "gemma3":
        raise UserError(
            f"{where}: model_type gemma3 is the model of images and text, of which only the text part, "
            f"gemma3_text, is supported; supported: {supported}"
        )
    if name is None:
        raise UserError(f"{where}: model_type is missing; supported: {supported}")
    close = nearest(str(name), FAMILIES)
    hint = f" (the nearest is {close})" if close else ""
    raise UserError(f"{where}: model_type {str(name)[:80]} is not supported{hint}; supported: {supported}")


def read_config(entries: Mapping[str, Any], where: str) -> tuple[Family, DecoderLM]:
    """The family and the model that a `config.json` describes.

    Raises:
        UserError: an unknown family, a missing or ill-typed entry, or an entry that changes what is computed
            in a way that DecoderLM does not offer.
    """
    family = family_of(entries, where)
    config = Fields(entries, where, {**_DEFAULTS, **family.defaults})
    _refuse_unsupported(config, family)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise config.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    head_dim = config.optional_integer("head_dim") or width // heads
    if head_dim < 2 or head_dim % 2:
        raise config.refuse("head_dim", head_dim, "an even number")
    epsilon = config.number("rms_norm_eps")
    types = _layer_types(config, family)
    window = config.optional_integer("sliding_window") if SLIDING in types else None
    if SLIDING in types and window is None:
        raise config.refuse("sliding_window", None, "a whole number, as some layers are windowed")

    def norm() -> RMSNorm:
        return RMSNorm(epsilon, unit_offset=family.gemma)

    def block(layer_type: str) -> Block:
        rope_key = layer_type if family.local_rope else None
        base = 10_000.0 if not family.local_rope or layer_type == SLIDING else 1_000_000.0
        attention = Attention(
            num_heads=heads,
            head_dim=head_dim,
            num_kv_heads=kv_heads,
            rule=Window(window) if layer_type == SLIDING else Causal(),
            rotary=read_rotary(config, rope_key, base),
            query_norm=norm() if family.query_key_norm else None,
            key_norm=norm() if family.query_key_norm else None,
            scale=config.number("query_pre_attn_scalar") ** -0.5 if family.gemma else None,
            softcap=config.optional_number("attn_logit_softcapping") if family.attention_softcap else None,
            use_bias=family.bias == "qkv" or (family.bias == "all" and config.boolean("attention_bias")),
            output_bias=family.bias == "all" and config.boolean("attention_bias"),
        )
        mlp = GatedMLP(
            hidden_dim=config.integer("intermediate_size"),
            activation=config.choice(family.activation, ACTIVATIONS),
            use_bias=family.mlp_bias and config.boolean("mlp_bias"),
        )
        return Block(attention, mlp, norm(), post_norms=family.gemma)

    period = next(p for p in range(1, len(types) + 1) if all(t == types[i % p] for i, t in enumerate(types)))
    return family, DecoderLM(
        blocks=tuple(block(layer_type) for layer_type in types[:period]),
        num_layers=len(types),
        vocab_size=config.integer("vocab_size"),
        width=width,
        max_length=config.integer("max_position_embeddings"),
        final_norm=norm(),
        tied_head=config.boolean("tie_word_embeddings"),
        embedding_multiplier=width**0.5 if family.gemma else 1.0,
        logit_softcap=config.optional_number("final_logit_softcapping") if family.logit_softcap else None,
    )


def _refuse_unsupported(config: Fields, family: Family) -> None:
    for name, reason in {
        "quantization_config": "quantized checkpoints are not read; convert to float32, float16 or bfloat16",
        "per_layer_config": "settings per layer are not supported",
        "auto_map": "the directory brings model code of its own, which is never run",
    }.items():
        if config.entries.get(name):
            raise UserError(f"{config.where}: {name} is set: {reason}")
    if family.gemma and config.raw("use_bidirectional_attention"):
        raise config.refuse("use_bidirectional_attention", True, "false: the decoder is causal")
    if family.gemma and not family.attention_softcap and config.raw("attn_logit_softcapping") is not None:
        raise UserError(
            f"{config.where}: attn_logit_softcapping is set, which {family.model_type} doesn't compute"
        )


def _layer_types(config: Fields, family: Family) -> list[str]:
    count = config.integer("num_hidden_layers")
    given = config.raw("layer_types")
    if given is not None and not (isinstance(given, list) and len(given) == count):
        raise config.refuse("layer_types", given, f"null or a list of {count} names, one a layer")
    unknown = [name for name in given or () if name not in (FULL, SLIDING)]
    if unknown:
        raise config.refuse("layer_types", unknown[0], f"{FULL}, {SLIDING}")
    if family.windows == "some":
        windowed = config.boolean("use_sliding_window") if not family.gemma else True
        if given is not None and (windowed or SLIDING not in given):
            return given
        if given is not None:
            raise config.refuse("use_sliding_window", False, "true, as layer_types has windowed layers")
        return [SLIDING if windowed and _slides(config, family, i) else FULL for i in range(count)]
    windowed = family.windows == "all" and config.raw("sliding_window") is not None
    types = [SLIDING if windowed else FULL] * count
    if given is not None and given != types:
        raise UserError(
            f"{config.where}: layer_types asks for {set(given)}, but {family.model_type} has {types[0]} only"
        )
    return types


def _slides(config: Fields, family: Family, layer: int) -> bool:
    """Which layers are windowed where `layer_types` is absent (transformers before 4.53)."""
    if family.local_rope:
        return bool((layer + 1) % config.integer("sliding_window_pattern"))
    if family.gemma:
        return layer % 2 == 0
    first = config.raw("max_window_layers")
    if not isinstance(first, int) or isinstance(first, bool):
        raise config.refuse("max_window_layers", first, "a whole number")
    return layer >= first


# Writing


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


def obstacles(family: Family, model: DecoderLM) -> list[str]:
    """Why `model`, made of the standard parts, is not a member of the family; empty if it is."""
    name, blocks = family.model_type, layers_of(model)
    first = blocks[0].attention
    found = []

    def need(holds: bool, reason: str) -> None:
        if not holds:
            found.append(f"{name} {reason}")

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
    else:
        need(first.use_bias == first.output_bias, "has biases on all four attention projections or on none")
    need(family.mlp_bias or not blocks[0].mlp.use_bias, "has no FFN biases")
    need(
        family.query_key_norm == (first.query_norm is not None),
        _has(family.query_key_norm, "query and key norms"),
    )
    need(
        family.gemma == blocks[0].norm.unit_offset,
        _has(family.gemma, "norm scales stored minus one (unit_offset)"),
    )
    need(family.gemma == blocks[0].post_norms, _has(family.gemma, "norms after both branches (post_norms)"))
    multiplier = model.width**0.5 if family.gemma else 1.0
    need(model.embedding_multiplier == multiplier, f"multiplies embeddings by {multiplier:.6g}")
    if family.gemma:
        need(_scalar(first) is not None, "scales scores by the inverse root of a whole number")
    else:
        need(first.scale in (None, first.head_dim**-0.5), "scales scores by the inverse root of head_dim")
    need(family.attention_softcap or first.softcap is None, "has no soft cap of the scores")
    need(family.logit_softcap or model.logit_softcap is None, "has no soft cap of the logits")
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
    return found


def _has(wanted: bool, what: str) -> str:
    return f"has {what}" if wanted else f"has no {what}"


def _ropes(blocks: list[Block]) -> dict[str, Rotary]:
    return {_layer_type(block.attention.rule): block.attention.rotary for block in blocks}


def write_config(family: Family, model: DecoderLM, hidden_dim: int) -> dict[str, Any]:
    """The entries of `config.json` that say what is computed; the model must be a member of the family."""
    blocks = layers_of(model)
    attention, mlp = blocks[0].attention, blocks[0].mlp
    ropes = _ropes(blocks)
    whole = ropes.get(FULL) or ropes[SLIDING]
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": blocks[0].norm.epsilon,
        "tie_word_embeddings": model.tied_head,
        "rope_theta": whole.base,
        "rope_scaling": write_scaling(whole),
        family.activation: next(theirs for theirs, ours in ACTIVATIONS.items() if ours == mlp.activation),
    }
    types = [_layer_type(block.attention.rule) for block in blocks]
    sizes = [block.attention.rule.size for block in blocks if isinstance(block.attention.rule, Window)]
    if family.windows != "none":
        config["sliding_window"] = sizes[0] if sizes else None
    if family.windows == "some":
        config["layer_types"] = types
        if not family.gemma:
            config["use_sliding_window"] = bool(sizes)
    if family.bias == "all":
        config["attention_bias"] = attention.use_bias
    if family.mlp_bias:
        config["mlp_bias"] = mlp.use_bias
    if family.gemma:
        config["query_pre_attn_scalar"] = _scalar(attention)
        config["final_logit_softcapping"] = model.logit_softcap
        config["attn_logit_softcapping"] = attention.softcap
    if family.local_rope:
        config["rope_local_base_freq"] = ropes[SLIDING].base if SLIDING in ropes else 10_000.0
    return config
