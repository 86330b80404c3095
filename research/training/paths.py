"""Names of leaves, and patterns over them.

A leaf's path is `/`-joined (`layer_0/attention/query/kernel`; a field of a structured kernel is one more
component). Patterns are regular expressions *searched for* in the path, so `attention/` selects every
attention and `^layer_0/` the first layer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from research.errors import UserError, nearest

PyTree = Any


def path_of(keys: tuple) -> str:
    """The `/`-joined path of jax's key path."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} in the order of the tree."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of leaves named by `/`-joined path."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_named(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """The tree of `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(path_of(keys), leaf), tree)


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """The compiled pattern. `where` names its place in the config, for the `UserError` if it is malformed."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None


def first_match(
    paths: Sequence[str], patterns: Sequence[str], where: str, *, strict: bool = True
) -> list[int | None]:
    """For each path the index of the first pattern found in it, or `None`.

    Raises `UserError` if a pattern is malformed or, when `strict`, is found in no path at all.
    """
    compiled = [compile_pattern(pattern, where) for pattern in patterns]
    if strict:
        for pattern, regex in zip(patterns, compiled, strict=True):
            if not any(regex.search(path) for path in paths):
                close = nearest(pattern.strip("^$/"), _sections(paths))
                hint = f"did you mean {close!r}?" if close else f"the first is {next(iter(paths), None)!r}"
                raise UserError(f"{where}: {pattern!r} matches none of the {len(paths)} parameters; {hint}")
    return [next((i for i, regex in enumerate(compiled) if regex.search(path)), None) for path in paths]


def _sections(paths: Sequence[str]) -> set[str]:
    """Every run of components of every path: what a pattern may have meant."""
    parts = [path.split("/") for path in paths]
    return {"/".join(p[i:j]) for p in parts for i in range(len(p)) for j in range(i + 1, len(p) + 1)}


def is_stacked(path: str) -> bool:
    """Whether the leaf is stacked over the layers of a scanned model, so that its first axis is the layer."""
    return "layers" in path.split("/")
