"""A model directory: one trained model as plain files that any tool can read.

    config.json          the model's config, as `research.config.to_json` writes it
    model.safetensors    the parameters, float32 or bfloat16, named by `/`-joined path; of structured weights the
                         parts, exactly, and what they are parts of in its metadata (`research.training.structures`);
                         a CRC-32 of all of it is there too, and is checked when the file is read
    tokenizer.json       of the `tokenizers` library, where the model reads text
    README.md            the model card, where there is one
    experiment.json      the config of the run it was trained by, where it is known

Nothing in it is code: the config builds only what `research.config` allows, the arrays are read by the
safetensors library, and no pickle is ever opened.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from research import config as configs
from research.errors import UserError
from research.nn.weights import Weight
from research.training import checkpoint_files as files
from research.training.paths import PyTree, named_leaves, path_of
from research.training.structures import structures, with_structures

if TYPE_CHECKING:
    from research.data.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
EXPERIMENT = "experiment.json"
CHECKSUM = "crc32"  # in the metadata of the weights; files that were written without one are read unchecked
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
# Of the parts of structured weights.
STRUCTURED = {"F16": "float16", "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16"}
STRUCTURED |= {"I32": "int32", "U32": "uint32"}
TOKENS = (jax.ShapeDtypeStruct((1, 2), jnp.int32),)


@dataclass(frozen=True)
class Loaded:
    """A trained model: the linen module, its float32 parameters, and what belongs to them.

    config builds `model`; `tokenizer` is `None` for models that read no text; `step` is `None` for a model
    directory; `inputs` are the shapes that `model.init` is called with.
    """

    model: nn.Module
    params: PyTree
    tokenizer: "Tokenizer | None"
    config: ConfigDict
    step: int | None
    inputs: tuple[jax.ShapeDtypeStruct, ...]


def fingerprint(params: PyTree) -> str:
    """16 hex digits that change when any bit, shape or name of the parameters does. Taken of parameters as they
    were loaded, before anything fuses or casts them."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def read_config(path: Path) -> ConfigDict:
    """A saved config. Raises `UserError` naming the file if it is absent, malformed, or another project's."""
    try:
        config = configs.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if "model_type" in config and "cls" not in config:
        raise UserError(
            f"{path} is of Hugging Face: python -m experiments.convert --from={path.parent} --to=FOLDER --format=lathe "
            "makes a model directory of it"
        )
    return config


