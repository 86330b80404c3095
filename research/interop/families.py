"""The text families of transformers as configurations of DecoderLM.

A `Family` says what its `config.json` can express and `read_config` builds the DecoderLM; `research.interop.members` is
the way back. Entries that transformers does not read for a
family are ignored, as there; entries that change what is computed are honoured or refused.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from research.errors import UserError, nearest
from research.interop import experts as sparse
from research.interop import mamba2
from research.interop.experts import Experts
from research.interop.fields import Fields
from research.interop.rope import read_rotary
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Causal, Window
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
}
_WINDOW_SWITCH = {"use_sliding_window": False, "max_window_layers": 28}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}


_QWEN_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False}


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` can express.

    Args:
        model_type, architecture: the names in `config.json`.
        windows: no window, one window for all layers (if `use_sliding_window` where that is an entry), or for the
            layers named in `layer_types`.
        bias: biases of the attention: none; of query, key and value ("qkv_bias": if that entry says so); or of all
            four projections or none.
        mlp_bias: whether the FFN may have biases.
        query_key_norm: whether queries and keys are normalised, each head or all heads together.
        gemma: norms around both branches with scales stored minus one, embeddings times sqrt(width), a free
            scale of the scores.
        attention_softcap, logit_softcap: which soft caps may be set.
        local_rope: windowed layers have a rotary base of their own.
        base: of the rotary embedding where no entry gives one.
        experts: how its experts are described, None where FFNs are dense.
        recurrent: it is Mamba-2 (`research.interop.mamba2`), which the fields about attention say nothing of.
        defaults: of entries that may be absent.
    """

    model_type: str
    architecture: str
    windows: Literal["none", "all", "some"]
    bias: Literal["none", "qkv", "qkv_bias", "all"]
    mlp_bias: bool = False
    query_key_norm: Literal[None, "head", "heads"] = None
    gemma: bool = False
    attention_softcap: bool = False
    logit_softcap: bool = False
    local_rope: bool = False
    base: float = 10_000.0
    experts: Experts | None = None
    recurrent: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def activation(self) -> str:
        """The entry that names the activation."""
        if self.experts is not None and self.experts.attention:
            return "activation_function"
        return "hidden_activation" if self.gemma else "hidden_act"

    @property
    def window_switch(self) -> bool:
        """Whether `use_sliding_window` must be true for windows."""
        return "use_sliding_window" in self.defaults


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", windows="none", bias="all", mlp_bias=True),
        Family("mistral", "MistralForCausalLM", windows="all", bias="none"),
        Family("qwen2", "Qwen2ForCausalLM", windows="some", bias="qkv", defaults=_WINDOW_SWITCH),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            windows="some",
            bias="all",
            query_key_norm="head",
            defaults={"head_dim": 128, **_WINDOW_SWITCH},
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
            query_key_norm="head",
            gemma=True,
            logit_softcap=True,
            local_rope=True,
            defaults={**_GEMMA_DEFAULTS, "sliding_window_pattern": 6},
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            windows="all",
            bias="none",
            experts=sparse.MIXTRAL,
            base=1_000_000.0,
            defaults={
                "num_experts_per_tok": 2,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
            },
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            windows="some",
            bias="qkv_bias",
            experts=sparse.QWEN2,
            defaults={
                **_WINDOW_SWITCH,
                **_QWEN_EXPERTS,
                "moe_intermediate_size": 1408,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "qkv_bias": True,
                "shared_expert_intermediate_size": 5632,
            },
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            windows="all",
            bias="all",
            query_key_norm="head",
            experts=sparse.QWEN3,
            defaults={
                **_WINDOW_SWITCH,
                **_QWEN_EXPERTS,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
            },
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            windows="none",
            bias="all",
            query_key_norm="heads",
            experts=sparse.OLMOE,
            defaults={
                "clip_qkv": None,
                "norm_topk_prob": False,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "rms_norm_eps": 1e-5,
            },
        ),
        Family(
            "jetmoe",
            "JetMoeForCausalLM",
            windows="none",
            bias="none",
            experts=sparse.JETMOE,
            defaults={
                "activation_function": "silu",
                "kv_channels": 128,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 16,
                "num_local_experts": 8,
                "tie_word_embeddings": True,
            },
        ),
        Family(
            "mamba2",
            "Mamba2ForCausalLM",
            windows="none",
            bias="none",
            recurrent=True,
            defaults=mamba2.DEFAULTS,
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
    if family.recurrent:
        return family, mamba2.read_decoder(config)
    width, epsilon = config.integer("hidden_size"), config.number("rms_norm_eps")
    types = _layer_types(config, family)
    experts = family.experts
    sparse_layers = [False] * len(types)
    if experts is not None:
        sparse_layers = sparse.sparse_layers(config, experts, len(types))
    if experts is not None and experts.attention:
        rotary = read_rotary(config, None, family.base)
        make = functools.partial(_jetmoe_block, config, family, rotary)
    else:
        make = functools.partial(_block, config, family, width, epsilon, _window(config, types))
    layers = list(zip(types, sparse_layers, strict=True))
    period = next(
        p for p in range(1, len(layers) + 1) if all(t == layers[i % p] for i, t in enumerate(layers))
    )
    return family, DecoderLM(
        blocks=tuple(make(layer_type, sparse_layer) for layer_type, sparse_layer in layers[:period]),
        num_layers=len(layers),
        vocab_size=config.integer("vocab_size"),
        width=width,
        max_length=config.integer("max_position_embeddings"),
        final_norm=RMSNorm(epsilon, unit_offset=family.gemma),
        tied_head=config.boolean("tie_word_embeddings"),
        embedding_multiplier=width**0.5 if family.gemma else 1.0,
        logit_softcap=config.optional_number("final_logit_softcapping") if family.logit_softcap else None,
    )


def _window(config: Fields, types: list[str]) -> int | None:
    if SLIDING not in types:
        return None
    window = config.optional_integer("sliding_window")
    if window is None:
        raise config.refuse("sliding_window", None, "a whole number, as some layers are windowed")
    return window


def _block(
    config: Fields,
    family: Family,
    width: int,
    epsilon: float,
    window: int | None,
    layer_type: str,
    experts: bool,
) -> Block:
    heads = config.integer("num_attention_heads")
    kv_heads = config.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise config.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    head_dim = config.optional_integer("head_dim") or width // heads
    if head_dim < 2 or head_dim % 2:
        raise config.refuse("head_dim", head_dim, "an even number")
    if family.query_key_norm == "heads" and head_dim * heads != width:
        raise config.refuse("head_dim", head_dim, f"hidden_size / num_attention_heads, {width / heads:g}")

    def norm(axes: int = 1) -> RMSNorm:
        return RMSNorm(epsilon, unit_offset=family.gemma, axes=axes)

    axes = {None: 0, "head": 1, "heads": 2}[family.query_key_norm]
    own_base = not family.local_rope or layer_type == SLIDING
    everywhere = family.bias == "all" and config.boolean("attention_bias")
    inner = family.bias == "qkv" or (family.bias == "qkv_bias" and config.boolean("qkv_bias"))
    attention = Attention(
        num_heads=heads,
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        rule=Window(window) if layer_type == SLIDING else Causal(),
        rotary=read_rotary(
            config, layer_type if family.local_rope else None, family.base if own_base else 1_000_000.0
        ),
        query_norm=norm(axes) if axes else None,
        key_norm=norm(axes) if axes else None,
        scale=config.number("query_pre_attn_scalar") ** -0.5 if family.gemma else None,
        softcap=config.optional_number("attn_logit_softcapping") if family.attention_softcap else None,
        use_bias=inner or everywhere,
        output_bias=everywhere,
    )
    activation = config.choice(family.activation, ACTIVATIONS)
    if experts:
        mlp = sparse.read_moe(config, family.experts, activation)
    else:
        mlp = GatedMLP(
            hidden_dim=config.integer("intermediate_size"),
            activation=activation,
            use_bias=family.mlp_bias and config.boolean("mlp_bias"),
        )
    return Block(attention, mlp, norm(), post_norms=family.gemma)


def _jetmoe_block(config: Fields, family: Family, rotary: Rotary, layer_type: str, experts: bool) -> Block:
    activation = config.choice(family.activation, ACTIVATIONS)
    return sparse.read_jetmoe_block(config, family.experts, activation, rotary)


def _refuse_unsupported(config: Fields, family: Family) -> None:
    for name, reason in {
        "quantization_config": "quantized parts of a checkpoint are not read; convert to float32, float16 or bfloat16",
        "per_layer_config": "settings per layer are not supported",
        "auto_map": "the directory brings model code of its own, which is never run",
    }.items():
        if config.entries.get(name):
            raise UserError(f"{config.where}: {name} is set: {reason}")
    if family.gemma and config.raw("use_bidirectional_attention"):
        raise config.refuse("use_bidirectional_attention", True, "false: the decoder is causal")
    if "clip_qkv" in family.defaults and config.raw("clip_qkv") is not None:
        raise config.refuse(
            "clip_qkv", config.raw("clip_qkv"), "null: queries, keys and values are not clipped"
        )
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
        windowed = config.boolean("use_sliding_window") if family.window_switch else True
        if given is not None and (windowed or SLIDING not in given):
            return given
        if given is not None:
            raise config.refuse("use_sliding_window", False, "true, as layer_types has windowed layers")
        return [SLIDING if windowed and _slides(config, family, i) else FULL for i in range(count)]
    windowed = family.windows == "all" and config.raw("sliding_window") is not None
    windowed = windowed and (not family.window_switch or config.boolean("use_sliding_window"))
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
    if family.model_type == "qwen2_moe":  # as transformers computes it: other layers than in qwen2
        return layer % 2 == 0 and layer < first
    return layer >= first
