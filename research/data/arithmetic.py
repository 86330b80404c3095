"""Generated arithmetic in sentences, with answers that can be checked.

Every problem adds or subtracts two whole numbers, in one of a few templates; the answer ends the sentence. A problem
belongs to one split by a hash of its numbers, so no sum of the test split was seen in training, in whatever template.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from research.errors import UserError, nearest

SPLITS = ("train", "validation", "test")

_TEMPLATES = {
    "+": (
        "{name} has {a} {thing} and gets {b} more. Now there are {c}.",
        "A box holds {a} {thing}, another box {b}. Together they hold {c}.",
        "If we add {a} and {b} we get {c}.",
    ),
    "-": (
        "{name} has {a} {thing} and gives away {b} of them. Now there are {c}.",
        "Of {a} {thing} {b} are lost. What is left is {c}.",
        "If we take {b} from {a} we get {c}.",
    ),
}
_NAMES = ("Ada", "Ben", "Eva", "Kim", "Leo", "Max", "Mia", "Tom")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "pens", "stones")
_DOCUMENTS = {"train": 4000, "validation": 200, "test": 200}
_PROBLEMS = 16  # of a document


class Problem(NamedTuple):
    """A sentence up to its answer, and the answer's digits."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.question}{self.answer}.\n"


class Arithmetic:
    """A source of text (`TextSource`): documents of 16 problems, a line each.

    limit: operands and sums are below it. Raises `UserError` for a split that isn't one of `SPLITS`, or a limit
    below 10.
    """

    def __init__(self, split: str, limit: int = 100):
        if split not in SPLITS:
            close = nearest(split, SPLITS)
            hint = f"; did you mean {close}?" if close else ""
            raise UserError(f"arithmetic: the splits are {', '.join(SPLITS)}, not {split!r}{hint}")
        if limit < 10:
            raise UserError(f"arithmetic: limit {limit}: numbers below 10 or more are expected")
        self.split, self.limit = split, limit
        self.fingerprint = f"arithmetic 1 {split} {limit}"

    def __len__(self) -> int:
        return _DOCUMENTS[self.split]

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng((SPLITS.index(self.split), self.limit, index))
        return "".join(problem.text for problem in self._draw(rng, _PROBLEMS))

    def problems(self, count: int, seed: int = 0) -> list[Problem]:
        """`count` different problems of the split.

        Raises `UserError` where it hasn't so many.
        """
        rng = np.random.default_rng((SPLITS.index(self.split), self.limit, 1 << 31, seed))
        found: dict[Problem, None] = {}
        for _ in range(20 * count):
            if len(found) == count:
                return list(found)
            found |= dict.fromkeys(self._draw(rng, 1))
        raise UserError(
            f"arithmetic below {self.limit} has fewer than {count} problems in split {self.split}"
        )

    def _draw(self, rng: np.random.Generator, count: int) -> Iterator[Problem]:
        while count:
            operator = "+-"[rng.integers(2)]
            c, b = sorted(rng.integers(self.limit, size=2))[::-1]
            first, second, result = (c - b, b, c) if operator == "+" else (c, b, c - b)
            if split_of(int(first), operator, int(second)) != self.split:
                continue
            template = _TEMPLATES[operator][rng.integers(len(_TEMPLATES[operator]))]
            words = {"name": _NAMES[rng.integers(len(_NAMES))], "thing": _THINGS[rng.integers(len(_THINGS))]}
            question, _, _ = template.partition("{c}")
            yield Problem(question.format(a=first, b=second, **words), str(result))
            count -= 1


def split_of(a: int, operator: str, b: int) -> str:
    """Eight of ten problems are for training, one each for validation and test."""
    place = zlib.crc32(f"{a}{operator}{b}".encode()) % 10
    return {0: "validation", 1: "test"}.get(place, "train")
