"""Which documents of a source are trained on. A filter sees one text alone and is asked before anything is packed, so
record i of a dataset stays a function of i: a run stops and goes on as without, on any number of processes."""

import dataclasses
import functools
import re
from collections.abc import Callable

from research.data.sources import TextSource, digest
from research.errors import UserError

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_ELLIPSIS = re.compile(r"\.\.\.|…")
_BULLETS = ("-", "*", "•")


@dataclasses.dataclass(frozen=True)
class Gopher:
    """The quality rules of Gopher's MassiveText (arXiv 2112.11446, A.1.1): whether a text is prose.

    Words are what white space divides. A text is kept if it has `least` to `most` of them, of 3 to 10 characters in
    the mean; at most 0.1 "#" and at most 0.1 ellipses a word; at most 90 % lines that begin with a bullet, and 30 %
    that end with an ellipsis; a letter in 80 % of its words; and two of the, be, to, of, and, that, have, with.
    """

    least: int = 50
    most: int = 100_000

    def __call__(self, text: str) -> bool:
        words = text.split()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        count = len(words)
        if not words or not self.least <= count <= self.most:
            return False
        return (
            3 * count <= sum(map(len, words)) <= 10 * count
            and 10 * text.count("#") <= count
            and 10 * len(_ELLIPSIS.findall(text)) <= count
            and 10 * sum(line.startswith(_BULLETS) for line in lines) <= 9 * len(lines)
            and 10 * sum(line.endswith(("...", "…")) for line in lines) <= 3 * len(lines)
            and 5 * sum(any(map(str.isalpha, word)) for word in words) >= 4 * count
            and len(_STOP_WORDS & {word.strip(".,;:!?\"'()").lower() for word in words}) >= 2
        )


class Filtered:
    """The documents of `source` that `keep` keeps, in their order; they are read on first use.

    keep: a dataclass, whose fields name it: tokens are cached by them.
    """

    def __init__(self, source: TextSource, keep: Callable[[str], bool], name: str):
        if not dataclasses.is_dataclass(keep):
            raise UserError(f"keep={keep}: a dataclass is expected, whose fields say what it does")
        self._source, self._keep, self._name = source, keep, name
        self.fingerprint = digest(source.fingerprint, type(keep).__module__, repr(keep))

    @functools.cached_property
    def _index(self) -> list[int]:
        found = [i for i in range(len(self._source)) if self._keep(self._source[i])]
        if not found:
            raise UserError(f"{self._name}: {self._keep} keeps none of the {len(self._source)} documents")
        return found

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> str:
        return self._source[self._index[index]]
