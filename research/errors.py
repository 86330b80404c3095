"""The one kind of exception that is the user's to fix, and the spelling help that goes with it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user or of a file, told in one line.

    The message names the wrong thing and, where there is one, the nearest right one. Programs print
    `error: <message>` and exit with 2; any other exception that escapes is a defect of ours.
    """

    exit_code = 2

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
    # Not difflib.get_close_matches: of equals it takes the alphabetically last.
    matcher = difflib.SequenceMatcher(b=str(name).lower())
    best, best_ratio = None, 0.6
    for option in by_lower:
        matcher.set_seq1(option)
        if matcher.ratio() > best_ratio or (best is None and matcher.ratio() == best_ratio):
            best, best_ratio = by_lower[option], matcher.ratio()
    return best
