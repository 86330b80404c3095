"""Configs that mirror modules: checked when written, plain data when saved, objects when built.

    config = of(GatedMLP, hidden_dim=1024)      # an ml_collections.ConfigDict, checked against the signature
    mlp = build(config)                         # GatedMLP(hidden_dim=1024), nested configs first
    load_config("configs/matlm.py:tiny", ["task.model.num_layers=2"])

A config holds only plain values: None, bool, int, float, str, tuples, lists, dicts with string keys, and
other configs. A function or class as a value is kept as the string `module:name`. A node with a `cls` entry
is built by calling what `cls` names with the other entries.

A config *file* is code and runs when loaded. A saved config is data: `from_json` imports nothing, and `build`
imports only modules of this project and a short list of public namespaces (`optax`, `flax.linen`, `jax.nn`).
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from research.config_names import check_importable, hint, name_of, public_name, reference_to, resolve, show
from research.config_types import (
    ANYTHING,
    NO_FIT,
    choices,
    describe,
    element_kind,
    fit,
    names_code,
    wants_sequence,
)
from research.errors import UserError, nearest

__all__ = ["ABSENT", "build", "diff", "from_json", "load_config", "of", "to_json"]

_TAGS = ("__tuple__", "__float__")
_DEEPEST = 100  # levels of a saved config, far below what Python's stack holds
_TOO_DEEP = f"config: nested deeper than the {_DEEPEST} levels of a saved config"


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
"""Stands in `diff` for an entry that one side does not have (and that has no equal default)."""


class _Field(NamedTuple):
    kind: Any
    default: Any  # inspect.Parameter.empty where the field is required


def of(cls: Any, /, **fields: Any) -> ConfigDict:
    """A config that builds `cls(**fields)`.

    Args:
      cls: a class (linen modules and dataclasses included) or a function, importable by its name.
      **fields: plain values, functions or classes (kept by name), and nested configs.

    Returns:
      ConfigDict with `cls="module:name"` and the fields given; fields left out keep the default of `cls`.

    Raises:
      UserError: an unknown, missing or ill-typed field, or a value that a saved config can't hold.
    """
    name = name_of(cls)
    if not callable(cls):
        raise UserError(f"of({name}): the first argument is the class or function to build")
    if "cls" in fields:
        raise UserError(f"{name}.cls: `cls` is reserved; rename the field")
    return _check(_plain({"cls": reference_to(cls, name), **fields}, name), name)


def build(config: Any, path: str = "config") -> Any:
    """The object a config describes; nested configs (in dicts, tuples and lists too) are built first.

    Every field is checked again, because overrides may have changed it, and so is what a nested config built.

    Args:
      config: a ConfigDict, or a tuple, list or plain value holding some.
      path: what errors call the root.

    Raises:
      UserError: one line that starts with the path of the entry.
    """
    return _build(_check(_plain(config, path), path), path, ANYTHING)


def load_config(spec: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """Loads `file.py:preset` (the file runs: it is code) or a saved `config.json` (data), then overrides.

    Args:
      spec: a path; `:preset` picks one of the file's `PRESETS`, the default of its `get_config` otherwise.
      overrides: `["task.model.num_layers=2", "stages.0.steps=10"]`, or a dict from such paths to values.
        Text is read as the field's type asks (`3`, `1e-3`, `true`, `none`, `a,b,c` for a sequence).

    Raises:
      UserError: no such file, preset or path (the nearest is named), or an ill-typed value.
    """
    text = str(spec)
    file, preset = (text, None) if Path(text).suffix in (".py", ".json") else _split_preset(text)
    path = _existing(file)
    if path.suffix == ".json":
        if preset is not None:
            raise UserError(f"{text}: a saved config has no presets; leave out `:{preset}`")
        try:
            config = from_json(path.read_text(encoding="utf-8"))
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {error}") from error
    elif path.suffix == ".py":
        config = _run_config_file(path, preset)
    else:
        raise UserError(f"{file}: a config is a .py file or a saved .json")
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_split_override, overrides)
    for where, value in pairs:
        config = _override(config, where, value, is_text=not isinstance(overrides, Mapping))
    config = _check(_plain(config, "config"), "config")
    for where, reference in _references(config, "config"):
        check_importable(reference, where)
    return config


def load_sweep(spec: str | Path) -> Any:
    """What `get_sweep(preset)` of a config file returns. Raises UserError as `load_config`, or if it has none."""
    file, preset = (str(spec), None) if Path(spec).suffix in (".py", ".json") else _split_preset(str(spec))
    path = _existing(file)
    if path.suffix != ".py":
        raise UserError(f"{file}: a sweep is defined by get_sweep(preset) of a .py file")
    return _run_config_file(path, preset, "get_sweep")


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, exactly: `from_json(to_json(c)) == c`, tuples, floats and None included."""
    if not isinstance(config, ConfigDict):
        raise UserError(f"to_json: expected a ConfigDict, got {show(config)}")
    return json.dumps(_encode(_plain(config, "config")), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote. Nothing is imported or run."""
    try:
        raw = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"config: not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(_TOO_DEEP) from error
    if not isinstance(raw, dict) or any(tag in raw for tag in _TAGS):
        raise UserError("config: a saved config is a JSON object")
    return _plain(_decode(raw, "config"), "config")


def diff(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Where two configs differ: (path, left, right) per leaf, paths as overrides spell them (`task.seed`).

    Values of different types differ (`1`, `1.0`, `True`). A field left out counts as its default; an entry
    that one side does not have is `ABSENT`.
    """
    return list(_differences(_plain(a, "left"), _plain(b, "right"), ""))


# ------------------------------------------------------------------------------------------- plain values


def _plain(value: Any, path: str) -> Any:
    """A copy of `value` of plain values and ConfigDicts only; functions and classes become their names."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        if math.isnan(value):
            raise UserError(f"{path}: nan can't be a config value (it never equals itself)")
        return value
    if kind in (tuple, list):
        return kind(_plain(item, f"{path}.{i}") for i, item in enumerate(value))
    if isinstance(value, ConfigDict | dict):
        result = ConfigDict()
        for key in _keys(value):
            if type(key) is not str:
                raise UserError(f"{path}: dict keys in a config are strings, got {show(key)}")
            if "." in key or not key or key in _TAGS:
                raise UserError(
                    f"{path}: {key!r} can't be a key of a config (dots separate paths); use a tuple of pairs"
                )
            result[key] = _plain(value[key], f"{path}.{key}")
        return result
    if hasattr(value, "dtype") or kind.__module__ == "numpy":
        raise UserError(f"{path}: {show(value)} is an array or dtype object; write a number or 'float32'")
    if inspect.isclass(value) or inspect.isroutine(value) or public_name(value):
        return reference_to(value, path)
    raise UserError(f"{path}: {show(value)} is not a plain value; write of({kind.__name__}, ...)")


def _keys(node: Any) -> list[str]:
    """Keys in the order they are written: `cls` first, then as stored."""
    keys = list(node.keys())
    return (["cls"] if "cls" in keys else []) + [key for key in keys if key != "cls"]


def _references(node: Any, path: str) -> Iterable[tuple[str, str]]:
    """(path, reference) of every `cls` and of every function kept by name."""
    if isinstance(node, ConfigDict):
        fields = {}
        if "cls" in node:
            yield path, node["cls"]
            fields = _fields(resolve(node["cls"], path))
        for key in node:
            value = node[key]
            if type(value) is str and key != "cls" and key in fields and names_code(value, fields[key].kind):
                yield f"{path}.{key}", value
            else:
                yield from _references(value, f"{path}.{key}")
    elif isinstance(node, tuple | list):
        for i, item in enumerate(node):
            yield from _references(item, f"{path}.{i}")


# ------------------------------------------------------------------------------------------- signatures


def _fields(target: Any) -> dict[str, _Field]:
    """Parameter names of a class or function to (type, default). `**` stands for any other name."""
    linen = sys.modules.get("flax.linen")
    is_linen = linen is not None and inspect.isclass(target) and issubclass(target, linen.Module)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"{name_of(target)}: has no signature to check a config against") from error
    kinds = _annotations(target, parameters)
    factories = {
        field.name: field.default_factory
        for field in (dataclasses.fields(target) if dataclasses.is_dataclass(target) else ())
        if field.default_factory is not dataclasses.MISSING
    }
    fields = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL or (is_linen and name in ("parent", "name")):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UserError(f"{name_of(target)}: takes {name} by position only, so a config can't build it")
        if parameter.kind is parameter.VAR_KEYWORD:
            fields["**"] = _Field(kinds[name], None)
        elif parameter.kind is not parameter.POSITIONAL_ONLY:
            default = factories[name]() if name in factories else parameter.default
            fields[name] = _Field(kinds[name], default)
    return fields


def _annotations(target: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The evaluated annotation of every parameter."""
    kinds = {}
    for name, parameter in parameters.items():
        kind = parameter.annotation
        if isinstance(kind, str):
            # A dataclass inherits fields from other modules: evaluate where the annotation was written.
            owners = [target, *target.__mro__[1:]] if inspect.isclass(target) else [target]
            writers = [owner for owner in owners if name in inspect.get_annotations(owner)]
            scope = (writers or [getattr(target, "__init__", target)])[0].__module__
            try:
                kind = eval(kind, dict(vars(sys.modules[scope])))
            except NameError:
                if scope.split(".")[0] not in ("flax", "jax", "optax"):
                    raise
                kind = ANYTHING  # a name that library imports for type checkers only
        kinds[name] = ANYTHING if kind is parameter.empty else kind
    return kinds


def _check(node: Any, path: str, kind: Any = ANYTHING) -> Any:
    """A plain value with the fields of every config in it checked and brought to the annotated type."""
    if isinstance(node, tuple | list):
        return type(node)(
            _check(item, f"{path}.{i}", element_kind(node, kind, i)) for i, item in enumerate(node)
        )
    if not isinstance(node, ConfigDict):
        return node
    result = ConfigDict()
    if "cls" not in node:
        for key in node:
            result[key] = _check(node[key], f"{path}.{key}", element_kind(node, kind, key))
        return result
    target = resolve(node["cls"], path)
    fields = _fields(target)
    result["cls"] = node["cls"]
    for key in _keys(node)[1:]:
        field = _field(fields, key, target, path)
        value = _check(node[key], f"{path}.{key}", field.kind)
        result[key] = _fitted(value, field.kind, f"{path}.{key}")
    required = [name for name, field in fields.items() if field.default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in node]:
        subject = path if path == name_of(target) else f"{path}: {name_of(target)}"
        raise UserError(f"{subject} needs {', '.join(missing)}")
    return result


def _field(fields: dict[str, _Field], key: str, target: Any, path: str) -> _Field:
    if key in fields and key != "**":
        return fields[key]
    if "**" in fields:
        return fields["**"]
    names = [name for name in fields if name != "**"]
    hint_text = hint(nearest(key, names)) or f"; its fields are {', '.join(names) or 'none'}"
    raise UserError(f"{path}.{key}: unknown field of {name_of(target)}{hint_text}")


def _fitted(value: Any, kind: Any, path: str) -> Any:
    """`value` as the annotation wants it (an int for a float, a list for a tuple), or UserError."""

    def built_class(config: ConfigDict) -> Any:
        return resolve(config["cls"], path)

    result = fit(value, kind, built_class)
    if result is NO_FIT:
        built = isinstance(value, ConfigDict) and "cls" in value
        got = f"of({name_of(built_class(value))})" if built else show(value)
        hint_text = hint(nearest(value, choices(kind))) if isinstance(value, str) else ""
        raise UserError(f"{path}: expected {describe(kind)}, got {got}{hint_text}")
    if type(result) is str and names_code(result, kind):
        resolve(result, path)
    return result


# ------------------------------------------------------------------------------------------- building


def _build(node: Any, path: str, kind: Any) -> Any:
    if isinstance(node, tuple | list):
        return type(node)(
            _build(item, f"{path}.{i}", element_kind(node, kind, i)) for i, item in enumerate(node)
        )
    if type(node) is str and names_code(node, kind):
        return resolve(node, path)
    if not isinstance(node, ConfigDict):
        return node
    if "cls" not in node:
        return {key: _build(node[key], f"{path}.{key}", element_kind(node, kind, key)) for key in node}
    target = resolve(node["cls"], path)
    fields = _fields(target)
    built = {}
    for key in _keys(node)[1:]:
        kind = _field(fields, key, target, path).kind
        value = _build(node[key], f"{path}.{key}", kind)
        if fit(value, kind, None) is NO_FIT:
            raise UserError(f"{path}.{key}: expected {describe(kind)}, but it built {show(value)}")
        built[key] = value
    try:
        return target(**built)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        error.add_note(f"while building {path} ({name_of(target)})")
        raise


# ------------------------------------------------------------------------------------------- config files


def _split_preset(text: str) -> tuple[str, str | None]:
    file, colon, preset = text.rpartition(":")
    return (file, preset) if colon else (text, None)


def _existing(file: str) -> Path:
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{file}: a folder; a config is a .py file or a saved .json")
    if not path.is_file():
        raise UserError(f"{file}: no such config file{hint(_nearest_file(path))}")
    return path


def _nearest_file(path: Path) -> str | None:
    folders = {path.parent, Path("configs")}
    found = (f for folder in folders for f in (*folder.glob("*.py"), *folder.glob("*.json")))
    files = [str(f) for f in found if f.is_file()]
    by_stem = {Path(file).stem: file for file in sorted(files)}
    return nearest(str(path), files) or by_stem.get(nearest(path.stem, by_stem) or "")


def _run_config_file(path: Path, preset: str | None, function: str = "get_config") -> Any:
    name = f"_config_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        presets = getattr(module, "PRESETS", None)
        if presets is None or not hasattr(module, "get_config"):
            raise UserError("a config file defines PRESETS and get_config(preset)")
        if preset is not None and preset not in presets:
            hint_text = hint(nearest(preset, presets))
            raise UserError(f"no preset {preset!r}{hint_text} (presets: {', '.join(presets)})")
        if not hasattr(module, function):
            raise UserError(f"it defines no {function}(preset)")
        made = getattr(module, function)
        result = made() if preset is None else made(preset)
    except (Exception, SystemExit) as error:  # whatever a file does wrong is told with its line
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        what = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError) and error.filename == spec.origin:
            lines, what = [error.lineno], error.msg
        raise UserError(f"{path}{f':{lines[-1]}' if lines else ''}: {what}") from error
    finally:
        del sys.modules[name]
    if function == "get_config" and not isinstance(result, ConfigDict):
        raise UserError(f"{path}: get_config returned {show(result)}, expected a config made with of(...)")
    return result


