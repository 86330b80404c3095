"""Spoken digits: a generated world with exact ground truth, recordings of a folder, log-mel spectra and units of both.

`SpokenDigits` is generated: nothing of it is a recording, and no one spoke it. A word is a sum of harmonics of a
voice's pitch under two formants that move as the digit says, with hiss where it has a fricative; the formants are
roughly those of the English words. `SpokenFiles` reads recordings in the layout of the Free Spoken Digit Dataset.

    source = SpokenDigits()                   # or SpokenFiles("recordings")
    recording = source[0]                     # wave f32[N] at 8 kHz, digits, speaker
    log_mel(recording.wave)                   # f32[frames, 64]
    units(recording.wave)                     # int32[frames // 3], of 64 units

The codebook of units that ships (`units.json`) was fitted by k-means to generated utterances of the training split:

    frames = np.concatenate([unit_frames(r.wave) for r in map(SpokenDigits(digits=(2, 4)).__getitem__, range(200))])
    Codebook.fit(frames[:, None, None], patch=1, size=64).save(UNITS)
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Literal, Protocol

import jax
import numpy as np

from research.data.codes import Codebook
from research.data.pipeline import RecordDataset
from research.data.shapes import SPLITS
from research.data.sounds import read_wav
from research.errors import UserError
from research.paths import expand

RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNITS = Path(__file__).parent / "units.json"
WINDOW, HOP = 200, 80  # 25 ms and 10 ms of 8 kHz
STACK = 3  # frames that share a unit: 30 ms

# A digit: first formant and second formant in Hz at its begin, middle and end; hiss at begin and end; seconds.
_SOUNDS = np.array(
    [
        [300, 350, 450, 1700, 2100, 900, 0.5, 0.0, 0.40],  # zero
        [300, 650, 300, 700, 1150, 1500, 0.0, 0.0, 0.30],
        [350, 320, 320, 1800, 1400, 900, 0.6, 0.0, 0.28],
        [400, 420, 300, 1200, 1400, 2300, 0.3, 0.0, 0.34],
        [400, 600, 480, 900, 850, 1300, 0.4, 0.0, 0.34],
        [700, 750, 400, 1100, 1250, 2000, 0.4, 0.3, 0.38],
        [380, 400, 380, 1800, 1950, 1900, 0.9, 0.9, 0.40],
        [550, 500, 350, 1800, 1650, 1300, 0.9, 0.0, 0.42],
        [480, 400, 350, 1900, 2100, 2250, 0.0, 0.6, 0.30],
        [300, 750, 320, 1450, 1300, 1900, 0.0, 0.0, 0.36],
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """wave: f32[N] in [-1, 1] at 8 kHz; digits: what is said; speaker: a number from 0 on."""

    wave: np.ndarray
    digits: tuple[int, ...]
    speaker: int

    @property
    def text(self) -> str:
        """The words said, as "three one"."""
        return " ".join(WORDS[digit] for digit in self.digits)


class SpokenSource(Protocol):
    """Numbered recordings: a small frozen value that stands in a config."""

    num_speakers: int

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Recording: ...


@dataclasses.dataclass(frozen=True)
class SpokenDigits:
    """Generated utterances. A record is a function of its number, the split and the seed.

    Args:
        split: "train", "validation" or "test"; voices are the same in all.
        size: records of an epoch.
        digits: the fewest and the most of an utterance.
        num_speakers: voices; each has its pitch (90 to 230 Hz), length of the throat and timbre.
        noise: standard deviation of what is added, where the voice has a peak of 0.5.
    """

    split: Literal["train", "validation", "test"] = "train"
    size: int = 1 << 16
    seed: int = 0
    digits: tuple[int, int] = (1, 1)
    num_speakers: int = 8
    noise: float = 0.05

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"spoken digits: the splits are {', '.join(SPLITS)}, not {self.split!r}")
        if self.size < 1 or not 0 <= self.seed < 1 << 32 or self.num_speakers < 1:
            raise UserError(
                f"spoken digits: size={self.size}, seed={self.seed}, num_speakers={self.num_speakers}: at least 1, "
                "0 and 1 are expected"
            )
        if not 1 <= self.digits[0] <= self.digits[1]:
            raise UserError(f"spoken digits: digits={self.digits}: the fewest, at least 1, and the most")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Recording:
        random = self._random(number)
        said, speaker = self._said(random)
        parts = []
        for digit in said:
            parts += [_say(digit, speaker, self.num_speakers, random), np.zeros(random.randint(320, 641))]
        wave = np.concatenate(parts)
        wave = 0.5 * random.uniform(0.5, 1.0) * wave / np.abs(wave).max()
        wave = wave + self.noise * random.standard_normal(len(wave))
        return Recording(np.clip(wave, -1.0, 1.0).astype(np.float32), said, speaker)

    def truth(self, number: int) -> tuple[tuple[int, ...], int]:
        """Digits and speaker of a record, without its sound."""
        return self._said(self._random(number))

    def _random(self, number: int) -> np.random.RandomState:
        # RandomState, because numpy promises that its stream never changes.
        return np.random.RandomState([self.seed, SPLITS.index(self.split), number % (1 << 32)])

    def _said(self, random: np.random.RandomState) -> tuple[tuple[int, ...], int]:
        count = random.randint(self.digits[0], self.digits[1] + 1)
        return tuple(random.randint(10, size=count).tolist()), random.randint(self.num_speakers)


@dataclasses.dataclass(frozen=True)
class SpokenFiles:
    """Recordings DIGIT_SPEAKER_N.wav in a folder, 16 bits, mono, 8 kHz: one digit each.

    Of every six neighbouring N the first is for the test, the second for validation and the others for training;
    speakers are numbered in the order of their names.
    """

    path: str
    split: Literal["train", "validation", "test", "all"] = "all"

    def __post_init__(self):
        if self.split not in (*SPLITS, "all"):
            raise UserError(f"{self.path}: the splits are {', '.join(SPLITS)} and all, not {self.split!r}")

    @property
    def num_speakers(self) -> int:
        return len({speaker for _, speaker, _, _ in _listing(self.path)})

    @functools.cached_property
    def _files(self) -> list[tuple[int, str, int, Path]]:
        places = {"test": (0,), "validation": (1,), "train": (2, 3, 4, 5), "all": range(6)}[self.split]
        found = [file for file in _listing(self.path) if file[2] % 6 in places]
        if not found:
            raise UserError(f"{self.path}: no recording of the split {self.split}")
        return found

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Recording:
        """Raises UserError for a file that isn't a recording as above."""
        digit, speaker, _, path = self._files[number]
        rate, wave = read_wav(path)
        if rate != RATE or wave.dtype != np.int16 or wave.ndim != 1:
            raise UserError(
                f"{path}: {rate} Hz, {wave.dtype}{list(wave.shape)}; 8000 Hz, int16, mono is expected"
            )
        names = sorted({name for _, name, _, _ in _listing(self.path)})
        return Recording(wave.astype(np.float32) / 32768, (digit,), names.index(speaker))


