"""A model directory: one trained model as plain files that any tool can read.

    config.json          the model's config, as `research.config.to_json` writes it
    model.safetensors    the parameters, float32 or bfloat16, named by `/`-joined path
    tokenizer.json       of the `tokenizers` library, where the model reads text
    README.md            the model card, where there is one
    experiment.json      the config of the run it was trained by, where it is known

Nothing in it is code: the config builds only what `research.config` allows, the arrays are read by the
safetensors library, and no pickle is ever opened.
"""

import json
import math
import os
import shutil
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
from research.training import checkpoint_files as files
from research.training.paths import PyTree, named_leaves, nested, path_of

if TYPE_CHECKING:
    from research.data.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
EXPERIMENT = "experiment.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
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


def read_config(path: Path) -> ConfigDict:
    """A saved config. Raises `UserError` naming the file if it is absent or malformed."""
    try:
        return configs.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def abstract_params(model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]) -> PyTree:
    """Shapes and dtypes of the parameters that `model.init` makes for `inputs`; nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def load_tokenizer(directory: Path) -> "Tokenizer | None":
    """The tokenizer of a workdir or model directory, or `None` where there is none."""
    from research.data.tokenizer import Tokenizer

    return Tokenizer.load(directory / TOKENIZER) if (directory / TOKENIZER).exists() else None


def load_model_directory(directory: Path) -> Loaded:
    """Reads what `save_model` wrote; bfloat16 becomes float32, exactly.

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
            inputs = _inputs(path, file.metadata() or {})
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
            found = {name: _Header(tuple(part.get_shape()), part.get_dtype()) for name, part in found.items()}
            expected = _expected(path, model, inputs)
            if difference := files.mismatches(found, named_leaves(expected), WEIGHTS, dtypes=False):
                raise UserError(f"{path} does not fit its config: {difference}")
            for name, header in found.items():
                if header.dtype not in DTYPES.values():
                    raise UserError(
                        f"{path}: {name} has type {header.dtype}; {' or '.join(DTYPES)} is expected"
                    )
            arrays = {name: jnp.asarray(file.get_tensor(name).astype(np.float32)) for name in found}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not an intact safetensors file: {error}") from None
    return inputs, nested(arrays)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    stored: str

    @property
    def dtype(self) -> str:
        return DTYPES.get(self.stored, self.stored)


def _expected(path: Path, model: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> PyTree:
    try:
        return abstract_params(model, inputs)
    except Exception as error:
        # The values of a config can contradict each other in ways that only building finds.
        raise UserError(f"{path.with_name(CONFIG)}: its model cannot be initialised: {error}") from error


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

    params: nested dict of floating arrays, as `model.init` makes them for `inputs` (tokens by default). card:
    the text of README.md. experiment: the config of the run that trained it.

    Raises `UserError` if the directory holds anything that is not part of a model directory, if the parameters
    do not fit the config, or if they can't be written.
    """
    target = files.local_directory(directory)
    _check_replaceable(target)
    if dtype not in DTYPES.values():
        raise UserError(f"dtype {dtype} is not one of {', '.join(DTYPES.values())}")
    model = configs.build(model_config)
    _check_plain(params)
    leaves = named_leaves(params)
    if difference := files.mismatches(
        leaves, named_leaves(abstract_params(model, inputs)), "the tree", dtypes=False
    ):
        raise UserError(f"the parameters to save do not fit their config: {difference}")
    arrays = {name: np.asarray(leaf).astype(jnp.dtype(dtype)) for name, leaf in leaves.items()}
    saving = target.with_name(f".{target.name}.saving-{os.getpid()}")
    try:
        saving.mkdir(parents=True)
        texts = {CONFIG: configs.to_json(model_config), CARD: card}
        if experiment is not None:
            texts[EXPERIMENT] = configs.to_json(experiment)
        _write(saving, texts, arrays, tokenizer, inputs)
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
) -> None:
    import safetensors.numpy

    for name, text in texts.items():
        if text is not None:
            (directory / name).write_text(text, encoding="utf-8")
    shapes = json.dumps([[str(x.dtype), list(x.shape)] for x in inputs])
    metadata = {"format": "flax", "inputs": shapes}
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
        if not jax.tree_util.all_leaves([node]):
            kind = type(node).__name__
            raise UserError(
                f"{path_of(keys)} is a {kind}; a model directory holds arrays: materialize it first"
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
