"""The image blocks of CLIP checkpoints of transformers, from safetensors; nothing else of them is read.

    encoder, variables = load_clip("CLIP-ViT-B-16-laion2B-s34b-b88K")

model_type `clip` (of its two towers the text's is left alone) or `clip_vision_model`. Embeddings, the norms around the
blocks and projections stay behind: Meta-Transformer takes the blocks alone.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.interop.families import ACTIVATIONS
from research.interop.fields import Fields, read_json
from research.interop.files import TensorFiles, cast, check_dtype, some
from research.interop.names import flatten
from research.multimodal.meta_transformer import Encoder
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.transformer import Block
from research.paths import expand
from research.training.paths import nested

VISION_DEFAULTS = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_LAYER = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def read_block(config: Fields) -> Block:
    """The block of a vision_config."""
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    activation = config.choice("hidden_act", ACTIVATIONS | {"quick_gelu": "gelu_quick"})
    attention = Attention(heads, width // heads, rule=Full(), use_bias=True, output_bias=True)
    norm = LayerNorm(config.number("layer_norm_eps"))
    return Block(attention, MLP(config.integer("intermediate_size"), activation), norm)


def layer_tensor(path: str) -> str | None:
    """Theirs for `layer_i/.../leaf`, in a tower by itself; None for any other path."""
    layer = re.fullmatch(r"layer_(\d+)/(.+)/(kernel|bias|scale)", path)
    if layer is None:
        return None
    return f"encoder.layers.{layer[1]}.{_LAYER[layer[2]]}.{'bias' if layer[3] == 'bias' else 'weight'}"


def is_clip(directory: str | Path) -> bool:
    """Whether a directory that transformers wrote holds CLIP."""
    return read_json(expand(directory) / "config.json").get("model_type") in ("clip", "clip_vision_model")


def load_clip(directory: str | Path, dtype: str | None = "float32") -> tuple[Encoder, dict[str, Any]]:
    """The encoder and {"params": its blocks}; `jax.ShapeDtypeStruct((1, 2, width))` initialises it.

    Raises:
        UserError: another architecture, an unsupported option, a missing or misshapen tensor.
    """
    check_dtype(dtype, ("float32", "float16", "bfloat16", None))
    directory = expand(directory)
    where = str(directory / "config.json")
    entries = read_json(directory / "config.json")
    kind = entries.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{where}: model_type is {kind!r}; clip or clip_vision_model is expected")
    config = Fields(entries, where, VISION_DEFAULTS)
    if kind == "clip":
        config = config.section("vision_config", VISION_DEFAULTS) or Fields({}, where, VISION_DEFAULTS)
    encoder = Encoder(blocks=(read_block(config),), num_layers=config.integer("num_hidden_layers"))
    example = jax.ShapeDtypeStruct((1, 2, config.integer("hidden_size")), jnp.float32)
    expected = jax.eval_shape(encoder.init, jax.random.key(0), example)["params"]
    found = {}
    with TensorFiles(directory) as files:
        beyond = f"vision_model.encoder.layers.{encoder.num_layers}."
        if further := [name for name in files.names if name.startswith(beyond)]:
            raise UserError(
                f"{where}: num_hidden_layers is {encoder.num_layers}, but there are tensors {some(further)}"
            )
        for path, leaf in flatten(expected):
            name = f"vision_model.{layer_tensor(path)}"
            if name not in files.names:
                raise UserError(f"{directory}: missing tensor {name}; there are {some(sorted(files.names))}")
            theirs = leaf.shape[::-1]
            if files.shape(name) != theirs:
                raise UserError(
                    f"{directory}: {name} is {list(files.shape(name))} and config.json asks for {list(theirs)}"
                )
            array = files.read(name)
            found[path] = jnp.asarray((array if dtype is None else cast(array, dtype, name)).T)
    return encoder, {"params": nested(found)}
