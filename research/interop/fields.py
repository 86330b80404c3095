"""Reading a JSON object whose every entry may be wrong: errors name the file, the entry and the options."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.errors import UserError, nearest

_MAX_INTEGER = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


class Fields:
    """The entries of a JSON object, with what an absent one stands for.

    Args:
        entries: the object.
        where: what errors call it.
        defaults: values of absent entries; an entry that is in neither is required.

    An entry that is null counts as given where the getter is optional, and as absent elsewhere.
    """

    def __init__(self, entries: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None):
        self.entries = entries
        self.where = where
        self.defaults = defaults or {}

    def raw(self, name: str) -> Any:
        """The entry as it is, its default where absent."""
        if name in self.entries:
            return self.entries[name]
        if name in self.defaults:
            return self.defaults[name]
        close = nearest(name, self.entries)
        hint = f"; did you mean it by {close}?" if close else ""
        raise UserError(f"{self.where}: {name} is missing{hint}")

    def _given(self, name: str) -> Any:
        value = self.raw(name)
        return self.defaults.get(name) if value is None else value

    def refuse(self, name: str, value: Any, accepted: str) -> UserError:
        """The error for a value that isn't accepted."""
        return UserError(f"{self.where}: {name} is {json.dumps(value)[:80]}; accepted: {accepted}")

    def integer(self, name: str) -> int:
        """A whole number from 1 to 2**31 - 1."""
        value = self._given(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not 1 <= value <= _MAX_INTEGER:
            raise self.refuse(name, value, f"a whole number from 1 to {_MAX_INTEGER}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """As `integer`, or None for null."""
        return None if self.raw(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """A positive finite number."""
        value = self._given(name)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not 0 < value < math.inf:
            raise self.refuse(name, value, "a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """As `number`, or None for null."""
        return None if self.raw(name) is None else self.number(name)

    def boolean(self, name: str) -> bool:
        value = self._given(name)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def choice(self, name: str, options: Mapping[str, Any]) -> Any:
        """What `options` gives for the name in the entry."""
        value = self._given(name)
        if not isinstance(value, str) or value not in options:
            raise self.refuse(name, value, ", ".join(sorted(options)))
        return options[value]

    def section(self, name: str, defaults: Mapping[str, Any]) -> "Fields | None":
        """The object under a name, or None where it is null, absent or empty."""
        value = self.entries.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, value, "an object")
        if not value:
            return None
        return Fields(value, f"{self.where}: {name}", defaults)
