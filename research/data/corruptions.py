"""Images corrupted in the ways of ImageNet-C (arXiv 1903.12261), each in five severities.

Noise (gaussian, shot, impulse, speckle), blur (gaussian, defocus, motion), light (brightness, contrast) and digital
losses (pixelate, jpeg), with the numbers that the authors used for ImageNet-C, whose images have 224 pixels a side, and
for CIFAR-10-C with its 32. Not here: what needs pictures of its own (frost) or a weather model (snow, fog), and glass
blur, zoom blur, elastic and saturate.
"""

import dataclasses
import io
from collections.abc import Callable
from typing import Literal, get_args

import jax
import numpy as np
from scipy import ndimage

from research.data.images import ImageDataset
from research.data.pipeline import RecordDataset
from research.errors import UserError, nearest

Strengths = Literal["imagenet_c", "cifar_c"]
Strength = float | tuple[float, float]


def gaussian_noise(image: np.ndarray, sigma: float, rng: np.random.RandomState) -> np.ndarray:
    return image + rng.normal(scale=sigma, size=image.shape)


def shot_noise(image: np.ndarray, photons: float, rng: np.random.RandomState) -> np.ndarray:
    """Poisson noise of white that counts `photons`."""
    return rng.poisson(image * photons) / photons


def impulse_noise(image: np.ndarray, share: float, rng: np.random.RandomState) -> np.ndarray:
    """`share` of the values become black or white, both alike."""
    hit, white = rng.random_sample(image.shape) < share, rng.random_sample(image.shape) < 0.5
    return np.where(hit, white.astype(image.dtype), image)


def speckle_noise(image: np.ndarray, sigma: float, rng: np.random.RandomState) -> np.ndarray:
    return image * (1.0 + rng.normal(scale=sigma, size=image.shape))


def gaussian_blur(image: np.ndarray, sigma: float, rng: np.random.RandomState) -> np.ndarray:
    return ndimage.gaussian_filter(image, (sigma, sigma, 0.0), mode="nearest", truncate=4.0)


def defocus_blur(image: np.ndarray, strength: tuple[float, float], rng: np.random.RandomState) -> np.ndarray:
    """(radius, sigma): convolution with a disk whose edge is smoothed by sigma."""
    radius, sigma = strength
    reach = int(np.ceil(radius + 2.0 * sigma))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _convolve(image, ndimage.gaussian_filter((x**2 + y**2 <= radius**2).astype(float), sigma))


def motion_blur(image: np.ndarray, strength: tuple[float, float], rng: np.random.RandomState) -> np.ndarray:
    """(radius, sigma): one-sided Gaussian of sigma, 2 radius long, in a direction at most 45 degrees from the rows."""
    radius, sigma = strength
    reach, angle = int(np.ceil(2.0 * radius)), np.deg2rad(rng.uniform(-45.0, 45.0))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for distance in np.arange(0.0, 2.0 * radius + 1e-9, 0.25):
        # Each point of the line is shared among the four pixels around it.
        row, column = reach + distance * np.sin(angle), reach + distance * np.cos(angle)
        for r in (int(row), int(row) + 1):
            for c in (int(column), int(column) + 1):
                weight = max(0.0, 1.0 - abs(row - r)) * max(0.0, 1.0 - abs(column - c))
                if weight:
                    kernel[r, c] += weight * np.exp(-0.5 * (distance / sigma) ** 2)
    return _convolve(image, kernel)


def brightness(image: np.ndarray, shift: float, rng: np.random.RandomState) -> np.ndarray:
    """The largest channel (V of HSV) plus `shift`, at most 1, in unchanged hue and saturation."""
    value = image.max(axis=2, keepdims=True)
    # Black has no hue: it becomes grey.
    scaled = np.where(value > 0.0, image / np.where(value > 0.0, value, 1.0), 1.0)
    return scaled * np.minimum(value + shift, 1.0)


def contrast(image: np.ndarray, factor: float, rng: np.random.RandomState) -> np.ndarray:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * factor + mean


def pixelate(image: np.ndarray, factor: float, rng: np.random.RandomState) -> np.ndarray:
    """Scaled down to `factor` of its sides by averaging, and up again by repeating."""
    from PIL import Image

    height, width, _ = image.shape
    small = (max(1, int(width * factor)), max(1, int(height * factor)))
    planes = []
    for plane in np.moveaxis(image.astype(np.float32), 2, 0):
        reduced = Image.fromarray(plane).resize(small, Image.Resampling.BOX)
        planes.append(np.asarray(reduced.resize((width, height), Image.Resampling.NEAREST)))
    return np.stack(planes, axis=2)