# ------------------------------------------------------------------------------------------- overrides


def _split_override(text: str) -> tuple[str, str]:
    where, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r}: expected path=value")
    return where, value


def _override(config: ConfigDict, where: str, value: Any, is_text: bool) -> ConfigDict:
    def replaced(node: Any, parts: list[str], path: str, kind: Any) -> Any:
        if not parts:
            new = _read(value, kind, node) if is_text else _plain(value, path)
            return _like(new, node, path) if kind is ANYTHING else _fitted(new, kind, path)
        part, rest = parts[0], parts[1:]
        below = f"{path}.{part}"
        if isinstance(node, tuple | list):
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(f"{below}: no such entry; {path} has {len(node)}, counted from 0")
            i = int(part)
            items = list(node)
            items[i] = replaced(node[i], rest, below, element_kind(node, kind, i))
            return type(node)(items)
        if not isinstance(node, ConfigDict):
            what = "not set in this config" if node is ABSENT else show(node)
            raise UserError(f"{path}: is {what}, so there is no {below} to override")
        current = node.get(part, ABSENT)
        if part == "cls" and "cls" in node:
            kind_below = str
        elif "cls" in node:
            target = resolve(node["cls"], path)
            fields = _fields(target)
            if part not in fields and "**" not in fields and not nearest(part, fields):
                elsewhere = {p.rpartition(".")[2]: p for p in reversed(list(_paths(config, "config")))}
                if found := elsewhere.get(nearest(part, elsewhere) or ""):
                    raise UserError(f"{below}: unknown field of {name_of(target)}{hint(found)}")
            kind_below = _field(fields, part, target, path).kind
            default = _default(fields, part)
            if rest and current is ABSENT and isinstance(default, ConfigDict) and "cls" not in default:
                current = default  # `mesh.data=8` adds to a dict that the file leaves at its default
        elif part in node or element_kind(node, kind, part) is not ANYTHING:
            kind_below = element_kind(node, kind, part)  # a dict of annotated values takes new keys
        else:
            hint_text = hint(nearest(part, node)) or f"; its entries are {', '.join(node) or 'none'}"
            raise UserError(f"{below}: no such entry{hint_text}")
        copy = ConfigDict({key: node[key] for key in node if key != part})
        copy[part] = replaced(current, rest, below, kind_below)
        return copy

    return replaced(config, where.split("."), "config", ANYTHING)


