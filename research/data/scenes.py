"""Hyperspectral scenes: a cube of spectra with a class for every pixel, generated or read from MATLAB files.

A source (`GeneratedScene`, `MatScene`) is a small frozen value that stands in a config; `load()` makes the `Scene`.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from research.data.sources import did_you_mean
from research.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A cube and what is known of it.

    Attributes:
      name: for titles; says so where the scene is generated.
      cube: f32[H, W, bands], reflectances or sensor counts.
      labels: int32[H, W], classes from 1 on, 0 where none is known.
      generated: whether the spectra were made by `GeneratedScene`.
      spectra: f32[E, bands], the pure spectra (endmembers), where they are known.
      abundances: f32[H, W, E], the share of each in a pixel, where it is known.
    """

    name: str
    cube: np.ndarray
    labels: np.ndarray
    generated: bool
    spectra: np.ndarray | None = None
    abundances: np.ndarray | None = None

    @property
    def num_classes(self) -> int:
        return int(self.labels.max())


class SceneSource(Protocol):
    """Where a scene comes from; hashable, so that a scene is loaded once for all who name it."""

    def load(self) -> Scene: ...


@dataclasses.dataclass(frozen=True)
class GeneratedScene:
    """A made-up scene by linear mixing: cube = shade * (abundances @ spectra) + noise.

    Spectra are smooth curves, sums of broad bumps. A class is a mean mixture in which one endmember has the share
    `purity`; a pixel's abundances are a Dirichlet draw around the mean of its class, averaged over 3 x 3 pixels, so
    that borders are mixed. They are at least 0 and sum to 1.

    Attributes:
      height, width, bands, endmembers, classes: sizes; every class has an endmember of its own.
      layout: of the classes: cells around random points, or the highest of smoothed random fields.
      cells: of the layout `voronoi`; several have one class.
      purity: from 0 to 1.
      variation: 1 / concentration of the Dirichlet draws: 0 gives every pixel the mean of its class.
      shading: relative standard deviation of a smooth field of illumination.
      noise: standard deviation added to every band, in the unit of the spectra, which lie in [0, 1].
      seed: of everything random.
    """

    height: int = 96
    width: int = 96
    bands: int = 60
    endmembers: int = 12
    classes: int = 9
    layout: Literal["voronoi", "noise"] = "voronoi"
    cells: int = 60
    purity: float = 0.4
    variation: float = 0.2
    shading: float = 0.1
    noise: float = 0.15
    seed: int = 0

    def __post_init__(self):
        for name in ("height", "width", "bands", "classes"):
            if getattr(self, name) < 2:
                raise UserError(f"GeneratedScene.{name}: {getattr(self, name)}; at least 2 is expected")
        if self.endmembers < self.classes:
            raise UserError(
                f"GeneratedScene.endmembers: {self.endmembers}; each of {self.classes} classes has its own"
            )
        if self.layout not in ("voronoi", "noise"):
            hint = did_you_mean(self.layout, ("voronoi", "noise"))
            raise UserError(f"GeneratedScene.layout: {self.layout!r} is neither voronoi nor noise{hint}")
        if self.layout == "voronoi" and not self.classes <= self.cells <= self.height * self.width:
            raise UserError(
                f"GeneratedScene.cells: {self.cells}; {self.classes} classes in {self.height}x{self.width} pixels "
                "need at least a cell each and at most one a pixel"
            )
        if not 0.0 <= self.purity <= 1.0:
            raise UserError(f"GeneratedScene.purity: {self.purity} is not in [0, 1]")
        for name in ("variation", "shading", "noise"):
            if getattr(self, name) < 0.0:
                raise UserError(f"GeneratedScene.{name}: {getattr(self, name)} is negative")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")

    def load(self) -> Scene:
        return _generate(self)


@dataclasses.dataclass(frozen=True)
class MatScene:
    """A scene in two MATLAB files, as Indian Pines, Pavia University, Salinas and others are distributed.

    Attributes:
      cube, truth: paths of the files.
      cube_key, truth_key: names of the arrays in them; by default the only one with three axes, [H, W, bands], and
        the only one with two, [H, W], in which 0 is unlabelled and classes count from 1.
    """

    cube: str
    truth: str
    cube_key: str | None = None
    truth_key: str | None = None

    def load(self) -> Scene:
        return _read(self)


