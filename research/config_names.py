"""Code by its name: `module:name` from an object and back, and which names a config may import."""

import importlib
import pkgutil
import sys
from typing import Any

from research.errors import UserError, nearest

# What a saved config may import: our packages, and these namespaces (plain public names only).
_OUR_PACKAGES = ("research", "kernels_pallas")
_PUBLIC_NAMESPACES = ("jax.nn", "jax.nn.initializers", "optax", "optax.contrib", "flax.linen")
# Runs files and changes the process: code may call it, data may not.
_NOT_FOR_DATA = ("research.config", "research.runtime")

# What code of this process gave to `of` from modules that a saved config may not import (tests, notebooks).
_handed: dict[str, Any] = {}


def show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def hint(name: str | None) -> str:
    return f"; did you mean {name}?" if name else ""


def name_of(obj: Any) -> str:
    return getattr(obj, "__qualname__", None) or public_name(obj).rpartition(":")[2] or repr(obj)


def public_name(obj: Any) -> str:
    """`namespace:name` of an object of a public namespace, "" for any other."""
    name = getattr(obj, "__qualname__", None)
    for namespace in _PUBLIC_NAMESPACES:
        members = vars(sys.modules[namespace]) if namespace in sys.modules else {}
        if name is not None and members.get(name) is obj:
            return f"{namespace}:{name}"
        for key, member in members.items():
            if member is obj and not key.startswith("_"):
                return f"{namespace}:{key}"
    return ""


def reference_to(obj: Any, path: str) -> str:
    """The `module:name` under which `obj` is found again."""
    if public := public_name(obj):
        return public
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    found = sys.modules.get(module) if module else None
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    if not name or "<" in name or found is not obj:
        raise UserError(f"{path}: {show(obj)} has no importable name; define it at the top of a module")
    reference = f"{module}:{name}"
    if not _is_ours(module):
        _handed[reference] = obj
    return reference


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _OUR_PACKAGES and module not in _NOT_FOR_DATA


def check_importable(reference: str, path: str) -> tuple[str, str]:
    """(module, name) of a reference that a saved config may import; UserError for any other."""
    module, _, name = reference.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise UserError(f"{path}: {reference!r} is not of the form 'module:name'")
    if module in _PUBLIC_NAMESPACES and "." not in name and not name.startswith("_"):
        return module, name
    if _is_ours(module):
        return module, name
    accepted = ", ".join([*(f"{package}.*" for package in _OUR_PACKAGES), *_PUBLIC_NAMESPACES])
    raise UserError(f"{path}: a config may not import {reference!r}: move that code to one of {accepted}")


def resolve(reference: Any, path: str) -> Any:
    """The class or function a reference names."""
    if type(reference) is not str:
        raise UserError(f"{path}: expected 'module:name', got {show(reference)}")
    if reference in _handed:
        return _handed[reference]
    module_name, name = check_importable(reference, path)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        hint_text = hint(_nearest_module(module_name))
        raise UserError(f"{path}: no module {module_name!r}{hint_text}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")]
            raise UserError(f"{path}: {module_name} has no {name!r}{hint(nearest(part, public))}")
        found = getattr(found, part)
    # A module of ours also holds what it imported (`os`, `subprocess`): only its own names are for configs.
    if not callable(found) or (_is_ours(module_name) and not _is_ours(getattr(found, "__module__", None))):
        raise UserError(f"{path}: {reference!r} is not a class or function defined in {module_name}")
    return found


def _nearest_module(name: str) -> str | None:
    """The module spelled closest to `name`, among those beside it and those below its top package."""

    def below(package: str) -> list[str]:
        path = importlib.import_module(package).__path__
        return [info.name for info in pkgutil.iter_modules(path, f"{package}.")]

    top, parent = name.split(".")[0], name.rpartition(".")[0]
    options = below(top)
    return nearest(name, options + below(parent) if parent in options else options)