def _paths(node: Any, path: str) -> Iterable[str]:
    """Every path an override may name, shallow entries of a node before its deeper ones."""
    if isinstance(node, tuple | list):
        for i, item in enumerate(node):
            yield from _paths(item, f"{path}.{i}")
    elif isinstance(node, ConfigDict):
        names = _fields(resolve(node["cls"], path)) if "cls" in node else node
        yield from (f"{path}.{name}" for name in names if name != "**")
        for key in node:
            yield from _paths(node[key], f"{path}.{key}")


_WORDS = {"true": True, "false": False, "none": None, "null": None, "inf": math.inf, "-inf": -math.inf}


def _read(text: str, kind: Any, current: Any) -> Any:
    """The value a piece of command-line text means for a field of type `kind` that holds `current`."""
    if kind is ANYTHING and type(current) is str:
        return text
    try:
        literal = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
        literal = _plain(literal, text)
    except (ValueError, SyntaxError, TypeError, UserError):
        literal = text
    candidates = [literal, text]
    if isinstance(current, tuple | list) if kind is ANYTHING else wants_sequence(kind):
        pieces = [piece.strip() for piece in text.split(",")] if text else []
        items = (_read(piece, element_kind(pieces, kind, i), ABSENT) for i, piece in enumerate(pieces))
        candidates.append(tuple(items))
        if kind is ANYTHING and not isinstance(literal, tuple | list):
            return candidates[-1]
    for candidate in candidates:
        if fit(candidate, kind, None) is not NO_FIT:
            return candidate
    return literal


