"""A generated world of short clips with exact ground truth, and dialogues about them; nothing of it is filmed.

`Clips`: one or two coloured shapes, each moving straight on at its own speed; captions, and questions of direction,
speed, colour and shape. The style is that of `research.data.shapes`, and so are the words, to which a few are added.

The set of a clip's frames does not say where a shape goes: played backwards, a clip is one that comes as often.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import numpy as np

from research.data.dialogues import Dialogue
from research.data.shapes import CELL, COLOURS, PAINT, SHAPES, World, check, make_vocabulary, stamps
from research.data.tokenizer import Tokenizer
from research.errors import UserError

TOKENIZER = Path(__file__).with_name("clips.json")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = ("slow", "fast")
ASKS = ("direction", "speed", "motion", "colour", "shape", "caption")
_WORDS = ("clip", "way", "does", "move", "moves", "up", "down", *SPEEDS)


@functools.cache
def vocabulary() -> Tokenizer:
    """The tokenizer of `TOKENIZER`: the words of shapes.json, with their ids, and then those of motion."""
    return Tokenizer.load(TOKENIZER)


def make_clip_vocabulary() -> Tokenizer:
    """What `TOKENIZER` was written from."""
    return make_vocabulary(_WORDS)


@dataclasses.dataclass(frozen=True)
class Mover:
    """A shape and where it goes: at (x, y) in frame 0, `step` pixels further in every next one."""

    shape: str
    colour: str
    direction: str
    speed: str
    start: tuple[int, int]
    step: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Clips(World):
    """Clips uint8[frames, side, side, 3] of moving shapes, no two of one shape and no two of one colour; where they
    cross, the later one covers the earlier.

    Questions: "which way does the circle move", "how fast is the circle", "how does the circle move" (its speed and
    direction), "what colour is the circle", "what shape is red", "describe the clip".

    Args:
        frames, side: how many, and the side of each in pixels.
        speeds: pixels a frame of what is slow and of what is fast.
        objects: the fewest and the most, at most two.
        asks: the questions that come, all alike often.
        told: a sentence, the caption, stands where the clip would, and there is none: what a language model may learn
            from words alone, before it is frozen.
    """

    frames: int = 8
    side: int = 32
    speeds: tuple[int, int] = (1, 3)
    objects: tuple[int, int] = (1, 2)
    asks: tuple[Literal["direction", "speed", "motion", "colour", "shape", "caption"], ...] = ASKS
    told: bool = False

    tokenizer = str(TOKENIZER)

    def __post_init__(self):
        check("clips", self.split, self.size, self.seed, self.objects, 2)
        slow, fast = self.speeds
        room = self.side - CELL
        if self.frames < 2 or not 0 < slow < fast or fast * (self.frames - 1) > room:
            raise UserError(
                f"clips: frames={self.frames}, speeds={self.speeds}, side={self.side}: at least 2 frames, the slow "
                f"speed first, and a way of at most {room} pixels"
            )
        if not self.asks or not set(self.asks) <= set(ASKS):
            raise UserError(f"clips: asks={self.asks}: some of {', '.join(ASKS)} are expected")

    def __getitem__(self, number: int) -> Dialogue:
        random = self._random(number)
        movers = self._movers(random)
        clip = self._film(random, movers)
        question, answer = self._ask(random, movers)
        if self.told:
            return Dialogue((), ((f"{_caption(movers)} . {question}", answer),))
        return Dialogue((clip,), ((f"<image> {question}", answer),))

    def movers(self, number: int) -> tuple[Mover, ...]:
        """What moves in the clip of a record, in the order in which it is drawn."""
        return self._movers(self._random(number))

    def _movers(self, random: np.random.RandomState) -> tuple[Mover, ...]:
        count = random.randint(self.objects[0], self.objects[1] + 1)
        kinds, colours = random.permutation(len(SHAPES))[:count], random.permutation(len(COLOURS))[:count]
        return tuple(self._mover(random, SHAPES[k], COLOURS[c]) for k, c in zip(kinds, colours, strict=True))

    def _mover(self, random: np.random.RandomState, shape: str, colour: str) -> Mover:
        direction, fast = list(DIRECTIONS)[random.randint(4)], random.randint(2)
        room, way = self.side - CELL, self.speeds[fast] * (self.frames - 1)
        # The way lies anywhere in the frame, whichever end of it comes first.
        low, across = random.randint(room - way + 1), random.randint(room + 1)
        x, y = DIRECTIONS[direction]
        along = low if x + y > 0 else low + way
        start = (along, across) if x else (across, along)
        step = (x * self.speeds[fast], y * self.speeds[fast])
        return Mover(shape, colour, direction, SPEEDS[fast], start, step)

    def _film(self, random: np.random.RandomState, movers: tuple[Mover, ...]) -> np.ndarray:
        clip = np.full((self.frames, self.side, self.side, 3), 0.15)
        for mover in movers:
            stamp = stamps()[SHAPES.index(mover.shape)]
            for number, frame in enumerate(clip):
                x, y = (s + number * v for s, v in zip(mover.start, mover.step, strict=True))
                frame[y : y + CELL, x : x + CELL][stamp] = PAINT[COLOURS.index(mover.colour)]
        clip = clip + self.noise * random.standard_normal(clip.shape)
        return (np.clip(clip, 0.0, 1.0) * 255).astype(np.uint8)

    def _ask(self, random: np.random.RandomState, movers: tuple[Mover, ...]) -> tuple[str, str]:
        one = movers[random.randint(len(movers))]
        ask = self.asks[random.randint(len(self.asks))]
        if ask == "caption":
            return "describe the clip", _caption(movers)
        return {
            "direction": (f"which way does the {one.shape} move", one.direction),
            "speed": (f"how fast is the {one.shape}", one.speed),
            "motion": (f"how does the {one.shape} move", f"{one.speed} {one.direction}"),
            "colour": (f"what colour is the {one.shape}", one.colour),
            "shape": (f"what shape is {one.colour}", one.shape),
        }[ask]


def _caption(movers: tuple[Mover, ...]) -> str:
    return " and ".join(f"a {m.speed} {m.colour} {m.shape} moves {m.direction}" for m in movers)
