"""Sound files: WAV."""

import io
import os
import struct
import warnings

import numpy as np

from research.errors import UserError
from research.paths import expand


def read_wav(source: str | os.PathLike | bytes) -> tuple[int, np.ndarray]:
    """A WAV file, or its bytes -> samples a second, and the samples [N], or [N, channels], in the file's type.

    Raises:
        UserError: no such file, an empty one, none of WAV, or a damaged one.
    """
    from scipy.io import wavfile

    where = name_of(source)
    try:
        data = source if isinstance(source, bytes) else expand(source).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; a WAV file is expected") from error
    if not data:
        raise UserError(f"{where}: an empty file")
    try:
        with warnings.catch_warnings():
            # Of a file that was cut off scipy gives what there is.
            warnings.filterwarnings("error", "Reached EOF prematurely", wavfile.WavFileWarning)
            # Chunks of notes and the like.
            warnings.filterwarnings("ignore", "Chunk .* not understood", wavfile.WavFileWarning)
            return wavfile.read(io.BytesIO(data))
    except UnboundLocalError as error:  # what scipy does then
        raise UserError(f"{where}: not a readable WAV file: no samples are in it") from error
    except (OSError, ValueError, ArithmeticError, struct.error, wavfile.WavFileWarning) as error:
        raise UserError(f"{where}: not a readable WAV file: {error}") from error


def read_wave(source: str | os.PathLike | bytes, rate: int) -> np.ndarray:
    """A WAV file of so many samples a second, or its bytes -> f32[N], the mean of its channels: whole numbers in
    [-1, 1], floats as they are.

    Raises:
        UserError: as `read_wav`; another rate, or no samples.
    """
    where = name_of(source)
    found, samples = read_wav(source)
    if found != rate:
        raise UserError(f"{where}: {found} Hz; {rate} Hz is expected")
    if not samples.size:
        raise UserError(f"{where}: a sound without samples")
    if samples.dtype == np.uint8:
        wave = samples / 128.0 - 1.0
    elif samples.dtype.kind == "i":
        wave = samples / -float(np.iinfo(samples.dtype).min)
    else:
        wave = samples.astype(np.float64)
    return (wave if wave.ndim == 1 else wave.mean(axis=1)).astype(np.float32)


def name_of(source: str | os.PathLike | bytes) -> str:
    """How a message calls it."""
    return "a sound" if isinstance(source, bytes) else str(source)
