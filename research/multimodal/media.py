"""Images on their way to a model: files of all kinds, the crops that a planner cuts, patches and their grid.

A *planner* is a small frozen value that stands in a config. It lays out an image of any size, on the host, as at most
`views` crops of at most `patches` patches, and spells the image as a run of tokens: rows of what the model's connector
makes of the image, and texts between them. Shapes never depend on the image, so nothing is compiled anew. Videos
(`video.py`) and sounds (`sound.py`) have planners of their own.
"""

import contextlib
import dataclasses
import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import jax
import numpy as np
from flax import struct
from PIL import Image, ImageOps, UnidentifiedImageError

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.multimodal.scaling import Colour, in_square, scaled, squared
from research.nn.patch import patchify
from research.paths import expand

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Media(struct.PyTreeNode):
    """The images of a batch, I a row (or fewer) of V views (or fewer) of P patches (or fewer).

    patches f32[B, I, V, P, p * p * 3], row-major in each view, with 0 behind the last; grid int32[B, I, V, 2], rows and
    columns of patches, 0 where there is no view; marks int32[B, I, V], what the planner tells its connector of each
    view; words int32[B, I, C], tokens of a text that an image is seen with, None where the planner keeps none. What a
    planner reads is one image, without the axes B and I. Of sounds see `sound.py`.
    """

    patches: jax.Array
    grid: jax.Array
    marks: jax.Array
    words: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Crop:
    """A part of an image: scaled to `size` (width, height), cut to `box` (left, top, right, bottom), and of that every
    `step`-th row and column. mark: see `Media.marks`."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    step: int = 1
    mark: int = 0

    @classmethod
    def whole(cls, width: int, height: int) -> "Crop":
        return cls((width, height), (0, 0, width, height))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaPlanner:
    """Base of planners of whatever a prompt may show. A subclass has the properties and methods that raise here."""

    mark: ClassVar[str] = "<image>"  # where one stands in a text
    called: ClassVar[str] = "images"

    @property
    def views(self) -> int:
        """V, the most views of one."""
        raise NotImplementedError

    @property
    def patches(self) -> int:
        """P, the most patches of a view."""
        raise NotImplementedError

    @property
    def patch_width(self) -> int:
        """Numbers of a patch."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """M, how many rows the connector makes of one."""
        raise NotImplementedError

    def group(self, row: int) -> int | None:
        """Neighbouring rows with the same number share a position; None: it has its own."""
        return None

    def read(self, image: np.ndarray) -> tuple[Media, list[int | str]]:
        """What `load` gives -> media without B and I, and how it stands in a text: a row of the connector's, or a text.
        Raises UserError for what is no such thing."""
        raise NotImplementedError

    def load(self, source: str | os.PathLike | bytes) -> np.ndarray:
        """A file, or its bytes, as `read` takes it. Raises UserError for what is no such file."""
        raise NotImplementedError

    def about(self, media: Media, text: str, tokenizer: Tokenizer) -> Media:
        """What was read, with what the planner keeps of the text that asks about it: nothing, by default."""
        return media

    def nothing(self, images: int) -> Media:
        """`images` places with nothing to show."""
        return Media(
            np.zeros((images, self.views, self.patches, self.patch_width), np.float32),
            np.zeros((images, self.views, 2), np.int32),
            np.zeros((images, self.views), np.int32),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner(MediaPlanner):
    """Base of planners of images. A subclass has `views`, `patches`, `rows` and the methods that raise here.

    Args:
        patch: pixels of a patch along each side.
        mean, std: what is subtracted from pixels in [0, 1], and divided by, in each channel.
        share: rows that share one position: none, those of a row of patches, all of an image (MouSi,
            arXiv 2401.17221).
        exact: scale by the bicubic filter alone, however large an image is; else see `scaled`.
    """

    patch: int
    mean: Colour = (0.5, 0.5, 0.5)
    std: Colour = (0.5, 0.5, 0.5)
    share: Literal["none", "row", "image"] = "none"
    exact: bool = False

    @property
    def patch_width(self) -> int:
        return self.patch**2 * 3

    def plan(self, width: int, height: int) -> tuple[Crop, ...]:
        """The crops of an image of so many pixels, in the order of the views."""
        raise NotImplementedError

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        """How the image stands in a text: a row of the connector's, or a text."""
        raise NotImplementedError

    def pad(self, image: np.ndarray) -> np.ndarray:
        """What is done to the image before it is cut: nothing, by default."""
        return image

    @property
    def columns(self) -> int:
        """Of the square that a view's rows of the connector make: how many stand side by side."""
        return math.isqrt(self.rows // self.views)

    def group(self, row: int) -> int | None:
        return None if self.share == "none" else 0 if self.share == "image" else row // self.columns

    def grid(self, crop: Crop) -> tuple[int, int]:
        """Rows and columns of patches of a crop."""
        left, top, right, bottom = crop.box
        return -(-(bottom - top) // crop.step) // self.patch, -(-(right - left) // crop.step) // self.patch

    def read(self, image: np.ndarray) -> tuple[Media, list[int | str]]:
        """uint8[h, w, 3] -> media without B and I, and the spelling. Raises UserError for what is no such image."""
        check_pixels(image)
        image = self.pad(image)
        crops = self.plan(image.shape[1], image.shape[0])
        return self.fill(zip(crops, cut(image, crops, self.exact), strict=True)), self.spell(crops)

    def load(self, source: str | os.PathLike | bytes) -> np.ndarray:
        """A file, or its bytes, as `read` takes it. Raises UserError as `read_image`."""
        return read_image(source)

    def fill(self, crops: Iterable[tuple[Crop, np.ndarray]]) -> Media:
        """Crops, each with its pixels uint8[h, w, 3] -> media without B and I."""
        patches = np.zeros((self.views, self.patches, self.patch_width), np.float32)
        grid, marks = np.zeros((self.views, 2), np.int32), np.zeros(self.views, np.int32)
        mean, std = (np.tile(np.float32(x), self.patch**2) for x in (self.mean, self.std))
        for view, (crop, pixels) in enumerate(crops):
            grid[view], marks[view] = self.grid(crop), crop.mark
            flat = patchify(pixels[None], self.patch)[0]
            own = patches[view, : len(flat)]
            # In place, as this is most of the time for planners of many crops.
            own[...] = flat
            own /= 255.0
            own -= mean
            own /= std
        return Media(patches, grid, marks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Planner):
    """One view of side x side pixels, and a row for every patch (LLaVA, arXiv 2304.08485; 1.5 pads).

    Args:
        side: of the view.
        padded: make the image a square first, with the mean colour on both sides; else it is squashed.
        count: rows of the connector, where they are not the patches.
    """

    side: int
    padded: bool = False
    count: int | None = None

    def __post_init__(self):
        if self.side % self.patch:
            raise UserError(f"Square: side={self.side} is not a multiple of patch={self.patch}")

    @property
    def views(self) -> int:
        return 1

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def rows(self) -> int:
        return self.patches if self.count is None else self.count

    def pad(self, image: np.ndarray) -> np.ndarray:
        if not self.padded:
            return image
        return in_square(image, self.mean) if self.exact else squared(image, self.side, self.mean)

    def plan(self, width: int, height: int) -> tuple[Crop, ...]:
        return (Crop.whole(self.side, self.side),)

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        return list(range(self.rows))


def check_pixels(image: np.ndarray) -> None:
    """Raise UserError for what is no uint8[h, w, 3], with pixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(
            f"an image is uint8[height, width, 3], with pixels; not {image.dtype}{[*image.shape]}"
        )


def cut(image: np.ndarray, crops: Sequence[Crop], exact: bool = False) -> list[np.ndarray]:
    """uint8[h, w, 3] -> the crops; the image is scaled once for every size, see `scaled`."""
    images = scaled(image, [crop.size for crop in crops], exact)
    return [_part(images[crop.size], crop) for crop in crops]


def _part(image: np.ndarray, crop: Crop) -> np.ndarray:
    left, top, right, bottom = crop.box
    if crop.step == 1:
        return image[top:bottom, left:right]
    # A pixel as one value, for copying three bytes at a time takes twice as long.
    pixels = image.view("V3")[top : bottom : crop.step, left : right : crop.step]
    return np.ascontiguousarray(pixels).view(np.uint8)


@contextlib.contextmanager
def opened(source: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    """An image file, or its bytes, as Pillow has it. Whatever is found wrong with it inside is a UserError."""
    where = name_of(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else expand(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of its limit on; at the limit it refuses, below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            yield image
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{where}: {error.strerror}; an image file is expected") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: over {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which is too large") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{where}: a damaged image: {error}") from error


def name_of(source: str | os.PathLike | bytes) -> str:
    """How a message calls it."""
    return "an image" if isinstance(source, bytes) else str(source)


def read_image(source: str | os.PathLike | bytes) -> np.ndarray:
    """An image file, or its bytes -> uint8[h, w, 3]: upright (EXIF), CMYK, palettes and grey as RGB, 16 bits scaled to
    8, alpha over white.

    Raises:
        UserError: no such file, not an image, a damaged one, one without pixels or with more than Pillow's limit.
    """
    with opened(source) as file:
        file.load()
        ImageOps.exif_transpose(file, in_place=True)
    if 0 in file.size:
        raise UserError(f"{name_of(source)}: an image of {file.width}x{file.height} pixels")
    return as_rgb(file)


def as_rgb(image: Image.Image) -> np.ndarray:
    """A loaded image of any mode -> uint8[h, w, 3], as `read_image`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        deep = np.asarray(image, np.float64)
        # Files of 16 bits come as I;16 or, from some formats, as I; floats are taken to be in [0, 1].
        full = 1.0 if image.mode == "F" else 65535.0
        grey = np.clip(np.round(np.nan_to_num(deep / full) * 255.0), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