def _like(value: Any, current: Any, path: str) -> Any:
    """An override of an entry without annotation must keep the type of what it replaces."""
    if current is None or current is ABSENT or value is None or type(value) is type(current):
        return value
    fitted = fit(value, type(current), None)
    if fitted is NO_FIT:
        raise UserError(f"{path}: expected {type(current).__name__}, got {show(value)}")
    return fitted


# ------------------------------------------------------------------------------------------- JSON and diff


def _encode(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {key: _encode(value[key]) for key in _keys(value)}
    if isinstance(value, tuple):
        return {"__tuple__": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if type(value) is float and math.isinf(value):
        return {"__float__": repr(value)}
    return value


def _decode(value: Any, path: str) -> Any:
    if path.count(".") > _DEEPEST:
        raise UserError(_TOO_DEEP)
    if isinstance(value, list):
        return [_decode(item, f"{path}.{i}") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if any(tag in value for tag in _TAGS):
        items = value.get("__tuple__")
        if len(value) == 1 and isinstance(items, list):
            return tuple(_decode(item, f"{path}.{i}") for i, item in enumerate(items))
        if value in ({"__float__": "inf"}, {"__float__": "-inf"}):
            return float(value["__float__"])
        raise UserError(f"{path}: malformed {' and '.join(value)} in a saved config")
    return {key: _decode(item, f"{path}.{key}") for key, item in value.items()}


def _no_constant(name: str) -> Any:
    raise UserError(f"config: {name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
        raise UserError(f"config: {', '.join(repeated)} appears twice in one object of a saved config")
    return result


def _differences(a: Any, b: Any, path: str) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(a, ConfigDict) and isinstance(b, ConfigDict):
        fields = {}
        if "cls" in a and "cls" in b and a["cls"] == b["cls"]:
            fields = _fields(resolve(a["cls"], path or "config"))
        for key in sorted({*a, *b}, key=lambda key: (key != "cls", key)):
            default = _default(fields, key)
            left, right = (node.get(key, default) for node in (a, b))
            yield from _differences(left, right, f"{path}.{key}" if path else key)
    elif type(a) is type(b) and isinstance(a, tuple | list) and len(a) == len(b):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differences(left, right, f"{path}.{i}" if path else str(i))
    elif type(a) is not type(b) or a != b:
        yield path, a, b


def _default(fields: dict[str, _Field], key: str) -> Any:
    field = fields.get(key)
    if field is None or field.default is inspect.Parameter.empty:
        return ABSENT
    try:
        plain = _plain(field.default, key)
    except UserError:
        return ABSENT  # an object that no config value can equal
    fitted = fit(plain, field.kind, None)
    return plain if fitted is NO_FIT else fitted
