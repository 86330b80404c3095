"""Generated scenes of glyphs, a made-up stand-in for images and questions about them; nothing of it is a photograph.

`GlyphAnswers`: a grid of patch tokens in a language model's own vocabulary, a question and a long answer.
`GlyphCanvases`: large pictures with a few small glyphs, to be read in crops.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np

from research.data.pipeline import RecordDataset
from research.errors import UserError

SPLITS = ("train", "validation", "test")
WORDS = ("<image>", "colour", "?", "it", "is", "there", "a", "at", ".")


def _check(what: str, split: str, size: int, seed: int, objects: tuple[int, int], most: int) -> None:
    if split not in SPLITS:
        raise UserError(f"{what}: the splits are {', '.join(SPLITS)}, not {split!r}")
    if size < 1 or seed < 0:
        raise UserError(f"{what}: size={size}, seed={seed}: at least 1 and 0 are expected")
    if not 1 <= objects[0] <= objects[1] <= most:
        raise UserError(f"{what}: objects={objects}: from 1 to {most} objects, the smaller number first")


@dataclasses.dataclass(frozen=True)
class GlyphAnswers(RecordDataset):
    """Language batches (docs/architecture.md) of a picture and a text; `target_bytes` is 0.

    A row is `<image>`, side^2 patch tokens row by row, `colour <shape> ?`, and the answer: `it is <colour> .`, and then
    for every object in raster order `there is a <colour> <shape> at <row> <column> .`. Shapes are different within a
    picture; all other patches are noise. Answers alone have weight. `prompt` int32 is how many tokens stand before the
    answer, the same in all rows.

    Args:
        side: rows and columns of patches.
        objects: the fewest and the most of a picture; each takes 9 tokens of an answer.
        shapes, colours, noises: kinds of each.
        size: records of an epoch; record i is a function of i, the split and the seed.
    """

    side: int = 8
    objects: tuple[int, int] = (6, 10)
    shapes: int = 10
    colours: int = 4
    noises: int = 16
    split: Literal["train", "validation", "test"] = "train"
    size: int = 1 << 16
    seed: int = 0

    def __post_init__(self):
        _check("glyphs", self.split, self.size, self.seed, self.objects, min(self.shapes, self.side**2))
        if self.colours < 1 or self.noises < 1:
            raise UserError(
                f"glyphs: colours={self.colours}, noises={self.noises}: at least one of each is expected"
            )

    @property
    def image(self) -> tuple[int, int]:
        """The place of the first patch and how many there are."""
        return 1, self.side**2

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return 1 + self.side**2 + 3

    @property
    def length(self) -> int:
        return self.prompt + 4 + 9 * self.objects[1]

    @property
    def starts(self) -> dict[str, int]:
        """The first token of every part of the vocabulary: words, shapes, colours, places, glyphs, noise."""
        sizes = dict(
            word=len(WORDS),
            shape=self.shapes,
            colour=self.colours,
            place=self.side,
            glyph=self.shapes * self.colours,
            noise=self.noises,
        )
        ends = np.cumsum(list(sizes.values())).tolist()
        return dict(zip(sizes, [0, *ends[:-1]], strict=True))

    @property
    def vocab_size(self) -> int:
        return self.starts["noise"] + self.noises

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("tokens", "targets", "segments", "positions", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in names}
        spec["weights"] = jax.ShapeDtypeStruct((self.length,), np.float32)
        return spec | {"prompt": jax.ShapeDtypeStruct((), np.int32)}

    def __len__(self) -> int:
        return self.size

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        rows = [self._row(int(number)) for number in numbers]
        shape = len(rows), self.length
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        place = np.arange(self.length, dtype=np.int32)
        # A token before the last predicts the answer's next one.
        weights = (place >= self.prompt - 1) & (np.pad(segments[:, 1:], ((0, 0), (0, 1))) > 0)
        return {
            "tokens": tokens,
            "targets": np.pad(tokens[:, 1:], ((0, 0), (0, 1))),
            "segments": segments,
            "positions": np.broadcast_to(place, shape),
            "target_bytes": np.zeros(shape, np.int32),
            "weights": weights.astype(np.float32),
            "prompt": np.full(len(rows), self.prompt, np.int32),
        }

    def _row(self, number: int) -> list[int]:
        # RandomState, because numpy promises that its stream never changes.
        rng = np.random.RandomState([self.seed, SPLITS.index(self.split), number % (1 << 32)])
        count = rng.randint(self.objects[0], self.objects[1] + 1)
        places = np.sort(rng.permutation(self.side**2)[:count])
        shapes = rng.permutation(self.shapes)[:count]
        colours = rng.randint(self.colours, size=count)
        at = self.starts
        word = {name: at["word"] + i for i, name in enumerate(WORDS)}
        picture = at["noise"] + rng.randint(self.noises, size=self.side**2)
        picture[places] = at["glyph"] + shapes * self.colours + colours
        asked = rng.randint(count)
        row = [word["<image>"], *picture.tolist(), word["colour"], at["shape"] + shapes[asked], word["?"]]
        row += [word["it"], word["is"], at["colour"] + colours[asked], word["."]]
        for place, shape, colour in zip(places, shapes, colours, strict=True):
            i, j = divmod(int(place), self.side)
            row += [word["there"], word["is"], word["a"], at["colour"] + colour, at["shape"] + shape]
            row += [word["at"], at["place"] + i, at["place"] + j, word["."]]
        return row


@dataclasses.dataclass(frozen=True)
class GlyphCanvases(RecordDataset):
    """Pictures float32 [side, side, 3] of noise with a few small glyphs of different shapes, one of which is asked for.

    A batch has `images`; `question` int32, a shape that is there; `labels` int32, its colour; `present` float32
    [views, shapes], which shapes lie in the thumbnail and in every crop of a grid of `grid` by `grid` (glyphs never lie
    across a border); `weights`. Shapes are fixed random pictures of glyph x glyph bits.

    Args:
        side, grid: pixels of the picture, and crops along each side.
        glyph: pixels of a glyph along each side.
        objects: the fewest and the most.
        shapes, colours: kinds; colours are corners of the colour cube.
        noise: standard deviation of the background.
    """

    side: int = 96
    grid: int = 2
    glyph: int = 12
    objects: tuple[int, int] = (1, 3)
    shapes: int = 6
    colours: int = 4
    noise: float = 0.1
    split: Literal["train", "validation", "test"] = "train"
    size: int = 1 << 16
    seed: int = 0

    def __post_init__(self):
        _check("canvases", self.split, self.size, self.seed, self.objects, self.shapes)
        if self.side % self.grid or (self.side // self.grid) % self.glyph or not 1 <= self.colours <= 7:
            raise UserError(
                f"canvases: side={self.side}, grid={self.grid}, glyph={self.glyph}, colours={self.colours}: crops that "
                "divide the picture, glyphs that divide a crop, and 1 to 7 colours are expected"
            )

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        one = jax.ShapeDtypeStruct((), np.int32)
        return {
            "images": jax.ShapeDtypeStruct((self.side, self.side, 3), np.float32),
            "question": one,
            "labels": one,
            "present": jax.ShapeDtypeStruct((1 + self.grid**2, self.shapes), np.float32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def __len__(self) -> int:
        return self.size

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        rows = [self._picture(int(number)) for number in numbers]
        return {name: np.stack([row[name] for row in rows]) for name in self.element_spec()}

    def _picture(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.RandomState([self.seed, SPLITS.index(self.split), number % (1 << 32)])
        masks = np.random.RandomState(self.glyph).randint(
            2, size=(self.shapes, self.glyph // 3, self.glyph // 3)
        )
        count = rng.randint(self.objects[0], self.objects[1] + 1)
        cells, crop = self.side // self.glyph, self.side // self.grid
        places = rng.permutation(cells**2)[:count]
        shapes = rng.permutation(self.shapes)[:count]
        colours = rng.randint(self.colours, size=count)
        image = rng.normal(0.0, self.noise, (self.side, self.side, 3)).astype(np.float32)
        present = np.zeros((1 + self.grid**2, self.shapes), np.float32)
        for place, shape, colour in zip(places, shapes, colours, strict=True):
            top, left = self.glyph * (place // cells), self.glyph * (place % cells)
            bits = np.kron(masks[shape], np.ones((3, 3)))[..., None]
            paint = np.array([(colour + 1) & 1, (colour + 1) >> 1 & 1, (colour + 1) >> 2], np.float32)
            image[top : top + self.glyph, left : left + self.glyph] += bits * paint
            present[0, shape] = present[1 + top // crop * self.grid + left // crop, shape] = 1.0
        asked = rng.randint(count)
        return {
            "images": image,
            "question": np.int32(shapes[asked]),
            "labels": np.int32(colours[asked]),
            "present": present,
            "weights": np.float32(1.0),
        }
