"""Sounds on their way to a model: the planner that lays out a log-mel spectrogram as overlapping windows.

    waves f32[N] -> log-mel energies [frames of 10 ms, bins] -> windows of size (time, frequency), every stride

as AST has them (arXiv 2104.01778: 16 x 16 every 10). Windows are the patches of one view, f32[1, P, time * frequency],
a step in time after another, and a step's by frequency; the grid is (steps, bands). `<audio>` stands in a text where a
sound is.
"""

import dataclasses
import os
from typing import ClassVar

import numpy as np

from research.data.sounds import name_of, read_wave
from research.data.spoken import RATE, log_mel, mel_filters
from research.errors import UserError
from research.multimodal.media import Media, MediaPlanner
from research.nn.patch import window_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrogram(MediaPlanner):
    """A sound of any length up to `frames`, in as many rows as it lasts.

    Energies are brought to mean 0 and standard deviation 0.5 for every sound (AST does that with numbers of its whole
    data set). The last windows of a sound are filled up with zeros, where AST drops what does not fill one.

    Args:
        frames: of 10 ms, the most of a sound.
        rate: samples a second.
        bins: of the mel scale.
        size, stride: (frames, bins) of a window, and from one to the next.
        merge: neighbouring steps that share a row, as the connector's.
    """

    mark: ClassVar[str] = "<audio>"
    called: ClassVar[str] = "sounds"

    frames: int
    rate: int = RATE
    bins: int = 64
    size: tuple[int, int] = (16, 16)
    stride: tuple[int, int] = (10, 10)
    merge: int = 1

    def __post_init__(self):
        window_counts((self.frames, self.bins), self.size, self.stride)  # raises where none fits
        for name, least in (("merge", 1), ("rate", 100)):
            if getattr(self, name) < least:
                raise UserError(f"Spectrogram: {name}={getattr(self, name)}: at least {least} is expected")
        mel_filters(self.bins, self.rate)  # raises where there are too many

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along time, the most there can be, and along frequency."""
        (bands,) = window_counts((self.bins,), self.size[1:], self.stride[1:])
        return self._steps(self.frames), bands

    def _steps(self, frames: int) -> int:
        return 1 + max(-(-(frames - self.size[0]) // self.stride[0]), 0)

    @property
    def views(self) -> int:
        return 1

    @property
    def patches(self) -> int:
        steps, bands = self.counts
        return steps * bands

    @property
    def patch_width(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def rows(self) -> int:
        return -(-self.counts[0] // self.merge)

    def load(self, source: str | os.PathLike | bytes) -> np.ndarray:
        wave = read_wave(source, self.rate)
        self._check(wave, name_of(source))
        return wave

    def read(self, image: np.ndarray) -> tuple[Media, list[int | str]]:
        """f32[N], a wave at `rate` -> media without B and I, and the spelling. Raises UserError for what is no wave,
        and for one that is too short or too long."""
        if image.dtype != np.float32 or image.ndim != 1:
            raise UserError(f"a sound is float32[samples], not {image.dtype}{[*image.shape]}")
        self._check(image, "a sound")
        mel = log_mel(image, self.bins, self.rate).astype(np.float64)
        mel = (mel - mel.mean()) / (2 * mel.std() + 1e-6)
        steps, bands = self._steps(len(mel)), self.counts[1]
        whole = np.zeros((self.size[0] + self.stride[0] * (steps - 1), self.bins), np.float32)
        whole[: len(mel)] = mel
        cut = np.lib.stride_tricks.sliding_window_view(whole, self.size)[:: self.stride[0], :: self.stride[1]]
        patches = np.zeros((1, self.patches, self.patch_width), np.float32)
        patches[0, : steps * bands] = cut.reshape(steps * bands, -1)
        media = Media(patches, np.array([[steps, bands]], np.int32), np.zeros(1, np.int32))
        return media, list(range(-(-steps // self.merge)))

    def _check(self, wave: np.ndarray, where: str) -> None:
        """Raise UserError for what is too short, too long, or no numbers."""
        window, hop = (round(self.rate * seconds) for seconds in (0.025, 0.01))
        most = window + hop * self.frames - 1
        if not window <= len(wave) <= most:
            raise UserError(
                f"{where}: {len(wave)} samples, {len(wave) / self.rate:.2f} s; from {window} to {most} samples, "
                f"{most / self.rate:.2f} s, are heard"
            )
        if not np.isfinite(wave).all():
            raise UserError(f"{where}: some samples are no finite numbers")
