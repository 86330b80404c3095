"""A generated world with exact ground truth, and dialogues about its pictures; nothing of it is a photograph.

`Scenes`: a few coloured shapes on a grid of cells; captions, questions of colour, shape, place and number.
`Pages`: large pictures, not square, of small coloured digits, which can't be read when the page is squashed.

Both are sources of dialogues (`research.data.dialogues`) in a vocabulary of whole words, and know what every cell
holds.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from research.data.dialogues import Dialogue
from research.data.pipeline import RecordDataset
from research.data.tokenizer import Tokenizer
from research.errors import UserError

TOKENIZER = Path(__file__).with_name("shapes.json")
CELL = 8
SPLITS = ("train", "validation", "test")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
PAINT = np.array([[1, 0.1, 0.1], [0.1, 0.9, 0.1], [0.2, 0.3, 1], [1, 0.9, 0.1], [0.8, 0.1, 0.9], [1, 1, 1]])
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("0123456789")
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
_WORDS = """
what which colour shape digit is are the a an of in at on to left right above below how many there row column page
picture describe shapes digits nothing and yes no ? . ,
"""
# 5 x 7 dots, a row a number, the leftmost dot the highest bit.
_DOTS = """
0E 11 13 15 19 11 0E  04 0C 04 04 04 04 0E  0E 11 01 02 04 08 1F  1F 02 04 02 01 11 0E  02 06 0A 12 1F 02 02
1F 10 1E 01 01 11 0E  06 08 10 1E 11 11 0E  1F 01 02 04 08 08 08  0E 11 11 0E 11 11 0E  0E 11 11 0F 01 02 0C
"""


@functools.cache
def vocabulary() -> Tokenizer:
    """The tokenizer of whole words in `TOKENIZER`; a line break is one. Words it doesn't know become <pad>."""
    return Tokenizer.load(TOKENIZER)


def make_vocabulary(more: tuple[str, ...] = ()) -> Tokenizer:
    """What `TOKENIZER` was written from; `more` words have the ids behind its own."""
    words = dict.fromkeys((*_SPECIAL, *_WORDS.split(), "\n", *COLOURS, *SHAPES, *DIGITS, *more))
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s?.,]+|[?.,]"), "removed", invert=True)
    backend.add_special_tokens(list(_SPECIAL))
    return Tokenizer(backend)


@functools.cache
def stamps() -> np.ndarray:
    """bool[4 + 10, 8, 8]: the shapes and then the digits."""
    y, x = np.mgrid[:CELL, :CELL] - 3.5
    drawn = [
        x**2 + y**2 <= 12.5,
        np.maximum(abs(x), abs(y)) <= 3,
        (y <= 3) & (2 * abs(x) <= y + 4),
        (np.minimum(abs(x), abs(y)) <= 1) & (np.maximum(abs(x), abs(y)) <= 3.5),
    ]
    dots = np.array([int(word, 16) for word in _DOTS.split()]).reshape(10, 7, 1) >> np.arange(4, -1, -1) & 1
    digits = np.pad(dots.astype(bool), ((0, 0), (0, 1), (1, 2)))
    return np.concatenate([np.stack(drawn), digits])


def check(what: str, split: str, size: int, seed: int, objects: tuple[int, int], most: int) -> None:
    """Raises UserError for what no generated world can be."""
    if split not in SPLITS:
        raise UserError(f"{what}: the splits are {', '.join(SPLITS)}, not {split!r}")
    if size < 1 or not 0 <= seed < 1 << 32:
        raise UserError(f"{what}: size={size}, seed={seed}: at least 1 and 0 are expected")
    if not 1 <= objects[0] <= objects[1] <= most:
        raise UserError(f"{what}: objects={objects}: from 1 to {most} objects, the smaller number first")


