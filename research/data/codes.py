"""Images as discrete tokens: patches quantised to the nearest vector of a codebook (vector quantisation).

A codebook is a data transform, fitted by k-means; the one that ships (`codebook.json`) has 256 codes for patches
of 2 x 2 grey pixels, fitted to every 64th training crop of `PhotographDataset`:

    images = PhotographDataset(shuffle=False).take(np.arange(0, 40_875, 64))["images"]
    Codebook.fit(images, patch=2, size=256).save(BUILTIN)

    codes = Codebook.load().encode(images)      # int32[n, rows, columns]
    images = Codebook.load().decode(codes)
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.errors import UserError

BUILTIN = Path(__file__).parent / "codebook.json"
_DROPPED = 1  # the last part of the key of the permutation that says which records lose their label


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """centres float32[K, patch, patch, channels] in [-1, 1], from dark to bright."""

    centres: np.ndarray

    @classmethod
    def fit(cls, images: np.ndarray, patch: int, size: int, seed: int = 0) -> "Codebook":
        """`size` centres for the patches of images f32[n, h, w, c], by k-means (scikit-learn).

        Centres are rounded to four decimals, so that a file holds them exactly.

        Raises:
            UserError: images that patches don't tile, or fewer different patches than codes.
        """
        from sklearn.cluster import KMeans

        patches = _patches(images, patch)
        vectors = patches.reshape(-1, patch * patch * images.shape[-1])
        if (count := len(np.unique(vectors, axis=0))) < size:
            raise UserError(f"{size} codes can't be fitted to {count} different patches")
        fitted = KMeans(size, n_init=1, random_state=seed).fit(vectors)
        centres = np.unique(np.round(fitted.cluster_centers_, 4).astype(np.float32), axis=0)
        if len(centres) < size:
            raise UserError(f"{size} codes: only {len(centres)} differ by 0.0001 or more; ask for fewer")
        centres = centres[np.argsort(centres.mean(axis=1), kind="stable")]
        return cls(centres.reshape(size, patch, patch, -1))

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> "Codebook":
        """Reads what `save` wrote; by default the codebook that ships.

        Raises:
            UserError: a file that can't be read, or that is no codebook.
        """
        path = BUILTIN if path is None else Path(path)
        try:
            centres = np.asarray(json.loads(path.read_text(encoding="utf-8"))["centres"], np.float32)
        except FileNotFoundError:
            raise UserError(f"codebook {path} does not exist") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no codebook: {error!r}") from None
        if centres.ndim != 4 or centres.shape[1] != centres.shape[2] or not centres.size:
            raise UserError(
                f"{path} is no codebook: centres have shape {list(centres.shape)}, not [K, p, p, c]"
            )
        return cls(centres)

    def save(self, path: str | os.PathLike[str]) -> None:
        centres = np.round(self.centres.astype(np.float64), 4).tolist()
        lines = ",\n".join(json.dumps(centre) for centre in centres)
        Path(path).write_text(f'{{"centres": [\n{lines}\n]}}\n', encoding="utf-8")

    @property
    def size(self) -> int:
        """K."""
        return len(self.centres)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.centres.shape[1]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """images f32[n, h, w, c] -> the nearest centre of every patch, int32[n, h / patch, w / patch]."""
        if images.shape[-1] != self.centres.shape[-1]:
            raise UserError(f"images of {images.shape[-1]} channels, a codebook of {self.centres.shape[-1]}")
        patches = _patches(images, self.patch)
        vectors = patches.reshape(-1, self.centres[0].size).astype(np.float64)
        centres = self.centres.reshape(self.size, -1).astype(np.float64)
        # |x - c|^2 without |x|^2, which is the same for all c.
        distance = np.sum(centres**2, axis=1) - 2 * vectors @ centres.T
        return np.argmin(distance, axis=1).reshape(patches.shape[:3]).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes int[n, rows, columns] -> images f32[n, rows * patch, columns * patch, c]."""
        count, rows, columns = codes.shape
        pixels = self.centres[codes].transpose(0, 1, 3, 2, 4, 5)  # [n, row, y, column, x, c]
        return pixels.reshape(count, rows * self.patch, columns * self.patch, -1)


def _patches(images: np.ndarray, patch: int) -> np.ndarray:
    """images [n, h, w, c] -> [n, h / patch, w / patch, patch, patch, c]."""
    count, height, width, channels = images.shape
    if height % patch or width % patch:
        raise UserError(f"images of {height} x {width} pixels: patches of {patch} x {patch} don't tile them")
    tiles = images.reshape(count, height // patch, patch, width // patch, patch, channels)
    return tiles.transpose(0, 1, 3, 2, 4, 5)


class LabelledImages(Protocol):
    """A dataset of images with labels whose record is a function of its number (`research.data.images`)."""

    num_classes: int

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]: ...

    def __len__(self) -> int: ...

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(eq=False)
class CodeDataset(RecordDataset):
    """Images as language batches: a token for the class, then the codes in raster order (arXiv 2012.09841).

    A record holds the N = rows * columns codes of an image as `targets`, and as `tokens` the class and all codes but
    the last. Ids: codes from 0, then classes from the codebook's size K, and last the token of no class. `target_bytes`
    counts the pixels' values, so `bits_per_byte` is bits a dimension of the quantised image.

    Attributes:
      images: the images.
      codebook: path of a file by `Codebook.save`, read when first needed; by default the one that ships.
      drop: share of the records of every epoch that have no class, for guidance (arXiv 2207.12598, section 3.1).
      seed: of which records those are.
    """

    images: LabelledImages
    codebook: str | None = None
    drop: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not 0.0 <= self.drop <= 1.0:
            raise UserError(f"drop {self.drop}: a share from 0 to 1 is expected")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")
        # Two epochs, because a batch can stand in two.
        self._dropped = functools.lru_cache(maxsize=2)(self._compute_dropped)

    @functools.cached_property
    def vectors(self) -> Codebook:
        """The codebook itself."""
        return Codebook.load(self.codebook)

    @property
    def unconditional(self) -> int:
        """The token of no class, the last of the vocabulary."""
        return self.vectors.size + self.images.num_classes

    @property
    def length(self) -> int:
        """N."""
        height, width, _ = self.images.element_spec()["images"].shape
        return (height // self.vectors.patch) * (width // self.vectors.patch)

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        integers = ("tokens", "targets", "segments", "positions", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in integers}
        return {**spec, "weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def __len__(self) -> int:
        """Images of the split."""
        return len(self.images)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: arrays [n, N]."""
        numbers = np.asarray(numbers, np.int64)
        records = self.images.take(numbers)
        codes = self.vectors.encode(records["images"]).reshape(len(numbers), -1)
        epochs, places = np.divmod(numbers, len(self))
        dropped = np.array([self._dropped(int(e))[p] for e, p in zip(epochs, places, strict=True)], bool)
        label = np.where(dropped, self.unconditional, self.vectors.size + records["labels"])
        shape = codes.shape
        return {
            "tokens": np.concatenate([label[:, None], codes[:, :-1]], axis=1).astype(np.int32),
            "targets": codes,
            "segments": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
            "target_bytes": np.full(shape, self.vectors.centres[0].size, np.int32),
            "weights": np.broadcast_to(records["weights"][:, None], shape).astype(np.float32),
        }

    def _compute_dropped(self, epoch: int) -> np.ndarray:
        return permutation(len(self), self.seed, epoch, _DROPPED) < round(self.drop * len(self))
