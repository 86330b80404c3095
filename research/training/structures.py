"""Structured weights as JSON: what rebuilds them from arrays that are stored under their paths.

A checkpoint or a model directory holds the leaves of a structured weight like any others, each under its own path
(`layer_0/mlp/up/kernel/codes`). What they are leaves of is described beside them, in JSON:

    {"kind": "Quantized", "bits": 4, "tile": 64, "parts": {"codes": {"dtype": "uint8", "shape": [32, 8]}, ...}}

Only the kinds below are built, and only from arrays that fit each other.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.weights import Weight
from research.training.paths import PyTree, path_of

# What can be saved, and the module of it.
KINDS = {
    "LowRank": "research.nn.weights",
    "Sum": "research.nn.weights",
    "Permuted": "research.nn.weights",
    "Quantized": "research.nn.quantized",
    "NormalFloat": "research.nn.normal_float",
    "ByteScales": "research.nn.normal_float",
    "PackedScales": "research.nn.normal_float",
    "TernaryCode": "research.nn.ternary",
    "LoRAExperts": "research.adapters.mole",
    "ModalityLoRA": "research.multimodal.arcana",
}
_DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32")


def structures(tree: PyTree) -> dict[str, Any]:
    """{path: description} of the structured weights of a tree (shapes suffice).

    Raises `UserError`, naming the path, for one that cannot be saved.
    """
    found = {}
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Weight)):
        if isinstance(node, Weight):
            try:
                found[path_of(keys)] = describe(node)
            except UserError as error:
                raise UserError(f"{path_of(keys)}: {error}") from None
    return found


def with_structures(abstract: PyTree, described: Mapping[str, Any], where: str) -> PyTree:
    """A tree of shapes with the structured weights that `described` has, in the place of the kernels they stand for.

    Raises `UserError`, naming `where` and the path, for a description that is malformed, whose path is none of the
    tree's, or whose kernel has another shape.
    """
    left = dict(described)

    def replace(keys: tuple, leaf: Any) -> Any:
        path = path_of(keys)
        if path not in left:
            return leaf
        try:
            kernel = rebuild(left.pop(path))
        except UserError as error:
            raise UserError(f"{where}: {path} is described wrongly: {error}") from None
        if not isinstance(kernel, Weight) or tuple(kernel.shape) != tuple(leaf.shape):
            raise UserError(
                f"{where}: {path} is {tuple(getattr(kernel, 'shape', ()))} there and {tuple(leaf.shape)} here"
            )
        return kernel

    tree = jax.tree_util.tree_map_with_path(replace, abstract, is_leaf=lambda x: isinstance(x, Weight))
    if left:
        raise UserError(f"{where}: {next(iter(left))} is a structured weight that is not expected here")
    return tree


def describe(value: Any) -> Any:
    """The description of a structured weight, of a part of one, or of an array."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return [describe(part) for part in value]
    name = type(value).__name__
    if name in KINDS:
        parts, fixed = _fields(type(value))
        described = {"kind": name, **{field: getattr(value, field) for field in fixed}}
        return described | {"parts": {field: describe(getattr(value, field)) for field in parts}}
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, Weight):
        return {"dtype": str(value.dtype), "shape": list(value.shape)}
    raise UserError(f"a {name} cannot be saved; there are {', '.join(KINDS)}: materialize it first")


def rebuild(description: Any) -> Any:
    """What was described, of `jax.ShapeDtypeStruct`s. Raises `UserError` for what describes nothing of ours."""
    if description is None:
        return None
    if isinstance(description, list):
        return tuple(rebuild(part) for part in description)
    if not isinstance(description, dict):
        raise UserError(f"{description!r:.80} is no description")
    if "kind" not in description:
        return _shape(description)
    kind = description["kind"]
    if kind not in KINDS:
        raise UserError(f"there is no kind {kind!r:.40}; there are {', '.join(KINDS)}")
    cls = getattr(importlib.import_module(KINDS[kind]), kind)
    parts, fixed = _fields(cls)
    given = description.get("parts")
    wanted = {"kind", "parts", *fixed}
    if not isinstance(given, dict) or set(given) != set(parts) or set(description) != wanted:
        raise UserError(f"a {kind} has the fields {', '.join([*parts, *fixed])}")
    try:
        value = cls(**{k: rebuild(v) for k, v in given.items()}, **{k: description[k] for k in fixed})
        if hasattr(value, "check"):
            value.check()
        elif isinstance(value, Weight):
            len(value.shape)
    except (TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the parts of a {kind} do not fit each other: {error}") from None
    return value


def _fields(cls: type) -> tuple[list[str], list[str]]:
    """The names of the fields that hold arrays, and of those that are saved as they are."""
    fields = [field for field in dataclasses.fields(cls) if field.metadata.get("saved", True)]
    parts = [field.name for field in fields if field.metadata.get("pytree_node", True)]
    return parts, [field.name for field in fields if not field.metadata.get("pytree_node", True)]


def _shape(description: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    dtype, shape = description.get("dtype"), description.get("shape")
    fits = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    if dtype not in _DTYPES or not fits or len(description) != 2:
        raise UserError(f"{dict(description)!r:.80} describes no array")
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
