"""Generated records of many kinds: clouds of points, series with a calendar, inertial sensors, graphs, moving shapes.

Nothing here is measured. Every record is a function of its number, the split and the seed; each kind is a small task
with a label that is true by construction.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from research.data.clips import DIRECTIONS, Clips
from research.data.pipeline import RecordDataset
from research.data.shapes import SPLITS
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generated(RecordDataset):
    """size: records of an epoch."""

    split: Literal["train", "validation", "test"] = "train"
    size: int = 1 << 16
    seed: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"{type(self).__name__}: the splits are {', '.join(SPLITS)}, not {self.split!r}")
        if self.size < 1 or not 0 <= self.seed < 1 << 32:
            raise UserError(
                f"{type(self).__name__}: size={self.size}, seed={self.seed}: at least 1 and 0 are expected"
            )

    @abc.abstractmethod
    def record(self, random: np.random.RandomState) -> dict[str, np.ndarray]:
        """One record, drawn with `random`."""

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in self.take(np.zeros(1, int)).items()}

    def __len__(self) -> int:
        return self.size

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        # RandomState, because numpy promises that its stream never changes.
        keys = [[self.seed, SPLITS.index(self.split), int(number) % self.size] for number in numbers]
        records = [self.record(np.random.RandomState(key)) | {"weights": np.float32(1)} for key in keys]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _sphere(random: np.random.RandomState, count: int) -> np.ndarray:
    points = random.standard_normal((count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _cube(random: np.random.RandomState, count: int) -> np.ndarray:
    points, side = random.uniform(-0.8, 0.8, (count, 3)), random.randint(6, size=count)
    points[np.arange(count), side % 3] = np.where(side < 3, 0.8, -0.8)
    return points


def _torus(random: np.random.RandomState, count: int) -> np.ndarray:
    # By area: the outer half is larger. Of too many the first that are kept suffice, with all but certainty.
    around, along = random.uniform(0, 2 * np.pi, (2, 8 * count))
    kept = np.flatnonzero(random.uniform(0, 1.4, 8 * count) < 1 + 0.4 * np.cos(around))[:count]
    around, along = around[kept], along[kept]
    radius = 0.75 + 0.3 * np.cos(around)
    return np.stack([radius * np.cos(along), radius * np.sin(along), 0.3 * np.sin(around)], axis=1)


SOLIDS: dict[str, Callable[[np.random.RandomState, int], np.ndarray]] = {
    "sphere": _sphere,
    "cube": _cube,
    "torus": _torus,
}


@dataclasses.dataclass(frozen=True)
class Solids(Generated):
    """Surfaces of a sphere, a cube or a torus: `points` f32[points, 3], turned, scaled along each axis and noisy, and
    `labels` int32[], the place in `SOLIDS`. noise: standard deviation; the solids' radius is about 1.
    """

    points: int = 128
    noise: float = 0.05

    num_classes = len(SOLIDS)

    def record(self, random: np.random.RandomState) -> dict[str, np.ndarray]:
        label = random.randint(len(SOLIDS))
        points = list(SOLIDS.values())[label](random, self.points) * random.uniform(0.7, 1.1, 3)
        turn, _ = np.linalg.qr(random.standard_normal((3, 3)))
        points = points @ turn + self.noise * random.standard_normal(points.shape)
        return {"points": points.astype(np.float32), "labels": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class Seasons(Generated):
    """Hourly series to be forecast: `values` f32[length, channels], `calendar` f32[length, 4], and `targets`
    f32[horizon, channels], what comes next.

    A channel has a daily profile of its own, scaled at weekends, a yearly wave, and autoregressive noise. calendar:
    hour, weekday, day of the month and day of the year, each from -0.5 to 0.5. Training windows lie in the first four
    of six years, those of validation and test in the fifth and the sixth. seed also draws the profiles.
    """

    length: int = 24
    horizon: int = 8
    channels: int = 3
    noise: float = 0.3

    def record(self, random: np.random.RandomState) -> dict[str, np.ndarray]:
        year = 365 * 24
        first, years = {"train": (0, 4), "validation": (4, 1), "test": (5, 1)}[self.split]
        total = self.length + self.horizon
        hours = first * year + random.randint(years * year - total) + np.arange(total)
        own = np.random.RandomState([self.seed, 3])
        phases, levels = (
            own.uniform(0, 2 * np.pi, (2, self.channels)),
            own.uniform(0.3, 1.5, (3, self.channels)),
        )
        day, weekday, date = hours[:, None] / 24 * 2 * np.pi, hours // 24 % 7, hours % year // 24
        daily = np.sin(day + phases[0]) + 0.5 * levels[0] * np.sin(2 * day + phases[1])
        weekend = np.where(weekday >= 5, 0.4, 1.0)[:, None]
        drift = self.noise * random.standard_normal((total, self.channels))
        for step in range(1, total):
            drift[step] += 0.7 * drift[step - 1]
        values = (
            levels[1] * weekend * daily + levels[2] * np.cos(date[:, None] / 365 * 2 * np.pi) + drift
        ).astype("f")
        calendar = (
            np.stack([hours % 24 / 23, weekday / 6, date % 30 / 29, date / 364], axis=1).astype("f") - 0.5
        )
        return {
            "values": values[: self.length],
            "calendar": calendar[: self.length],
            "targets": values[self.length :],
        }


# Of a body: steps a second, how hard they are, how fast it turns, and how much of the push is sideways.
_GAITS = {
    "standing": (0.0, 0.0, 0.0, 0.0),
    "walking": (1.8, 0.5, 0.3, 0.2),
    "running": (2.8, 0.9, 0.5, 0.3),
    "cycling": (1.4, 0.25, 0.6, 0.8),
    "turning": (0.0, 0.1, 1.5, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Gaits(Generated):
    """Two seconds of an inertial sensor worn any way up: `values` f32[length, 6], acceleration in g and turning in
    rad/s along three axes, and `labels` int32[], the place in `_GAITS`. noise: standard deviation of each."""

    length: int = 32
    noise: float = 0.3

    num_classes = len(_GAITS)

    def record(self, random: np.random.RandomState) -> dict[str, np.ndarray]:
        label = random.randint(len(_GAITS))
        rate, push, turn, sideways = list(_GAITS.values())[label]
        phase = (
            2 * np.pi * (rate * random.uniform(0.9, 1.1) * np.linspace(0, 2, self.length) + random.uniform())
        )
        push, turn = push * random.uniform(0.7, 1.3), turn * random.uniform(0.7, 1.3)
        up = 1 + push * (np.sin(phase) + 0.4 * np.sin(2 * phase))
        side = sideways * push * np.sin(phase / 2)
        forward = 0.5 * push * np.cos(phase)
        spin = turn * (np.cos(phase / 2) if rate else random.choice((-1, 1)) * np.ones(self.length))
        moved = np.stack(
            [np.stack([side, forward, up]), np.stack([0 * spin, 0 * spin, spin])]
        )  # [2, 3, length]
        worn, _ = np.linalg.qr(random.standard_normal((3, 3)))
        values = np.einsum("ij,kjt->tki", worn, moved).reshape(self.length, 6)
        values = values + self.noise * random.standard_normal(values.shape)
        return {"values": values.astype(np.float32), "labels": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class Motions(Generated):
    """Which way the one shape of a clip of `research.data.clips` moves: `images` f32[frames, side, side, 3] in [-1, 1],
    and `labels` int32[], of left, right, up and down."""

    frames: int = 4
    side: int = 16

    num_classes = len(DIRECTIONS)

    def record(self, random: np.random.RandomState) -> dict[str, np.ndarray]:
        # A world of one clip, of a seed of its own.
        number = int(random.randint(1 << 32, dtype=np.uint32))
        clip = Clips(seed=number, frames=self.frames, side=self.side, speeds=(1, 2), objects=(1, 1))
        (mover,) = clip.movers(0)
        images = clip[0].images[0].astype(np.float32) / 127.5 - 1.0
        return {"images": images, "labels": np.int32(list(DIRECTIONS).index(mover.direction))}
