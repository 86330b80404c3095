"""LLaVA-1.5-shaped checkpoints of transformers: a CLIP tower, two linear layers and a Llama, from safetensors.

    model, variables, tokenizer = load_llava("llava-1.5-7b-hf")

Families: model_type `llava` with a text_config of a family that `research.interop.huggingface` reads, and a
vision_config of `clip_vision_model`. Names of transformers 4 (`language_model.model.`, `vision_tower.`) and 5
(`model.language_model.`, `model.vision_tower.`) are read. Pictures are scaled by Pillow's bicubic filter, which differs
from torchvision's in the last bits of a pixel.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.interop.clip import VISION_DEFAULTS, layer_tensor, read_block
from research.interop.families import read_config
from research.interop.fields import Fields, read_json
from research.interop.files import TensorFiles, cast, check_dtype, some
from research.interop.huggingface import read_params
from research.interop.names import flatten
from research.multimodal.connectors import PatchProjection
from research.multimodal.media import CLIP_MEAN, CLIP_STD, Square
from research.multimodal.model import VLM
from research.multimodal.tower import Tower
from research.paths import expand
from research.training.paths import nested

_PREFIXES = {
    # transformers 4, whose head is inside the language model, and 5, where it is beside it.
    "language_model": (
        ("language_model.", ""),
        ("model.language_model.", "model."),
        ("lm_head.", "lm_head."),
    ),
    "vision_tower": (
        ("vision_tower.vision_model.", ""),
        ("model.vision_tower.vision_model.", ""),
        ("vision_tower.", ""),
        ("model.vision_tower.", ""),
    ),
    "multi_modal_projector": (("multi_modal_projector.", ""), ("model.multi_modal_projector.", "")),
}
# What transformers takes where an entry of the text is absent, as in the released files.
_LLAMA_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_VISION_TOP = {
    "positions": "embeddings.position_embedding.weight",
    "class_token": "embeddings.class_embedding",
    "projection/kernel": "embeddings.patch_embedding.weight",
    # The misspelling is theirs.
    "first_norm/scale": "pre_layrnorm.weight",
    "first_norm/bias": "pre_layrnorm.bias",
}


class _Part:
    """The tensors of one part of a checkpoint, under the names that they would have alone."""

    def __init__(self, files: TensorFiles, part: str):
        self._files, self.directory = files, files.directory
        self._own: dict[str, str] = {}
        for name in files.names:
            for prefix, alone in _PREFIXES[part]:
                if name.startswith(prefix):
                    self._own.setdefault(alone + name.removeprefix(prefix), name)
                    break

    @property
    def names(self) -> list[str]:
        return list(self._own)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(self._own[name])

    def read(self, name: str) -> np.ndarray:
        return self._files.read(self._own[name])


def load_llava(
    directory: str | Path, dtype: str | None = "float32"
) -> tuple[VLM, dict[str, Any], Tokenizer | None]:
    """Reads a directory that transformers wrote: `config.json` of model_type llava, safetensors, maybe
    `tokenizer.json`; arguments and results as of `research.interop.huggingface.load`.

    Raises:
        UserError: another architecture, an unsupported option, a missing, unexpected or misshapen tensor.
    """
    check_dtype(dtype, ("float32", "float16", "bfloat16", None))
    directory = expand(directory)
    where = str(directory / "config.json")
    entries = read_json(directory / "config.json")
    if entries.get("model_type") != "llava":
        raise UserError(f"{where}: model_type is {entries.get('model_type')!r}; llava is expected")
    sections = {name: entries.get(name) for name in ("text_config", "vision_config")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} is missing")
    text = {"model_type": "llama"} | sections["text_config"]
    if text["model_type"] == "llama":
        text = _LLAMA_DEFAULTS | text
    family, decoder = read_config(text, f"{where}, text_config")
    tower, planner = _read_tower(entries, sections["vision_config"], where)
    activation = entries.get("projector_hidden_act", "gelu")
    if activation != "gelu" or not entries.get("multimodal_projector_bias", True):
        raise UserError(f"{where}: the projector has gelu and biases here, not {activation}")
    model = VLM(
        decoder=decoder, planner=planner, tower=tower, connector=PatchProjection(decoder.width, layers=2)
    )
    with TensorFiles(directory) as files:
        known = [p for prefixes in _PREFIXES.values() for p, _ in prefixes]
        strange = [n for n in files.names if not any(n.startswith(p) for p in known)]
        if strange:
            raise UserError(f"{directory}: tensors that llava doesn't have: {some(sorted(strange))}")
        params = {
            "decoder": read_params(_Part(files, "language_model"), family, decoder, dtype),
            "tower": _read_tower_params(_Part(files, "vision_tower"), model, dtype),
            "connector": {"projection": _read_projector(_Part(files, "multi_modal_projector"), model, dtype)},
        }
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
    return model, {"params": params}, tokenizer


def _read_tower(entries: dict[str, Any], vision: dict[str, Any], where: str) -> tuple[Tower, Square]:
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise UserError(f"{where}: vision_config is of {kind}; clip_vision_model is expected")
    config = Fields(vision, f"{where}, vision_config", VISION_DEFAULTS)
    layers, size, patch = (config.integer(n) for n in ("num_hidden_layers", "image_size", "patch_size"))
    strategy = entries.get("vision_feature_select_strategy", "default")
    feature = entries.get("vision_feature_layer", -2)
    if strategy != "default" or not isinstance(feature, int) or not -layers - 1 <= feature < 0:
        raise UserError(
            f"{where}: patches of one layer, counted from the end, are expected, not "
            f"vision_feature_select_strategy={strategy!r} with vision_feature_layer={feature!r}"
        )
    block = read_block(config)
    tower = Tower(
        blocks=(block,),
        num_layers=layers,
        width=config.integer("hidden_size"),
        side=size // patch,
        class_token=True,
        feature=feature,
        patch_bias=False,
        pre_norm=block.norm,
        # Theirs never meets the last hidden state, which `feature` counts.
        post_norm=None,
    )
    planner = Square(patch=patch, side=size, padded=True, mean=CLIP_MEAN, std=CLIP_STD, exact=True)
    return tower, planner


def _expected(model: VLM, part: str) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten(shapes[part])}


def _read_tower_params(part: _Part, model: VLM, dtype: str | None) -> dict[str, Any]:
    patch = model.planner.patch
    found = {}
    read = set()
    for path, shape in _expected(model, "tower").items():
        name = layer_tensor(path) or _VISION_TOP[path]
        theirs = shape[::-1] if path.endswith("kernel") else shape
        if path == "projection/kernel":
            theirs = (shape[1], 3, patch, patch)
        elif path == "class_token":
            theirs = shape[1:]
        array = _take(part, name, theirs, dtype)
        if path == "projection/kernel":
            array = array.transpose(2, 3, 1, 0).reshape(shape)  # [out, 3, y, x] -> rows of y, x, channel
        elif path.endswith("kernel"):
            array = array.T
        found[path] = jnp.asarray(array.reshape(shape))
        read.add(name)
    # A buffer of old files, and a norm of the last state, which patches don't meet.
    unused = {"embeddings.position_ids", "post_layernorm.weight", "post_layernorm.bias"}
    _all_read(part, read | unused)
    return nested(found)


def _read_projector(part: _Part, model: VLM, dtype: str | None) -> dict[str, Any]:
    found, read = {}, set()
    for path, shape in _expected(model, "connector").items():
        _, layer, leaf = path.split("/")
        name = f"{layer}.{'weight' if leaf == 'kernel' else 'bias'}"
        array = _take(part, name, shape[::-1], dtype)
        found[f"{layer}/{leaf}"] = jnp.asarray(array.T if leaf == "kernel" else array)
        read.add(name)
    _all_read(part, read)
    return nested(found)


def _take(part: _Part, name: str, shape: tuple[int, ...], dtype: str | None) -> np.ndarray:
    if name not in part.names:
        raise UserError(f"{part.directory}: missing tensor {name}; there are {some(sorted(part.names))}")
    if part.shape(name) != shape:
        raise UserError(
            f"{part.directory}: {name} is {list(part.shape(name))} and config.json asks for {list(shape)}"
        )
    array = part.read(name)
    return array if dtype is None else cast(array, dtype, name)


def _all_read(part: _Part, names: set[str]) -> None:
    if unexpected := sorted(set(part.names) - names):
        raise UserError(f"{part.directory}: tensors that llava doesn't have: {some(unexpected)}")