@dataclasses.dataclass(frozen=True)
class World:
    """A generated source of `size` dialogues, in a vocabulary of its own; every one is a function of its number, the
    split and the seed."""

    split: Literal["train", "validation", "test"] = "train"
    size: int = 1 << 16
    seed: int = 0
    noise: float = 0.05

    tokenizer = str(TOKENIZER)

    def __len__(self) -> int:
        return self.size

    def _random(self, number: int) -> np.random.RandomState:
        # RandomState, because numpy promises that its stream never changes.
        return np.random.RandomState([self.seed, SPLITS.index(self.split), number % (1 << 32)])


@dataclasses.dataclass(frozen=True)
class _Pictures(World):
    """What the worlds of pictures share. `cells(number)` is their ground truth, `ask` their question."""

    kinds = SHAPES + DIGITS

    def __getitem__(self, number: int) -> Dialogue:
        """Record `number`, a function of it, the split and the seed."""
        random = self._random(number)
        kinds, colours = self._layout(random)
        image = self._paint(random, kinds, colours)
        question, answer = self._ask(random, kinds, colours)
        return Dialogue((image,), ((f"<image> {question}", answer),))

    def cells(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """What every cell of a record's picture shows: kinds and colours int[rows, columns], -1 where nothing is."""
        return self._layout(self._random(number))

    def picture(self, number: int) -> np.ndarray:
        """uint8[h, w, 3] of a record."""
        return self[number].images[0]

    def _layout(self, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _ask(self, random: np.random.RandomState, kinds: np.ndarray, colours: np.ndarray) -> tuple[str, str]:
        raise NotImplementedError

    def _paint(self, random: np.random.RandomState, kinds: np.ndarray, colours: np.ndarray) -> np.ndarray:
        rows, columns = kinds.shape
        image = np.full((rows, CELL, columns, CELL, 3), 0.15)
        for row, column in np.argwhere(kinds >= 0):
            image[row, :, column][stamps()[kinds[row, column]]] = PAINT[colours[row, column]]
        image = image.reshape(rows * CELL, columns * CELL, 3)
        image = image + self.noise * random.standard_normal(image.shape)
        return (np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Scenes(_Pictures):
    """Pictures of side x side cells with a few shapes, no two of one shape and no two of one colour.

    Questions: "what colour is the circle", "what shape is red", "what is left of the circle", "how many shapes are
    there", "describe the picture".

    Args:
        side: cells along each side.
        objects: the fewest and the most, at most four.
        asks: the questions that come, all alike often.
    """

    side: int = 3
    objects: tuple[int, int] = (2, 4)
    asks: tuple[Literal["colour", "shape", "place", "number", "caption"], ...] = (
        "colour",
        "shape",
        "place",
        "number",
        "caption",
    )

    def __post_init__(self):
        check("scenes", self.split, self.size, self.seed, self.objects, min(len(SHAPES), self.side**2))
        known = {"colour", "shape", "place", "number", "caption"}
        if not self.asks or not set(self.asks) <= known:
            raise UserError(f"scenes: asks={self.asks}: some of {', '.join(sorted(known))} are expected")

    def _layout(self, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        count = random.randint(self.objects[0], self.objects[1] + 1)
        kinds, colours = (np.full(self.side**2, -1) for _ in range(2))
        places = random.permutation(self.side**2)[:count]
        kinds[places] = random.permutation(len(SHAPES))[:count]
        colours[places] = random.permutation(len(COLOURS))[:count]
        return kinds.reshape(self.side, -1), colours.reshape(self.side, -1)

    def _ask(self, random: np.random.RandomState, kinds: np.ndarray, colours: np.ndarray) -> tuple[str, str]:
        there = np.argwhere(kinds >= 0)
        row, column = there[random.randint(len(there))]
        shape, colour = SHAPES[kinds[row, column]], COLOURS[colours[row, column]]
        ask = self.asks[random.randint(len(self.asks))]
        if ask == "colour":
            return f"what colour is the {shape}", colour
        if ask == "shape":
            return f"what shape is {colour}", shape
        if ask == "number":
            return "how many shapes are there", DIGITS[len(there)]
        if ask == "place":
            word, step = (("left of", (0, -1)), ("right of", (0, 1)), ("above", (-1, 0)), ("below", (1, 0)))[
                random.randint(4)
            ]
            other = row + step[0], column + step[1]
            inside = 0 <= other[0] < self.side and 0 <= other[1] < self.side
            found = SHAPES[kinds[other]] if inside and kinds[other] >= 0 else "nothing"
            return f"what is {word} the {shape}", found
        said = " and ".join(f"a {COLOURS[colours[r, c]]} {SHAPES[kinds[r, c]]}" for r, c in there)
        return "describe the picture", said


@dataclasses.dataclass(frozen=True)
class Pages(_Pictures):
    """Pages of 8 x 8 pixel cells with a few digits of 5 x 7 dots, no two of one colour.

    Questions: "what digit is red", which needs the page's own resolution, and "how many digits are there", which needs
    the whole page.

    Args:
        shapes: ((rows, columns), ...) of cells; a page has one of them.
        objects: the fewest and the most, at most six.
        asks: the questions that come, all alike often.
    """

    shapes: tuple[tuple[int, int], ...] = ((8, 12),)
    objects: tuple[int, int] = (2, 4)
    asks: tuple[Literal["digit", "number"], ...] = ("digit",)

    def __post_init__(self):
        least = min((rows * columns for rows, columns in self.shapes), default=0)
        check("pages", self.split, self.size, self.seed, self.objects, min(len(COLOURS), least))
        if not self.asks or not set(self.asks) <= {"digit", "number"}:
            raise UserError(f"pages: asks={self.asks}: digit and number are expected")

    def _layout(self, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = self.shapes[random.randint(len(self.shapes))]
        count = random.randint(self.objects[0], self.objects[1] + 1)
        kinds, colours = (np.full(rows * columns, -1) for _ in range(2))
        places = random.permutation(rows * columns)[:count]
        kinds[places] = len(SHAPES) + random.randint(10, size=count)
        colours[places] = random.permutation(len(COLOURS))[:count]
        return kinds.reshape(rows, columns), colours.reshape(rows, columns)

    def _ask(self, random: np.random.RandomState, kinds: np.ndarray, colours: np.ndarray) -> tuple[str, str]:
        there = np.argwhere(kinds >= 0)
        if self.asks[random.randint(len(self.asks))] == "number":
            return "how many digits are there", DIGITS[len(there)]
        row, column = there[random.randint(len(there))]
        return f"what digit is {COLOURS[colours[row, column]]}", DIGITS[kinds[row, column] - len(SHAPES)]


@dataclasses.dataclass(frozen=True)
class Cells(RecordDataset):
    """Image batches of a world's pictures: `images` f32[h, w, 3] in [-1, 1], `labels` int32[cells], what every cell
    shows, and `weights`. Towers learn from it before they are frozen.

    Labels: 0 for nothing, else 1 + shape or digit ("kind"), 1 + colour ("colour"), or 1 + kind * colours + colour
    ("both"). All pictures have one size.
    """

    world: Scenes | Pages
    label: Literal["kind", "colour", "both"] = "both"

    @property
    def num_classes(self) -> int:
        kinds, colours = len(_Pictures.kinds), len(COLOURS)
        return 1 + {"kind": kinds, "colour": colours, "both": kinds * colours}[self.label]

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows, columns = self.world.cells(0)[0].shape
        return {
            "images": jax.ShapeDtypeStruct((rows * CELL, columns * CELL, 3), np.float32),
            "labels": jax.ShapeDtypeStruct((rows * columns,), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def __len__(self) -> int:
        return len(self.world)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        numbers = [int(n) % len(self) for n in numbers]
        kinds, colours = (np.stack(x) for x in zip(*(self.world.cells(n) for n in numbers), strict=True))
        both = 1 + kinds * len(COLOURS) + colours
        labels = {"kind": 1 + kinds, "colour": 1 + colours, "both": np.where(kinds < 0, 0, both)}[self.label]
        images = np.stack([self.world.picture(n) for n in numbers])
        return {
            "images": images.astype(np.float32) / 127.5 - 1.0,
            "labels": labels.reshape(len(numbers), -1).astype(np.int32),
            "weights": np.ones(len(numbers), np.float32),
        }