def jpeg(image: np.ndarray, quality: float, rng: np.random.RandomState) -> np.ndarray:
    """Stored as JPEG and read again; images of one or three channels."""
    from PIL import Image

    stored, pixels = io.BytesIO(), np.round(image * 255.0).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if image.shape[2] == 1 else pixels).save(
        stored, "JPEG", quality=int(quality)
    )
    return np.asarray(Image.open(stored)).reshape(image.shape) / 255.0


def _convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return ndimage.convolve(image, (kernel / kernel.sum())[..., None], mode="nearest")


@dataclasses.dataclass(frozen=True)
class _Corruption:
    """apply(image f64[h, w, c] in [0, 1], strength, rng) -> values of the same shape; five strengths of each kind."""

    apply: Callable[[np.ndarray, Strength, np.random.RandomState], np.ndarray]
    imagenet_c: tuple[Strength, ...]
    cifar_c: tuple[Strength, ...]


CORRUPTIONS = {
    "gaussian_noise": _Corruption(
        gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)
    ),
    "shot_noise": _Corruption(shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": _Corruption(
        impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)
    ),
    "speckle_noise": _Corruption(speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": _Corruption(gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": _Corruption(
        defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "motion_blur": _Corruption(
        motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "brightness": _Corruption(brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": _Corruption(contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": _Corruption(pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": _Corruption(jpeg, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}


def corrupt_image(
    image: np.ndarray,
    kind: str,
    severity: int,
    rng: np.random.RandomState,
    strengths: Strengths = "imagenet_c",
) -> np.ndarray:
    """image f32[h, w, c] in [-1, 1] -> the same, corrupted. Severities are 1 to 5."""
    _check(kind, severity, strengths)
    corruption = CORRUPTIONS[kind]
    strength = getattr(corruption, strengths)[severity - 1]
    corrupted = corruption.apply((image.astype(np.float64) + 1.0) / 2.0, strength, rng)
    return (2.0 * np.clip(corrupted, 0.0, 1.0) - 1.0).astype(np.float32)


@dataclasses.dataclass(eq=False)
class CorruptedImages(RecordDataset):
    """The images of `data`, all corrupted in one way; labels and all else are untouched.

    In a config, one evaluator for each kind:
    `of(Evaluate, name="gaussian_noise", data=of(CorruptedImages, data=test, kind="gaussian_noise"))`.
    What is random in a corruption is a function of `seed`, the kind and the record's number.

    Attributes:
      data: images.
      kind: one of `CORRUPTIONS`.
      severity: from 1 to 5.
      strengths: whose numbers the severities stand for, ImageNet-C's or CIFAR-10-C's, which fit images of 32 pixels a
        side and are weaker. Blurs count in pixels, and those of ImageNet-C leave nothing of small images.
      seed: of what is random.
    """

    data: ImageDataset
    kind: str
    severity: int = 3
    strengths: Strengths = "imagenet_c"
    seed: int = 0

    def __post_init__(self):
        _check(self.kind, self.severity, self.strengths)
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.data.element_spec()

    def requires(self) -> dict[str, int | str]:
        return self.data.requires()

    def __len__(self) -> int:
        return len(self.data)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        batch = self.data.take(numbers)
        channels = batch["images"].shape[-1]
        if self.kind == "jpeg" and channels not in (1, 3):
            raise UserError(f"jpeg: images have {channels} channels; JPEG stores 1 or 3")
        key = list(CORRUPTIONS).index(self.kind)
        images = []
        for image, number in zip(batch["images"], np.asarray(numbers, np.int64).tolist(), strict=True):
            # RandomState, because numpy promises that its stream never changes.
            rng = np.random.RandomState([self.seed, key, number % (1 << 32)])
            images.append(corrupt_image(image, self.kind, self.severity, rng, self.strengths))
        return {**batch, "images": np.stack(images)}


def _check(kind: str, severity: int, strengths: str) -> None:
    if kind not in CORRUPTIONS:
        found = nearest(kind, tuple(CORRUPTIONS))
        hint = f"did you mean {found}?" if found else f"there are {', '.join(CORRUPTIONS)}"
        raise UserError(f"kind {kind!r}: no such corruption; {hint}")
    if not 1 <= severity <= 5:
        raise UserError(f"severity {severity}: from 1 to 5 is expected")
    if strengths not in get_args(Strengths):
        raise UserError(f"strengths {strengths!r}: there are {', '.join(get_args(Strengths))}")