@functools.lru_cache(maxsize=8)
def _listing(path: str) -> list[tuple[int, str, int, Path]]:
    """(digit, speaker, N, file), sorted."""
    folder = expand(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder")
    named = ((re.fullmatch(r"(\d)_([^_]+)_(\d+)\.wav", file.name), file) for file in folder.iterdir())
    found = [(int(m[1]), m[2], int(m[3]), file) for m, file in named if m]
    if not found:
        raise UserError(f"{path}: no file is named DIGIT_SPEAKER_N.wav")
    return sorted(found)


def log_mel(wave: np.ndarray, bins: int = 64, rate: int = RATE) -> np.ndarray:
    """f32[N] at 8 kHz -> log-mel energies f32[1 + (N - 200) // 80, bins]; at another rate windows last as long.

    The recipe of AST (arXiv 2104.01778, section 2.1; Kaldi's filter banks), with the windows' samples halved for half
    its rate: 25 ms Hann windows every 10 ms, each without its mean and with a pre-emphasis of 0.97, the power spectrum
    of 256 points (the power of two from the window on), triangles on the mel scale from 20 to 4000 Hz (half the rate),
    of which 64 fit (AST has 128 up to 8 kHz).

    Raises:
        UserError: a wave shorter than a window, or more bins than the spectrum can tell apart.
    """
    window, hop = round(rate * WINDOW / RATE), round(rate * HOP / RATE)
    if len(wave) < window:
        raise UserError(f"a wave of {len(wave)} samples is shorter than a window of {window}")
    wave = np.asarray(wave, np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(wave - wave.mean(), window)[::hop]
    frames = frames - frames.mean(axis=1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(frames * np.hanning(window), _points(rate))) ** 2
    energies = power @ mel_filters(bins, rate)
    return np.log(np.maximum(energies, np.finfo(np.float32).eps)).astype(np.float32)


def _points(rate: int) -> int:
    """Of a window's Fourier transform."""
    return 1 << (round(rate * WINDOW / RATE) - 1).bit_length()


@functools.cache
def mel_filters(bins: int, rate: int = RATE) -> np.ndarray:
    """f64[129, bins] at 8 kHz: triangles of height 1, equally wide in mel = 1127 ln(1 + f / 700)."""
    points = _points(rate)
    low, high = 1127 * np.log1p(np.array([20.0, rate / 2]) / 700)
    edges = np.linspace(low, high, bins + 2)
    mel = 1127 * np.log1p(np.arange(points // 2 + 1) * rate / points / 700)[:, None]
    up = (mel - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - mel) / (edges[2:] - edges[1:-1])
    filters = np.maximum(np.minimum(up, down), 0.0)
    if bins < 1 or not filters.any(axis=0).all():
        raise UserError(
            f"{bins} mel bins: some lie between two of the {points // 2 + 1} frequencies of {rate} Hz; fewer do not"
        )
    return filters


def unit_frames(wave: np.ndarray) -> np.ndarray:
    """f32[N] -> f32[frames // 3, 64]: means of three log-mel frames each, without the mean of the recording."""
    mel = log_mel(wave)
    mel = mel[: len(mel) // STACK * STACK].reshape(-1, STACK, mel.shape[1]).mean(axis=1)
    return mel - mel.mean()


def units(wave: np.ndarray, codebook: Codebook | None = None) -> np.ndarray:
    """f32[N] -> int32[frames // 3], the nearest centre of every 30 ms; by default of the codebook that ships."""
    codebook = _shipped() if codebook is None else codebook
    return codebook.encode(unit_frames(wave)[None, :, None])[0, :, 0]


@functools.cache
def _shipped() -> Codebook:
    return Codebook.load(UNITS)


@dataclasses.dataclass(frozen=True)
class Spectrograms(RecordDataset):
    """Image batches of a source of single digits: `images` f32[frames, bins, 1], `labels` int32[] and `weights`.

    Each recording's log-mel energies are brought to mean 0 and standard deviation 0.5 (AST does that with numbers of
    its whole data set), then cut after `frames` frames of 10 ms, or filled up with zeros.

    Args:
        label: what is to be told.
    """

    source: SpokenSource
    frames: int = 48
    bins: int = 64
    label: Literal["digit", "speaker"] = "digit"

    @property
    def num_classes(self) -> int:
        return len(WORDS) if self.label == "digit" else self.source.num_speakers

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "images": jax.ShapeDtypeStruct((self.frames, self.bins, 1), np.float32),
            "labels": jax.ShapeDtypeStruct((), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def __len__(self) -> int:
        return len(self.source)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        images = np.zeros((len(numbers), self.frames, self.bins, 1), np.float32)
        labels = np.zeros(len(numbers), np.int32)
        for row, number in enumerate(numbers):
            recording = self.source[int(number) % len(self)]
            if len(recording.digits) != 1:
                raise UserError(
                    f"Spectrograms: an utterance of {len(recording.digits)} digits; one is expected"
                )
            mel = log_mel(recording.wave, self.bins)
            mel = (mel - mel.mean()) / (2 * mel.std() + 1e-6)
            images[row, : len(mel), :, 0] = mel[: self.frames]
            labels[row] = recording.digits[0] if self.label == "digit" else recording.speaker
        return {"images": images, "labels": labels, "weights": np.ones(len(numbers), np.float32)}


def _say(digit: int, speaker: int, speakers: int, random: np.random.RandomState) -> np.ndarray:
    """One word, f64[n], its voice with a standard deviation of 1."""
    first, second, (hiss, hiss_end, seconds) = np.split(_SOUNDS[digit], (3, 6))
    voice = np.random.RandomState([speaker, 1])
    throat, tilt = voice.uniform(0.88, 1.14), voice.uniform(0.4, 1.2)
    pitch = 90 * (230 / 90) ** ((speaker + 0.5) / speakers) * random.uniform(0.95, 1.05)
    count = int(seconds * RATE * random.uniform(0.85, 1.15))
    knots, time = np.linspace(0, 1, count // 40 + 1), np.linspace(0, 1, count)
    harmonics = np.arange(1, int(3600 / pitch) + 1)[:, None]
    frequency = pitch * harmonics
    level = 0.02 * np.ones((1, len(knots)))
    for formant, width, height in ((first, 90.0, 1.0), (second, 140.0, 0.7)):
        centre = throat * random.uniform(0.94, 1.06) * np.interp(knots, (0, 0.5, 1), formant)
        level = level + height * np.exp(-0.5 * ((frequency - centre) / width) ** 2)
    level *= harmonics**-tilt
    # The pitch falls by a tenth along the word.
    turns = np.cumsum(pitch * (1.05 - 0.1 * time)) / RATE + random.uniform()
    waves = np.cumprod(np.broadcast_to(np.exp(2j * np.pi * turns), (len(harmonics), count)), axis=0).imag
    place = time * (len(knots) - 1)
    before = np.minimum(place.astype(int), len(knots) - 2)
    share = place - before
    voiced = np.sum((level[:, before] * (1 - share) + level[:, before + 1] * share) * waves, axis=0)
    voiced *= np.minimum(1.0, 12 * np.minimum(time, 1 - time)) / voiced.std()
    noise = np.diff(random.standard_normal(count + 1)) / np.sqrt(2)
    return voiced + noise * np.interp(time, (0, 0.05, 0.25, 0.75, 0.95, 1), (0, hiss, 0, 0, hiss_end, 0))
