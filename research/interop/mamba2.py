"""Mamba-2 (`Mamba2ForCausalLM`) as a configuration of DecoderLM: blocks that are a mixer alone.

What a family of attention has a `Family` for is fixed here: one mixer for all layers, no FFN, no positions.
"""

import math
from typing import Any

from research.interop.fields import Fields
from research.language.decoder import DecoderLM
from research.nn.norm import RMSNorm
from research.nn.transformer import Block
from research.ssm.mamba2 import Mamba2

# What transformers takes where an entry is absent.
DEFAULTS: dict[str, Any] = {
    "chunk_size": 256,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 1 << 20,
    "n_groups": 8,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, math.inf],
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 32768,
}

_INFINITY = {"__float__": "Infinity"}  # as transformers 5 writes it

_TOP = {
    "embedding/table": "backbone.embeddings.weight",
    "final_norm/scale": "backbone.norm_f.weight",
    "head/kernel": "lm_head.weight",
}
_LEAVES = {
    "attention_norm/scale": "norm.weight",
    "attention/input/kernel": "mixer.in_proj.weight",
    "attention/input/bias": "mixer.in_proj.bias",
    "attention/conv/kernel": "mixer.conv1d.weight",
    "attention/conv/bias": "mixer.conv1d.bias",
    "attention/A_log": "mixer.A_log",
    "attention/D": "mixer.D",
    "attention/dt_bias": "mixer.dt_bias",
    "attention/norm/scale": "mixer.norm.weight",
    "attention/output/kernel": "mixer.out_proj.weight",
    "attention/output/bias": "mixer.out_proj.bias",
}


def tensor_name(path: str) -> str:
    """`layer_0/attention/input/kernel` -> `backbone.layers.0.mixer.in_proj.weight`."""
    if path in _TOP:
        return _TOP[path]
    layer, _, leaf = path.removeprefix("layer_").partition("/")
    return f"backbone.layers.{layer}.{_LEAVES[leaf]}"


def read_decoder(config: Fields) -> DecoderLM:
    """The model that a `config.json` describes; `max_position_embeddings`, which states do without, bounds decoding.

    Raises:
        UserError: an entry that is ill-typed, or changes what is computed in a way that `Mamba2` does not offer.
    """
    width, heads, head_dim = (config.integer(name) for name in ("hidden_size", "num_heads", "head_dim"))
    if config.integer("expand") * width != heads * head_dim:
        raise config.refuse("expand", config.raw("expand"), f"{heads} x {head_dim} / {width}")
    limit = config.raw("time_step_limit")
    if limit not in ([0.0, math.inf], [0.0, _INFINITY]):
        raise config.refuse("time_step_limit", limit, "0 to infinity: step sizes are not cut off")
    if heads % config.integer("n_groups"):
        raise config.refuse("n_groups", config.raw("n_groups"), f"a divisor of num_heads, {heads}")
    config.choice("hidden_act", {"silu": "silu", "swish": "silu"})
    epsilon = config.number("layer_norm_epsilon")
    mixer = Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        state_dim=config.integer("state_size"),
        num_groups=config.integer("n_groups"),
        conv_width=config.integer("conv_kernel"),
        chunk=config.integer("chunk_size"),
        norm_eps=epsilon,
        use_bias=config.boolean("use_bias"),
        conv_bias=config.boolean("use_conv_bias"),
    )
    return DecoderLM(
        blocks=(Block(mixer, None, RMSNorm(epsilon)),),
        num_layers=config.integer("num_hidden_layers"),
        vocab_size=config.integer("vocab_size"),
        width=width,
        max_length=config.integer("max_position_embeddings"),
        final_norm=RMSNorm(epsilon),
        tied_head=config.boolean("tie_word_embeddings"),
    )


def is_mamba2(model: DecoderLM) -> bool:
    """Whether any layer has the mixer, so that no family of attention is asked."""
    return any(isinstance(block.attention, Mamba2) for block in model.blocks)


def obstacles(model: DecoderLM) -> list[str]:
    """Why a decoder with a Mamba-2 layer is not a `Mamba2ForCausalLM`; empty if it is."""
    found = []

    def need(holds: bool, reason: str) -> None:
        if not holds:
            found.append(f"mamba2 {reason}")

    need(type(model) is DecoderLM, "is a plain DecoderLM")
    first = next(block.attention for block in model.blocks if isinstance(block.attention, Mamba2))
    need(all(block.attention == first for block in model.blocks), "has the same mixer in every layer")
    need(all(block.mlp is None for block in model.blocks), "has no FFN")
    norm = RMSNorm(first.norm_eps)
    alike = all(block.norm == norm and not block.post_norms for block in model.blocks)
    need(alike and model.final_norm == norm, f"has plain norms of the mixer's epsilon, {first.norm_eps:g}")
    need(first.inner % model.width == 0, "has an inner width that is a multiple of the model's (expand)")
    need(model.embedding_multiplier == 1.0, "multiplies no embeddings")
    need(model.logit_softcap is None, "has no soft cap of the logits")
    return found


def write_entries(model: DecoderLM) -> dict[str, Any]:
    """`config.json` but for its family; the model must have no `obstacles`."""
    mixer = model.blocks[0].attention
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.state_dim,
        "n_groups": mixer.num_groups,
        "expand": mixer.inner // model.width,
        "conv_kernel": mixer.conv_width,
        "chunk_size": mixer.chunk,
        "layer_norm_epsilon": mixer.norm_eps,
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_length,
        "tie_word_embeddings": model.tied_head,
    }
