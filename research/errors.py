"""The one kind of exception that is the user's to fix, and the spelling help that goes with it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user or of a file, told in one line.

    The message names the wrong thing and, where there is one, the nearest right one. Programs print
    `error: <message>` and exit with 2; any other exception that escapes is a defect of ours.
    """

    def __init__(self, message: str):
        # One line is the contract, whatever an underlying library put into its own message.
        super().__init__(" ".join(str(message).split()))


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The member of `options` spelled closest to `name`, or `None` if none is close.

    Case is ignored in the comparison; ties go to the alphabetically first, so the answer is deterministic.
    """
    by_lower: dict[str, str] = {}
    for option in sorted({str(option) for option in options}):
        by_lower.setdefault(option.lower(), option)
    matches = difflib.get_close_matches(str(name).lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None
