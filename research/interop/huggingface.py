"""Hugging Face checkpoints in and out: `config.json` and safetensors, without torch and without pickle.

    model, variables, tokenizer = load("Qwen3-0.6B")
    report = save(model, variables, "exported", tokenizer=tokenizer, dtype="bfloat16")

Families: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 (text), Mixtral, Qwen 2 and 3 MoE, OLMoE, JetMoE and Mamba-2,
from the `config.json` of transformers 4 or 5. Kernels of GPTQ's and AWQ's checkpoints stay packed
(`research.interop.quantized_files`).
`expressible(model)` tells before training whether a model can be saved, and as what.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.interop.experts import as_stored, check_number
from research.interop.export import Export, expressible, save
from research.interop.families import FAMILIES, Family, read_config
from research.interop.fields import Fields, read_json
from research.interop.files import TensorFiles, cast, check_dtype, some
from research.interop.names import Stored, expert_count, layer_count, shapes, stored
from research.interop.quantized_files import ENTRY, PackedFiles, read_packing
from research.language.decoder import DecoderLM
from research.nn.weights import Kernel
from research.paths import expand
from research.training.paths import nested

__all__ = ["FAMILIES", "Export", "expressible", "is_huggingface", "load", "save"]

_HEAD = "lm_head.weight"


def is_huggingface(directory: str | Path) -> bool:
    """Whether a directory's `config.json` is of the Hugging Face kind: it names a `model_type`."""
    path = expand(directory) / "config.json"
    return path.is_file() and "model_type" in read_json(path)


def load(
    directory: str | Path, dtype: str | None = "float32"
) -> tuple[DecoderLM, dict[str, Any], Tokenizer | None]:
    """Reads a directory that transformers wrote.

    Args:
        directory: holds `config.json`, `model.safetensors` (or shards and their index), and maybe
            `tokenizer.json`.
        dtype: of the parameters: "float32", "float16" or "bfloat16"; None keeps what is stored, as packed kernels
            always do.

    Returns:
        The model, its variables {"params": ...} (`model.apply(variables, tokens)` gives float32 logits), and
        the tokenizer, None where there is no `tokenizer.json`.

    Raises:
        UserError: an unsupported family or option; a missing, unexpected or misshapen tensor; a damaged file.
    """
    check_dtype(dtype, ("float32", "float16", "bfloat16", None))
    directory = expand(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    config_path = directory / "config.json"
    entries = read_json(config_path)
    packing = read_packing(directory, entries)
    entries = {name: value for name, value in entries.items() if name != ENTRY}
    with TensorFiles(directory, packing and packing.file) as files:
        depth = layer_count(files.names)
        # Before the model is made: a depth that no file backs would take for ever.
        if isinstance(entries.get("model_type"), str) and entries["model_type"] in FAMILIES:
            family = FAMILIES[entries["model_type"]]
            config = Fields(entries, str(config_path), family.defaults)
            wanted = config.integer("num_hidden_layers")
            if wanted != depth:
                raise UserError(
                    f"{config_path}: num_hidden_layers is {wanted}, but the tensors are of {depth} layers"
                )
            if family.experts is not None:
                check_number(config, family.experts, expert_count(files.names))
        family, model = read_config(entries, str(config_path))
        if family.experts is not None:
            family = dataclasses.replace(family, experts=as_stored(family.experts, files.names))
        readable = files if packing is None else PackedFiles(files, packing)
        params = read_params(readable, family, model, dtype)
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
    return model, {"params": params}, tokenizer


def read_params(
    files: TensorFiles | PackedFiles, family: Family, model: DecoderLM, dtype: str | None
) -> dict[str, Any]:
    """The parameters of a decoder of a family. `files`: its tensors, or those of a part of a checkpoint."""
    packed = files if isinstance(files, PackedFiles) else None
    expected = shapes(model)
    places = {path: stored(path, shape, family) for path, shape in expected.items()}
    sizes = {
        name: place.tensor_shape(expected[path]) for path, place in places.items() for name in place.names
    }
    found = {
        name for name in files.names if not name.endswith("rotary_emb.inv_freq")
    }  # a buffer of old files
    table = places["embedding/table"].names[0]
    if model.tied_head and _HEAD in found and table in found:
        if not np.array_equal(files.read(_HEAD), files.read(table)):
            raise UserError(
                f"{files.directory}: {_HEAD} differs from {table}, but tie_word_embeddings is true"
            )
        found.discard(_HEAD)
    if missing := sorted(sizes.keys() - found):
        raise UserError(f"{files.directory}: missing tensors {some(missing)}{_instead(found - sizes.keys())}")
    if packed is not None:
        found -= {name for name in found - sizes.keys() if packed.empty(name)}
    if unexpected := sorted(found - sizes.keys()):
        raise UserError(
            f"{files.directory}: tensors that {family.model_type} doesn't have: {some(unexpected)}"
        )
    wrong = [
        f"{name} is {list(files.shape(name))} and config.json asks for {list(wanted)}"
        for name, wanted in sizes.items()
        if files.shape(name) != wanted
    ]
    if wrong:
        raise UserError(f"{files.directory}: {'; '.join(wrong[:4])}{_more(wrong)}")

    def read(place: Stored) -> Kernel:
        if packed is not None and any(map(packed.packed, place.names)):
            return _packed_kernel(packed, place)
        tensors = [files.read(name) for name in place.names]
        if dtype is not None:
            tensors = [cast(tensor, dtype, name) for tensor, name in zip(tensors, place.names, strict=True)]
        return jnp.asarray(place.assemble(tensors))

    return nested({path: read(place) for path, place in places.items()})


def _packed_kernel(files: PackedFiles, place: Stored) -> Kernel:
    apart = [name for name in place.names if not files.packed(name)]
    if apart or not place.transposed or place.depthwise or place.part != (0, 1):
        what = f"but not {some(apart)}" if apart else "which is no kernel of one projection"
        raise UserError(f"{files.directory}: {place.names[0]} is packed, {what}")
    return files.kernel(place.names, place.per_expert)


def _instead(surplus: set[str]) -> str:
    return f"; there are {some(sorted(surplus))} instead" if surplus else ""


def _more(wrong: list[str]) -> str:
    return f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