def abstract_params(model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]) -> PyTree:
    """Shapes and dtypes of the parameters that `model.init` makes for `inputs`; nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def load_tokenizer(directory: Path) -> "Tokenizer | None":
    """The tokenizer of a workdir or model directory, or `None` where there is none."""
    from research.data.tokenizer import Tokenizer

    return Tokenizer.load(directory / TOKENIZER) if (directory / TOKENIZER).exists() else None


def load_model_directory(directory: Path) -> Loaded:
    """Reads what `save_model` wrote; plain bfloat16 parameters become float32, exactly.

    Raises `UserError` for a config that builds no model, a damaged file, and a tensor that is missing, not
    expected, or of another shape than the model's; the tensor is named with both shapes.
    """
    config = read_config(directory / CONFIG)
    if "cls" not in config:
        raise UserError(f"{directory / CONFIG} is not a config of this project: it names no class (`cls`)")
    model = configs.build(config, str(directory / CONFIG))
    if not isinstance(model, nn.Module):
        raise UserError(f"{directory / CONFIG} builds a {type(model).__name__}, not a model")
    inputs, params = _read_weights(directory / WEIGHTS, model)
    return Loaded(model, params, load_tokenizer(directory), config, None, inputs)


def _read_weights(path: Path, model: nn.Module) -> tuple[tuple[jax.ShapeDtypeStruct, ...], PyTree]:
    import safetensors

    try:
        # Checks the header's length, the offsets and the sizes against the file before anything is read.
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            inputs = _inputs(path, metadata)
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
            found = {name: _Header(tuple(part.get_shape()), part.get_dtype()) for name, part in found.items()}
            expected = with_structures(_expected(path, model, inputs), _described(path, metadata), str(path))
            wanted, exact = named_leaves(expected), _structured(expected)
            if difference := files.mismatches(found, wanted, WEIGHTS, dtypes=False):
                raise UserError(f"{path} does not fit its config: {difference}")
            arrays, summed = [], _checksum(metadata)
            for name, leaf in wanted.items():
                stored = found[name].dtype
                if name in exact and stored != str(leaf.dtype):
                    raise UserError(f"{path}: {name} has type {stored}; {leaf.dtype} is described")
                if name not in exact and stored not in DTYPES.values():
                    raise UserError(
                        f"{path}: {name} has type {found[name].stored}; {' or '.join(DTYPES)} is expected"
                    )
                array = file.get_tensor(name)
                summed = _checksum_array(name, array, summed)
                arrays.append(jnp.asarray(array if name in exact else array.astype(np.float32)))
            if metadata.get(CHECKSUM, f"{summed:08x}") != f"{summed:08x}":
                raise UserError(
                    f"{path} is damaged: its bytes have the checksum '{summed:08x}', and "
                    f"{metadata[CHECKSUM]!r:.20} was saved; copy it again from where it came from"
                )
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not an intact safetensors file: {error}") from None
    return inputs, jax.tree.unflatten(jax.tree.structure(expected), arrays)


def _checksum(metadata: Mapping[str, str]) -> int:
    """Of everything else that the metadata says."""
    said = {name: text for name, text in sorted(metadata.items()) if name != CHECKSUM}
    return zlib.crc32(json.dumps(said).encode())


def _checksum_array(name: str, array: np.ndarray, summed: int) -> int:
    summed = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), summed)
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), summed)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    stored: str

    @property
    def dtype(self) -> str:
        return (DTYPES | STRUCTURED).get(self.stored, self.stored)


def _expected(path: Path, model: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> PyTree:
    try:
        return abstract_params(model, inputs)
    except Exception as error:
        # The values of a config can contradict each other in ways that only building finds.
        raise UserError(f"{path.with_name(CONFIG)}: its model cannot be initialised: {error}") from error


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        described = json.loads(metadata.get("structures", "{}"))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise UserError(f"{path}: its `structures` are malformed: {metadata['structures'][:80]!r}")
    return described


def _structured(tree: PyTree) -> set[str]:
    """The paths of the leaves of structured weights."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Weight))
    return {
        f"{path_of(keys)}/{name}"
        for keys, node in nodes
        if isinstance(node, Weight)
        for name in named_leaves(node)
    }


def _inputs(path: Path, metadata: Mapping[str, str]) -> tuple[jax.ShapeDtypeStruct, ...]:
    if "inputs" not in metadata:
        return TOKENS
    try:
        inputs = tuple(
            jax.ShapeDtypeStruct(tuple(map(int, shape)), jnp.dtype(dtype))
            for dtype, shape in json.loads(metadata["inputs"])
        )
        if not inputs or any(min(x.shape, default=0) < 1 or math.prod(x.shape) > 1 << 30 for x in inputs):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: its `inputs` are malformed: {metadata['inputs'][:80]!r}") from None
    return inputs


