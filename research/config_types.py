"""Does a config value fit a type annotation? The rules of `research.config`, which is their only user.

Rules: `int` is taken for `float` and becomes one; `bool` is never a number; a list is taken for a tuple and
the reverse; a function is the text `module:name`; a nested config fits where what it builds would.
"""

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

ANYTHING = Any
NO_FIT = object()

_SEQUENCES = (
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
    collections.abc.Container,
    collections.abc.Reversible,
)
_CODE = (collections.abc.Callable, type)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def fit(value: Any, kind: Any, built_class: Callable[[ConfigDict], Any] | None) -> Any:
    """`value` as annotation `kind` wants it, or `NO_FIT`.

    Args:
      value: a config value, or a built object.
      kind: an evaluated annotation.
      built_class: gives the class or function that a nested config names; `None` where there are none left.
    """
    arms = _arms(kind)
    for loose in (False, True):  # an int stays an int where `int | float` is asked
        for arm in arms:
            result = _fit_arm(value, arm, built_class, loose)
            if result is not NO_FIT:
                return result
    return NO_FIT


def element_kind(container: Any, kind: Any, key: int | str) -> Any:
    """The annotation of the entry `key` of a tuple, list or dict that is annotated with `kind`."""
    for arm in _arms(kind):
        origin, args = _origin(arm), typing.get_args(arm)
        if isinstance(container, tuple | list) and args:
            if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
                return args[key] if key < len(args) else ANYTHING
            if origin in (tuple, list, *_SEQUENCES):
                return args[0]
        if isinstance(container, ConfigDict | dict) and origin in _MAPPINGS and len(args) == 2:
            return args[1]
    return ANYTHING


def names_code(text: str, kind: Any) -> bool:
    """Whether `text` in a field annotated `kind` is the name of a function or class, not a text."""
    taken_by = next((arm for arm in _arms(kind) if _fit_arm(text, arm, None, False) is not NO_FIT), ANYTHING)
    return _origin(taken_by) in _CODE


def wants_sequence(kind: Any) -> bool:
    """Whether `kind` takes a tuple or list of a known type (command-line text `a,b,c` is split for it)."""
    return any(_origin(arm) in (tuple, list, *_SEQUENCES) for arm in _arms(kind))


def choices(kind: Any) -> list[str]:
    """The texts that the `Literal` members of `kind` accept."""
    literals = [arm for arm in _arms(kind) if _origin(arm) is typing.Literal]
    return [choice for arm in literals for choice in typing.get_args(arm) if isinstance(choice, str)]


def describe(kind: Any) -> str:
    """The annotation in words, for an error message."""
    return " or ".join(dict.fromkeys(_describe_arm(arm) for arm in _arms(kind)))


def _describe_arm(arm: Any) -> str:
    origin = typing.get_origin(arm)
    if arm is type(None):
        return "None"
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(arm))
    if (origin or arm) in _CODE:
        return "a function or class ('module:name' or of(...))"
    if inspect.isclass(arm) and origin is None:
        return arm.__name__
    if origin is not None and typing.get_args(arm):
        name = getattr(origin, "__name__", str(origin))
        args = ("..." if arg is Ellipsis else describe(arg) for arg in typing.get_args(arm))
        return f"{name}[{', '.join(args)}]"
    return str(arm).replace("typing.", "")


def _origin(arm: Any) -> Any:
    return typing.get_origin(arm) or arm


def _arms(kind: Any) -> list[Any]:
    """The members of a union, flat; a single type is a union of one."""
    if kind is None:
        return [type(None)]
    if isinstance(kind, typing.NewType):
        return _arms(kind.__supertype__)
    if isinstance(kind, getattr(typing, "TypeAliasType", ())):  # `type X = ...` of Python 3.12
        return _arms(kind.__value__)
    origin = typing.get_origin(kind)
    if origin in (typing.Annotated, typing.Final, typing.ClassVar):
        return _arms(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return [arm for member in typing.get_args(kind) for arm in _arms(member)]
    return [kind]


def _fit_arm(value: Any, arm: Any, built_class: Callable[[ConfigDict], Any] | None, loose: bool) -> Any:
    if arm in (Any, object) or isinstance(arm, typing.TypeVar | typing.ForwardRef | str):
        return value
    origin, args = _origin(arm), typing.get_args(arm)
    if isinstance(value, ConfigDict) and "cls" in value:
        return value if built_class is None or _builds(built_class(value), origin) else NO_FIT
    if origin is typing.Literal:
        return value if any(type(value) is type(choice) and value == choice for choice in args) else NO_FIT
    if origin is float and loose and type(value) is int:
        return float(value)
    if origin in (bool, int, float, str):
        return value if type(value) is origin else NO_FIT
    if origin in (tuple, list):
        if type(value) is origin or (loose and type(value) in (tuple, list)):
            return _fit_items(origin(value), args, origin, built_class)
        return value if isinstance(value, origin) else NO_FIT  # a built NamedTuple
    if origin in _SEQUENCES:
        if type(value) in (tuple, list):
            return _fit_items(value, args, origin, built_class)
        is_text_or_dict = isinstance(value, str | dict | ConfigDict)
        return value if not is_text_or_dict and isinstance(value, origin) else NO_FIT
    if origin in _MAPPINGS:
        return _fit_mapping(value, args, origin, built_class)
    if origin in _CODE:
        return value if callable(value) or (isinstance(value, str) and value.count(":") == 1) else NO_FIT
    if not inspect.isclass(origin) or _is_protocol(origin):
        # Nothing that can be checked by looking; a plain value does not implement a protocol.
        return NO_FIT if _is_plain(value) and inspect.isclass(origin) else value
    return value if isinstance(value, origin) else NO_FIT


def _fit_items(value: Any, args: tuple[Any, ...], origin: Any, built_class: Any) -> Any:
    if not args:
        return value
    fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
    if fixed and len(args) != len(value):
        return value if args == ((),) and not value else NO_FIT
    kinds = args if fixed else [args[0]] * len(value)
    items = [fit(item, kind, built_class) for item, kind in zip(value, kinds, strict=True)]
    return NO_FIT if any(item is NO_FIT for item in items) else type(value)(items)


def _fit_mapping(value: Any, args: tuple[Any, ...], origin: Any, built_class: Any) -> Any:
    if not isinstance(value, ConfigDict | dict):
        return value if isinstance(value, origin) else NO_FIT
    if not args:
        return value
    items = {}
    for key in value:
        items[key] = fit(value[key], args[1], built_class)
        if items[key] is NO_FIT or fit(key, args[0], None) is NO_FIT:
            return NO_FIT
    return ConfigDict(items) if isinstance(value, ConfigDict) else items


def _builds(target: Any, origin: Any) -> bool:
    """Whether what `target` makes can be an `origin`; a function's result is looked at once it is built."""
    if not inspect.isclass(target) or not inspect.isclass(origin) or _is_protocol(origin):
        return True
    if origin is collections.abc.Callable:
        return any("__call__" in vars(base) for base in target.__mro__)
    return issubclass(target, origin)


def _is_protocol(origin: Any) -> bool:
    return getattr(origin, "_is_protocol", False)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str, tuple, list, dict, ConfigDict)
