"""Runs that save what they train and nothing else: the rest of their parameters lies in another directory.

A task whose parameters are partly another model's has

    recalled: tuple[str, ...]      top-level names of its parameters that no checkpoint holds
    recall(saved) -> params        all parameters, from those that were saved; raises `UserError` unless what is read
                                   again is what it was

What was saved describes itself: its names, shapes and structured weights are those of the checkpoint, not of the
config. So a run may begin with structures that only its data decided (the bits of every layer under a budget).

An *adapter directory* holds the same without optimizer and history:

    adapter.json           the config of the run, and the checksum of
    adapter.safetensors    what was saved, by `/`-joined path
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from research import config as configs
from research.errors import UserError
from research.training import checkpoint_files as files
from research.training.paths import PyTree, named_leaves
from research.training.structures import rebuild, structures

ADAPTER, WEIGHTS = "adapter.json", "adapter.safetensors"


def kept(task: Any, tree: PyTree) -> PyTree:
    """What is saved of parameters, or of a tree like them."""
    gone = getattr(task, "recalled", ())
    return {name: part for name, part in tree.items() if name not in gone} if gone else tree


def described_tree(leaves: Mapping[str, Any], described: Mapping[str, Any], where: str) -> PyTree:
    """The nested dict of shapes that leaves (name -> shape and dtype) and descriptions of structured weights make.

    Raises `UserError`, naming `where`, for a description that its leaves do not fit.
    """
    flat = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)) for name, leaf in leaves.items()}
    for path, entry in described.items():
        try:
            weight = rebuild(entry)
        except UserError as error:
            raise UserError(f"{where}: {path} is described wrongly: {error}") from None
        for name, wanted in named_leaves(weight).items():
            found = flat.pop(f"{path}/{name}", None)
            if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise UserError(f"{where}: {path}/{name} is {found} and described as {wanted}")
        flat[path] = weight
    return traverse_util.unflatten_dict(flat, sep="/")


def save_adapter(directory: str | os.PathLike[str], config: ConfigDict, saved: PyTree) -> None:
    """Writes an adapter directory. config: of the run; saved: what it saves, see `kept`.

    Raises `UserError` if the directory holds anything else, or can't be written.
    """
    import safetensors.numpy

    folder = files.local_directory(directory)
    if folder.exists() and (
        not folder.is_dir() or {path.name for path in folder.iterdir()} - {ADAPTER, WEIGHTS}
    ):
        raise UserError(f"{folder} exists and is no adapter directory: choose a new one")
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(saved).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER).unlink(missing_ok=True)
        metadata = {"format": "flax", "structures": json.dumps(structures(saved))}
        safetensors.numpy.save_file(arrays, folder / WEIGHTS, metadata=metadata)
        content = {"config": json.loads(configs.to_json(config)), "sha256": _checksum(folder / WEIGHTS)}
        # Last: a directory with a description is complete.
        files.write_atomically(folder / ADAPTER, json.dumps(content, indent=2) + "\n")
    except Exception as error:
        needed = sum(array.nbytes for array in arrays.values())
        raise files.write_failure(error, f"adapter {folder}", folder, needed) from error


def read_adapter_config(directory: str | os.PathLike[str]) -> ConfigDict:
    """The config of the run that an adapter directory comes from. Raises `UserError` if it is malformed."""
    return _content(Path(directory))[0]


def load_adapter(directory: str | os.PathLike[str]) -> tuple[ConfigDict, PyTree]:
    """-> the config of the run, and what it saved. Raises `UserError` for a malformed or damaged file."""
    import safetensors

    folder = files.local_directory(directory)
    config, checksum = _content(folder)
    path = folder / WEIGHTS
    try:
        if _checksum(path) != checksum:
            raise UserError(f"{path} is damaged: its checksum is not that of {ADAPTER}")
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
            described = json.loads((file.metadata() or {}).get("structures", "{}"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not an intact safetensors file: {error}") from None
    abstract = described_tree(arrays, described, str(path))
    leaves = [jnp.asarray(arrays[name]) for name in named_leaves(abstract)]
    return config, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _content(folder: Path) -> tuple[ConfigDict, str]:
    try:
        content = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        return configs.from_json(json.dumps(content["config"])), content["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER} is not the description of an adapter: {error}") from None


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