def save_model(
    directory: str | os.PathLike[str],
    model_config: ConfigDict,
    params: PyTree,
    tokenizer: "Tokenizer | None" = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    card: str | None = None,
    inputs: Sequence[jax.ShapeDtypeStruct] = TOKENS,
    experiment: ConfigDict | None = None,
) -> None:
    """Writes a model directory, complete or not at all; an older model directory there is replaced.

    params: nested dict of floating arrays, as `model.init` makes them for `inputs` (tokens by default), and structured
    weights in their places; `dtype` is that of the arrays, while structured weights are written as they are. card: the
    text of README.md. experiment: the config of the run that trained it.

    Raises `UserError` if the directory holds anything that is not part of a model directory, if the parameters
    do not fit the config, or if they can't be written.
    """
    target = files.local_directory(directory)
    _check_replaceable(target)
    if dtype not in DTYPES.values():
        raise UserError(f"dtype {dtype} is not one of {', '.join(DTYPES.values())}")
    model = configs.build(model_config)
    _check_plain(params)
    leaves, described, exact = named_leaves(params), structures(params), _structured(params)
    expected = with_structures(abstract_params(model, inputs), described, "the parameters to save")
    if difference := files.mismatches(leaves, named_leaves(expected), "the tree", dtypes=False):
        raise UserError(f"the parameters to save do not fit their config: {difference}")
    arrays = {
        name: np.asarray(leaf).astype(leaf.dtype if name in exact else jnp.dtype(dtype))
        for name, leaf in leaves.items()
    }
    saving = target.with_name(f".{target.name}.saving-{os.getpid()}")
    try:
        saving.mkdir(parents=True)
        texts = {CONFIG: configs.to_json(model_config), CARD: card}
        if experiment is not None:
            texts[EXPERIMENT] = configs.to_json(experiment)
        _write(saving, texts, arrays, tokenizer, inputs, described)
        _replace(saving, target)
    except Exception as error:
        shutil.rmtree(saving, ignore_errors=True)
        needed = sum(array.nbytes for array in arrays.values())
        raise files.write_failure(error, f"model {target}", target, needed) from error


def _write(
    directory: Path,
    texts: Mapping[str, str | None],
    arrays: Mapping[str, np.ndarray],
    tokenizer: "Tokenizer | None",
    inputs: Sequence[jax.ShapeDtypeStruct],
    described: Mapping[str, object],
) -> None:
    import safetensors.numpy

    for name, text in texts.items():
        if text is not None:
            (directory / name).write_text(text, encoding="utf-8")
    shapes = json.dumps([[str(x.dtype), list(x.shape)] for x in inputs])
    metadata = {"format": "flax", "inputs": shapes}
    if described:
        metadata["structures"] = json.dumps(described)
    summed = _checksum(metadata)
    for name, array in arrays.items():
        summed = _checksum_array(name, array, summed)
    metadata[CHECKSUM] = f"{summed:08x}"
    (directory / WEIGHTS).touch()
    mode = (directory / WEIGHTS).stat().st_mode
    safetensors.numpy.save_file(dict(arrays), directory / WEIGHTS, metadata=metadata)
    (directory / WEIGHTS).chmod(mode)  # safetensors would leave it readable to its owner only
    if tokenizer is not None:
        tokenizer.save(directory / TOKENIZER)
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; a model directory is written to a new or empty directory")
    strangers = sorted(
        {path.name for path in target.iterdir()} - {CONFIG, WEIGHTS, TOKENIZER, CARD, EXPERIMENT}
    )
    if strangers:
        raise UserError(f"{target} is not a model directory, it holds {strangers[0]}: choose a new directory")


def _check_plain(params: PyTree) -> None:
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: not isinstance(node, dict))[0]
    for keys, node in nodes:
        if isinstance(node, Weight):
            continue
        if not jax.tree_util.all_leaves([node]):
            kind = type(node).__name__
            raise UserError(
                f"{path_of(keys)} is a {kind}; a model directory holds arrays and structured weights"
            )
        if not jnp.issubdtype(node.dtype, jnp.floating):
            raise UserError(
                f"{path_of(keys)} is {node.dtype}; a model directory holds floating point parameters"
            )


def _replace(saving: Path, target: Path) -> None:
    old = saving.with_name(f"{saving.name}.old")
    if target.exists() and any(target.iterdir()):
        target.rename(old)
    saving.replace(target)
    shutil.rmtree(old, ignore_errors=True)