@functools.lru_cache(maxsize=4)
def _generate(source: GeneratedScene) -> Scene:
    from scipy.ndimage import gaussian_filter, uniform_filter

    # RandomState, because numpy promises that its stream never changes.
    random = np.random.RandomState([source.seed, 7])
    spectra = _spectra(random, source.endmembers, source.bands)
    labels = _layout(random, source)
    shape = (source.height, source.width)

    others = random.dirichlet(np.full(source.endmembers, 0.5), source.classes)
    own = np.eye(source.endmembers)[: source.classes]
    means = source.purity * own + (1.0 - source.purity) * others
    abundances = means[labels]
    if source.variation:
        # A Dirichlet draw is gamma draws over their sum; below this floor a shape would give exact zeros only.
        draws = random.standard_gamma(np.maximum(abundances / source.variation, 1e-3))
        abundances = draws / draws.sum(axis=-1, keepdims=True)
    abundances = uniform_filter(abundances, size=(3, 3, 0), mode="nearest")
    abundances = np.maximum(abundances, 0.0)  # the running sums of the filter end a rounding below it
    abundances /= abundances.sum(axis=-1, keepdims=True)

    field = gaussian_filter(random.standard_normal(shape), min(shape) / 8, mode="wrap")
    shade = 1.0 + source.shading * field / field.std()
    cube = shade[..., None] * (abundances @ spectra)
    cube += source.noise * random.standard_normal(cube.shape)
    return Scene(
        name=f"generated scene, seed {source.seed}",
        cube=cube.astype(np.float32),
        labels=(labels + 1).astype(np.int32),
        generated=True,
        spectra=spectra.astype(np.float32),
        abundances=abundances.astype(np.float32),
    )


def _spectra(random: np.random.RandomState, count: int, bands: int) -> np.ndarray:
    """f64[count, bands] in [0.1, 0.9]: five bumps each, of widths from a tenth to a third of the range."""
    places = np.linspace(0.0, 1.0, bands)
    centres, widths = random.uniform(0.0, 1.0, (count, 5, 1)), random.uniform(0.1, 0.33, (count, 5, 1))
    heights = random.uniform(-1.0, 1.0, (count, 5, 1))
    curves = (heights * np.exp(-0.5 * ((places - centres) / widths) ** 2)).sum(axis=1)
    low, high = curves.min(axis=1, keepdims=True), curves.max(axis=1, keepdims=True)
    return 0.1 + 0.8 * (curves - low) / (high - low)


def _layout(random: np.random.RandomState, source: GeneratedScene) -> np.ndarray:
    """int64[H, W] of classes from 0 on, all of which occur."""
    height, width = source.height, source.width
    if source.layout == "voronoi":
        sites = random.permutation(height * width)[: source.cells]
        owners = np.concatenate(
            [np.arange(source.classes), random.randint(0, source.classes, source.cells - source.classes)]
        )
        rows, columns = np.mgrid[:height, :width]
        distance = (rows[..., None] - sites // width) ** 2 + (columns[..., None] - sites % width) ** 2
        return owners[distance.argmin(axis=-1)]
    from scipy.ndimage import gaussian_filter

    fields = random.standard_normal((source.classes, height, width))
    fields = gaussian_filter(fields, (0, min(height, width) / 16, min(height, width) / 16), mode="wrap")
    labels = (fields / fields.std(axis=(1, 2), keepdims=True)).argmax(axis=0)
    if missing := sorted(set(range(source.classes)) - set(labels.flat)):
        raise UserError(
            f"GeneratedScene: class {missing[0] + 1} has no pixel with seed {source.seed}; take another seed, fewer "
            "classes or a larger scene"
        )
    return labels


@functools.lru_cache(maxsize=4)
def _read(source: MatScene) -> Scene:
    cube = _array(source.cube, source.cube_key, 3)
    labels = _array(source.truth, source.truth_key, 2)
    if labels.shape != cube.shape[:2]:
        raise UserError(
            f"{source.truth}: labels of {labels.shape[0]}x{labels.shape[1]} pixels, but {source.cube} has "
            f"{cube.shape[0]}x{cube.shape[1]}"
        )
    if not np.isfinite(cube).all():
        raise UserError(f"{source.cube}: {np.sum(~np.isfinite(cube))} values are NaN or infinite")
    if (labels != np.round(labels)).any() or labels.min() < 0 or labels.max() < 1:
        raise UserError(
            f"{source.truth}: labels are whole numbers, 0 where nothing is known and classes from 1 on"
        )
    return Scene(Path(source.cube).stem, cube.astype(np.float32), labels.astype(np.int32), generated=False)


def _array(path: str, key: str | None, axes: int) -> np.ndarray:
    """The array `key` of a file, or its only one with so many axes."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        found: dict[str, Any] = loadmat(path)
    except NotImplementedError as error:
        raise UserError(f"{path}: a MATLAB 7.3 file, which is HDF5; save it with `save -v7`") from error
    except (MatReadError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: not a MATLAB file: {error}") from error
    arrays = {
        name: value
        for name, value in found.items()
        if isinstance(value, np.ndarray) and value.dtype.kind in "iufb" and not name.startswith("__")
    }
    shapes = (
        ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items()) or "no array of numbers"
    )
    if key is None:
        fitting = [name for name, value in arrays.items() if value.ndim == axes]
        if len(fitting) != 1:
            raise UserError(
                f"{path}: {len(fitting)} arrays have {axes} axes, name one of them; it holds {shapes}"
            )
        key = fitting[0]
    if key not in arrays:
        raise UserError(f"{path}: no array {key!r}; it holds {shapes}{did_you_mean(key, arrays)}")
    if arrays[key].ndim != axes:
        raise UserError(f"{path}: {key} is {list(arrays[key].shape)}, but {axes} axes are expected")
    return arrays[key]
