"""Images with labels, numbered like text records: scikit-learn's digits, or a TFDS dataset."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.sources import did_you_mean, missing_field, tfds_builder, tfds_records
from research.data.stdlib_code import Progress
from research.errors import UserError

_DIGITS = ("train", "validation", "test")


@dataclasses.dataclass(eq=False)
class ImageDataset(RecordDataset):
    """Images f32[h, w, c] in [-1, 1] with an integer label.

    A record: `images` f32[h, w, c], `labels` int32[], `weights` f32[] (1). Every epoch has its own order.

    Attributes:
      source: `digits` (scikit-learn's 1797 handwritten digits, 8 x 8 x 1, ten classes: 1429 train, 185
        validation, 183 test, each tenth of a class to one image) or `tfds:NAME`.
      split: of the source.
      image_key, label_key: features of a TFDS dataset.
      size: height and width of the images. Needed where the source's images differ in size: the shorter side
        is scaled to `size` and the middle is cut out. By default images stay as they are.
      seed: of the order.
      shuffle: whether it is random; else images come as the source has them.
    """

    source: str = "digits"
    split: str = "train"
    image_key: str = "image"
    label_key: str = "label"
    size: int | None = None
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        if self.source != "digits" and not self.source.startswith("tfds:"):
            hint = did_you_mean(self.source, ("digits", "tfds:"))
            raise UserError(f"source {self.source!r}: images come from digits or tfds:NAME{hint}")
        if self.source == "digits" and self.split not in _DIGITS:
            hint = did_you_mean(self.split, _DIGITS)
            raise UserError(f"digits: no split {self.split!r}; it has {', '.join(_DIGITS)}{hint}")
        if self.size is not None and self.size < 1:
            raise UserError(f"size {self.size}: at least one pixel is expected")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")
        # Two epochs, because a batch can stand in two.
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    def prepare(self, progress: Progress | None = None) -> "ImageDataset":
        """Reads what isn't read yet; else the first use does so."""
        if progress:
            progress(f"open {self.source}", 0, 1)
        _ = self._records
        if progress:
            progress(f"open {self.source}", 1, 1)
        return self

    @functools.cached_property
    def _records(self) -> Any:
        if self.source == "digits":
            return _digits(self.split)
        builder = tfds_builder(self.source.partition(":")[2])
        for key in (self.image_key, self.label_key):
            if key not in builder.info.features:
                raise UserError(f"{self.source}: {missing_field(key, builder.info.features)}")
        return tfds_records(builder, self.split, self.source)

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int]:
        return self._image(self._records[0]).shape

    @property
    def num_classes(self) -> int:
        """How many labels the source has."""
        if self.source == "digits":
            return 10
        return tfds_builder(self.source.partition(":")[2]).info.features[self.label_key].num_classes

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes are those of the source's first image (after `size`)."""
        return {
            "images": jax.ShapeDtypeStruct(self._shape, np.float32),
            "labels": jax.ShapeDtypeStruct((), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def requires(self) -> dict[str, int]:
        """As in `research.training.feed.check_fit`."""
        if self.source == "digits":
            return {"num_classes": 10}
        _ = self._records  # says what is wrong with the source
        labels = tfds_builder(self.source.partition(":")[2]).info.features[self.label_key]
        return {"num_classes": labels.num_classes} if hasattr(labels, "num_classes") else {}

    def __len__(self) -> int:
        """Images of the split."""
        return len(self._records)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: images [n, h, w, c], the rest [n]."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), len(self))
        chosen = [int(self._order(int(e))[p]) for e, p in zip(epochs, places, strict=True)]
        records = [self._records[i] for i in chosen]
        images = [self._image(record) for record in records]
        for index, image in zip(chosen, images, strict=True):
            if image.shape != self._shape:
                raise UserError(
                    f"{self.source}: image {index} has shape {image.shape}, the first one {self._shape}; "
                    "size=... makes them equal"
                )
        labels = np.array([record[self.label_key] for record in records], np.int32)
        return {"images": np.stack(images), "labels": labels, "weights": np.ones(len(chosen), np.float32)}

    def _compute_order(self, epoch: int) -> np.ndarray:
        return permutation(len(self), self.seed, epoch) if self.shuffle else np.arange(len(self))

    def _image(self, record: dict[str, Any]) -> np.ndarray:
        image = np.asarray(record[self.image_key])
        if self.source != "digits":
            if image.dtype != np.uint8 or image.ndim != 3:
                shape = f"{image.dtype}{list(image.shape)}"
                raise UserError(f"{self.source}: {self.image_key} is {shape}, not an image uint8[h, w, c]")
            image = image.astype(np.float32) / 127.5 - 1.0
        return image if self.size is None else _resized(image, self.size)


def _digits(split: str) -> list[dict[str, Any]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)  # values are 0 to 16
    # Within each class every tenth image validates and the next one tests: fixed, and each class alike.
    rank = np.zeros(len(labels), np.int64)
    for label in range(10):
        rank[labels == label] = np.arange(np.sum(labels == label))
    part = np.array(["validation", "test", *["train"] * 8])[rank % 10]
    chosen = np.flatnonzero(part == split)
    return [{"image": images[i], "label": int(labels[i])} for i in chosen]


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """f32[size, size, c]: `image` f32[h, w, c] scaled to the shorter side and cut in the middle."""
    from PIL import Image

    height, width, _ = image.shape
    short = min(height, width)
    box = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
    planes = [
        np.asarray(Image.fromarray(plane, "F").resize((size, size), Image.Resampling.BICUBIC, box=box))
        for plane in np.moveaxis(image, 2, 0)
    ]
    return np.clip(np.stack(planes, axis=2), -1.0, 1.0)
