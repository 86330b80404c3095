"""Windows of a hyperspectral scene around its pixels: splits, whitening, and the dataset of them.

A window of `size` pixels around the pixel (r, c) covers the rows r - size // 2 to r - size // 2 + size - 1, and the
columns alike; the pixel itself stands at [size // 2, size // 2].
"""

import dataclasses
import functools
from typing import Literal, Protocol

import jax
import numpy as np

from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.scenes import Scene, SceneSource
from research.data.sources import did_you_mean
from research.errors import UserError

PARTS = ("train", "validation", "test")  # numbered from 1 in a map of parts; 0 is in none


class Split(Protocol):
    """Which pixel is in which part. Hashable."""

    def parts(self, labels: np.ndarray, size: int) -> np.ndarray:
        """labels int[H, W] of a scene seen through windows of `size` -> int8[H, W], 0 or 1 + index in `PARTS`."""


def _check_shares(train: float, validation: float, seed: int) -> None:
    if not (train > 0.0 and validation >= 0.0 and train + validation < 1.0):
        raise UserError(
            f"train={train}, validation={validation}: shares of the pixels that leave some for the test"
        )
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed {seed}: from 0 to 2**32 - 1 is expected")


@dataclasses.dataclass(frozen=True)
class RandomSplit:
    """Pixels of each class drawn at random: shares `train` and `validation`, the rest for the test.

    The usual protocol. Windows of test pixels then contain training pixels and overlap with their windows, so it
    measures interpolation within the scene (see `overlap`).
    """

    train: float = 0.25
    validation: float = 0.25
    seed: int = 0

    def __post_init__(self):
        _check_shares(self.train, self.validation, self.seed)

    def parts(self, labels: np.ndarray, size: int) -> np.ndarray:
        parts = np.zeros(labels.size, np.int8)
        for label in range(1, labels.max() + 1):
            pixels = np.flatnonzero(labels.ravel() == label)
            wanted = [max(round(share * len(pixels)), share > 0) for share in (self.train, self.validation)]
            if len(pixels) and sum(wanted) >= len(pixels):
                raise UserError(f"class {label} has {len(pixels)} labelled pixels, too few for this split")
            pixels = pixels[permutation(len(pixels), self.seed, label)]
            ends = np.cumsum(wanted)
            for part, chosen in enumerate(np.split(pixels, ends), start=1):
                parts[chosen] = part
        return parts.reshape(labels.shape)


