"""Paths as users write them."""

import os
from pathlib import Path

from research.errors import UserError


def expand(path: str | os.PathLike[str]) -> Path:
    """`path` with the home folder in place of a leading `~` or `~user`.

    Raises:
        UserError: nobody knows that home folder.
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"no home folder of {path.parts[0]} is known: write the path without it") from error
