"""The inverse of `build`: the config that describes an object which already exists."""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from research.config import of


def capture(obj: Any) -> ConfigDict:
    """The config that builds an equal object. Fields that hold their default are left out.

    Takes linen modules and dataclasses, nested in fields, tuples, lists and dicts. A model that was loaded
    from foreign files or sliced gets its config this way.

    Raises:
        TypeError: `obj` is not a dataclass, or holds something a config can't.
        UserError: a field's value is not plain data (from `of`).
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"{type(obj).__name__} is not a module or a dataclass: it has no config")
    fields = {}
    for field in dataclasses.fields(obj):
        if not field.init or (isinstance(obj, nn.Module) and field.name in ("parent", "name")):
            continue
        value = getattr(obj, field.name)
        if value != _default(field):
            fields[field.name] = _capture_value(value)
    return of(type(obj), **fields)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _capture_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return capture(value)
    if isinstance(value, tuple | list):
        return type(value)(map(_capture_value, value))
    if isinstance(value, dict):
        return {name: _capture_value(entry) for name, entry in value.items()}
    if isinstance(value, functools.partial):
        raise TypeError(f"a partial of {value.func} has no config: name a function or a dataclass")
    return value