@dataclasses.dataclass(frozen=True)
class BlockSplit:
    """Square blocks of the scene, whole blocks to a part, and only pixels whose window lies in their block.

    So no pixel of the scene is in a window of two parts. Of `draws` random assignments of blocks it takes the one
    whose shares of the classes are nearest to `train` and `validation`.

    Attributes:
      block: side in pixels; blocks at the right and lower border may be smaller.
    """

    block: int = 12
    train: float = 0.25
    validation: float = 0.25
    seed: int = 0
    draws: int = 500

    def __post_init__(self):
        _check_shares(self.train, self.validation, self.seed)
        if self.draws < 1:
            raise UserError(f"BlockSplit.draws: {self.draws}; at least 1 is expected")

    def parts(self, labels: np.ndarray, size: int) -> np.ndarray:
        if self.block < size:
            raise UserError(
                f"BlockSplit.block: {self.block}; windows of {size} pixels don't fit into such blocks"
            )
        height, width = labels.shape
        columns = -(-width // self.block)
        count = -(-height // self.block) * columns
        rows, inside_row = _within(height, self.block, size)
        places, inside_column = _within(width, self.block, size)
        blocks = rows[:, None] * columns + places
        kept = np.where(inside_row[:, None] & inside_column, labels, 0)
        classes = np.unique(labels[labels > 0])
        counts = np.stack([np.bincount(blocks[kept == c], minlength=count) for c in classes], axis=1)
        shares = np.array([self.train, self.validation, 1.0 - self.train - self.validation])
        ends = np.round(np.cumsum(shares) * count).astype(int)
        kinds = np.searchsorted(
            ends, np.arange(count), side="right"
        )  # of the first, second, ... block of a draw

        best, nearest = None, np.inf
        for draw in range(self.draws):
            assigned = kinds[permutation(count, self.seed, draw)]
            found = np.stack([counts[assigned == part].sum(axis=0) for part in range(3)])  # [parts, classes]
            if (found[shares > 0] == 0).any():
                continue
            distance = np.abs(found / found.sum(axis=0) - shares[:, None]).max()
            if distance < nearest:
                best, nearest = assigned, distance
        if best is None:
            raise UserError(
                f"none of {self.draws} ways to split the scene into blocks of {self.block} has every class in every "
                "part; smaller blocks make it possible"
            )
        return np.where(kept > 0, best[blocks] + 1, 0).astype(np.int8)


def _within(length: int, block: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every place along an axis: its block, and whether its window, as far as it is in the scene, lies in it."""
    places = np.arange(length)
    first = np.maximum(places - size // 2, 0)
    last = np.minimum(places - size // 2 + size - 1, length - 1)
    return places // block, (first // block == places // block) & (last // block == places // block)


def windows_cover(pixels: np.ndarray, size: int) -> np.ndarray:
    """bool[H, W] -> bool[H, W]: the pixels of the scene that lie in a window of any of `pixels`."""
    before, after = size // 2, size - size // 2 - 1
    height, width = pixels.shape
    wide = np.pad(pixels, (after, before))
    # What is seen at q is seen from a pixel between q - after and q + before.
    views = [wide[r : r + height, c : c + width] for r in range(size) for c in range(size)]
    return np.any(views, axis=0)


def overlap(parts: np.ndarray, size: int) -> float:
    """Share of the test pixels whose window has a pixel in common with a training window."""
    seen = windows_cover(parts == 1, size)
    # Who sees a pixel that was seen: windows turned round, which for even sizes are not the same.
    touching = windows_cover(seen[::-1, ::-1], size)[::-1, ::-1]
    return float(touching[parts == 3].mean())


@dataclasses.dataclass(frozen=True, eq=False)
class Whitening:
    """x -> (x - mean) @ matrix: principal components of unit variance. mean [bands], matrix [bands, components]."""

    mean: np.ndarray
    matrix: np.ndarray

    @classmethod
    def fit(cls, spectra: np.ndarray, components: int) -> "Whitening":
        """Of spectra [n, bands]; the largest entry of every component is positive, so that signs are settled."""
        count, bands = spectra.shape
        if not 1 <= components <= min(bands, count - 1):
            raise UserError(
                f"components={components}: {count} training pixels of {bands} bands have 1 to {min(bands, count - 1)}"
            )
        spectra = spectra.astype(np.float64)
        mean = spectra.mean(axis=0)
        centred = spectra - mean
        variances, vectors = np.linalg.eigh(centred.T @ centred / (count - 1))
        variances, vectors = variances[::-1][:components], vectors[:, ::-1][:, :components]
        if variances[-1] <= 1e-12 * variances[0]:
            rank = int(np.sum(variances > 1e-12 * variances[0]))
            raise UserError(f"components={components}: the training pixels vary in {rank} directions alone")
        largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(components)]
        return cls(mean, vectors * np.sign(largest) / np.sqrt(variances))

    @classmethod
    def of_bands(cls, spectra: np.ndarray) -> "Whitening":
        """Of spectra [n, bands]: every band by itself, none left out."""
        spread = spectra.std(axis=0, dtype=np.float64)
        if not spread.all():
            raise UserError(f"band {int(np.argmin(spread))} is the same in all training pixels")
        return cls(spectra.mean(axis=0, dtype=np.float64), np.diag(1 / spread))

    def __call__(self, spectra: np.ndarray) -> np.ndarray:
        """[..., bands] -> f32[..., components]."""
        return ((spectra - self.mean) @ self.matrix).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A scene cut up: whitened f32[H, W, components], parts int8[H, W]."""

    scene: Scene
    whitened: np.ndarray
    parts: np.ndarray


@functools.lru_cache(maxsize=4)
def prepare(source: SceneSource, split: Split, size: int, components: int, bands: bool = False) -> Prepared:
    """The scene, whitened by its training pixels alone."""
    scene = source.load()
    parts = split.parts(scene.labels, size)
    seen = scene.cube[parts == 1]
    if bands and components != seen.shape[1]:
        raise UserError(f"{scene.name}: components={components}, and the scene has {seen.shape[1]} bands")
    whitening = Whitening.of_bands(seen) if bands else Whitening.fit(seen, components)
    return Prepared(scene, whitening(scene.cube), parts)


@dataclasses.dataclass(eq=False)
class ScenePatches(RecordDataset):
    """Windows f32[size, size, components] of a scene, whitened, with the class of their pixel as label.

    A record: `images`, `labels` int32[] (from 0 on), `weights` f32[] (1), as of `ImageDataset`. Places outside of
    the scene are 0, the mean of the training pixels.

    Attributes:
      scene, split: where the pixels come from, and which is for what.
      num_classes: that the scene is expected to have.
      part: `train`, `validation` or `test`; or `all` pixels of the scene, row by row where it isn't shuffled, whose
        weight is 0 where no class is known.
      size: of the windows, in pixels.
      components: principal components that are kept.
      bands: the scene's bands themselves, each whitened by itself; `components` says how many there are.
      seed: of the order, which differs from epoch to epoch.
      shuffle: whether it is random.
    """

    scene: SceneSource
    split: Split
    num_classes: int
    part: Literal["train", "validation", "test", "all"] = "train"
    size: int = 4
    components: int = 15
    seed: int = 0
    shuffle: bool = True
    bands: bool = False

    def __post_init__(self):
        if self.part not in (*PARTS, "all"):
            hint = did_you_mean(self.part, (*PARTS, "all"))
            raise UserError(f"scene: no part {self.part!r}; it has {', '.join(PARTS)} and all{hint}")
        if self.size < 1:
            raise UserError(f"size {self.size}: a window has at least one pixel")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")
        # Two epochs, because a batch can stand in two.
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "images": jax.ShapeDtypeStruct((self.size, self.size, self.components), np.float32),
            "labels": jax.ShapeDtypeStruct((), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def __len__(self) -> int:
        """Pixels of the part."""
        return len(self._pixels)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: images [n, size, size, components], the rest [n]."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), len(self))
        orders = {epoch: self._order(int(epoch)) for epoch in np.unique(epochs)}
        chosen = self._pixels[[orders[e][p] for e, p in zip(epochs, places, strict=True)]]
        labels = self.prepared.scene.labels.ravel()[chosen]
        rows, columns = np.divmod(chosen, self.prepared.parts.shape[1])
        offsets = np.arange(self.size)
        # The padding moves a window's first place to the pixel's own coordinates.
        images = self._wide[
            (rows[:, None] + offsets)[:, :, None],
            (columns[:, None] + offsets)[:, None, :],
        ]
        return {
            "images": images,
            "labels": np.maximum(labels - 1, 0).astype(np.int32),
            "weights": (labels > 0).astype(np.float32),
        }

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The whole scene; computed once for all datasets over it."""
        found = prepare(self.scene, self.split, self.size, self.components, self.bands)
        if found.scene.num_classes != self.num_classes:
            raise UserError(
                f"{found.scene.name}: {found.scene.num_classes} classes, but num_classes={self.num_classes}"
            )
        return found

    @property
    def chosen(self) -> np.ndarray:
        """bool[H, W]: the pixels of the part."""
        parts = self.prepared.parts
        return np.ones(parts.shape, bool) if self.part == "all" else parts == PARTS.index(self.part) + 1

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        """int64[n], row-major numbers of the part's pixels."""
        pixels = np.flatnonzero(self.chosen)
        if not len(pixels):
            raise UserError(f"{self.prepared.scene.name}: the split leaves no pixel for {self.part}")
        return pixels

    @functools.cached_property
    def _wide(self) -> np.ndarray:
        before = self.size // 2
        around = (before, self.size - before - 1)
        return np.pad(self.prepared.whitened, (around, around, (0, 0)))

    def _compute_order(self, epoch: int) -> np.ndarray:
        return permutation(len(self), self.seed, epoch) if self.shuffle else np.arange(len(self))
