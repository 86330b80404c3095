"""From the tokens of a row to its text, with stop strings cut exactly."""

from collections.abc import Sequence
from typing import Protocol


class TokenStream(Protocol):
    def push(self, token: int) -> str:
        """The text that a token completes."""

    def flush(self) -> str:
        """The rest."""


class RowText:
    """The growing text of one row.

    A stop string ends the row at its first occurrence, wherever it lies in the tokens, and is not part of the
    text. Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stream: TokenStream, stop: Sequence[str] = ()):
        self._stream = stream
        self._stop = tuple(stop)
        self._shown = 0
        self._ends: list[int] = []  # the length of the text after each token
        self.text = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        """How many tokens the text takes; after a stop string the last may reach beyond the cut."""
        if not self.stopped:
            return len(self._ends)
        return sum(end < len(self.text) for end in self._ends) + bool(self.text)

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that may be shown now. Tokens after a stop are ignored."""
        for token in tokens:
            if self.stopped:
                break
            self._add(self._stream.push(token))
            self._ends.append(len(self.text))
        return self._show(len(self.text) - (0 if self.stopped else self._held()))

    def finish(self) -> str:
        """The rest of the text when no more tokens come."""
        if not self.stopped:
            self._add(self._stream.flush())
        return self._show(len(self.text))

    def _add(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=1)
        begin = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [at for stop in self._stop if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
        )

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self.text[start : self._shown]
