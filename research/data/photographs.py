"""Small grey images that need no download: crops of the photographs inside scikit-image."""

import dataclasses
import functools

import jax
import numpy as np

from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.sources import did_you_mean
from research.errors import UserError

PICTURES = ("astronaut", "brick", "camera", "cat", "coffee", "coins", "gravel", "rocket")
_SHORT = 256  # pixels of the shorter side after scaling
_STRIDES = {
    "train": 3,
    "test": 32,
}  # pixels from crop to crop; an odd number meets all phases of a 2 x 2 patch


@dataclasses.dataclass(eq=False)
class PhotographDataset(RecordDataset):
    """Crops f32[size, size, 1] in [-1, 1] of eight grey photographs; the label says which (`PICTURES`).

    A record: `images`, `labels` int32[], `weights` f32[] (1), as of `ImageDataset`. Pictures are scaled to a
    shorter side of 256 pixels. `train` has the crops within the left three quarters of each picture, every 3
    pixels; `test` those within the right quarter, every 32 pixels. No pixel is in both.

    Attributes:
      split: `train` or `test`.
      size: height and width of a crop in pixels, at most 64 (the width of the narrowest quarter).
      seed: of the order, which differs from epoch to epoch.
      shuffle: whether it is random; else crops come picture by picture.
    """

    split: str = "train"
    size: int = 32
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        if self.split not in _STRIDES:
            hint = did_you_mean(self.split, _STRIDES)
            raise UserError(f"photographs: no split {self.split!r}; it has {', '.join(_STRIDES)}{hint}")
        if not 1 <= self.size <= 64:
            raise UserError(f"size {self.size}: crops of photographs have 1 to 64 pixels a side")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")
        # Two epochs, because a batch can stand in two.
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    @property
    def num_classes(self) -> int:
        """How many pictures there are."""
        return len(PICTURES)

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "images": jax.ShapeDtypeStruct((self.size, self.size, 1), np.float32),
            "labels": jax.ShapeDtypeStruct((), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def __len__(self) -> int:
        """Crops of the split."""
        return len(self._crops)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: images [n, size, size, 1], the rest [n]."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), len(self))
        chosen = [self._crops[self._order(int(e))[p]] for e, p in zip(epochs, places, strict=True)]
        pictures, size = pictures_in_grey(), self.size
        images = [pictures[label][y : y + size, x : x + size] for label, y, x in chosen]
        return {
            "images": np.stack(images)[..., None],
            "labels": np.array([label for label, _, _ in chosen], np.int32),
            "weights": np.ones(len(chosen), np.float32),
        }

    @functools.cached_property
    def _crops(self) -> list[tuple[int, int, int]]:
        """(label, top, left) of every crop."""
        stride, crops = _STRIDES[self.split], []
        for label, picture in enumerate(pictures_in_grey()):
            height, width = picture.shape
            border = width * 3 // 4
            start, stop = (0, border) if self.split == "train" else (border, width)
            for top in range(0, height - self.size + 1, stride):
                crops += [(label, top, left) for left in range(start, stop - self.size + 1, stride)]
        return crops

    def _compute_order(self, epoch: int) -> np.ndarray:
        return permutation(len(self), self.seed, epoch) if self.shuffle else np.arange(len(self))


@functools.cache
def pictures_in_grey() -> tuple[np.ndarray, ...]:
    """The photographs of `PICTURES`, f32[h, w] in [-1, 1], the shorter side 256 pixels."""
    from PIL import Image
    from skimage import data

    pictures = []
    for name in PICTURES:
        grey = Image.fromarray(getattr(data, name)()).convert("L")
        scale = _SHORT / min(grey.size)
        small = grey.resize([round(side * scale) for side in grey.size], Image.Resampling.LANCZOS)
        pictures.append(np.asarray(small, np.float32) / 127.5 - 1.0)
    return tuple(pictures)
