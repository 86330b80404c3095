"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the scalings of released checkpoints."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595; Gemma 3 global layers)."""

    factor: float

    def __call__(self, frequencies: np.ndarray, base: float, dim: int) -> tuple[np.ndarray, float]:
        return frequencies / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp in between."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __call__(self, frequencies: np.ndarray, base: float, dim: int) -> tuple[np.ndarray, float]:
        turns = self.original_length * frequencies / (2 * math.pi)  # rotations over the original context
        span = self.high_frequency_factor - self.low_frequency_factor
        keep = np.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071), used by Qwen checkpoints beyond their trained length.

    Dimensions that turn more than `beta_fast` times over the original length are kept, those below
    `beta_slow` are divided by `factor`, a linear ramp over dimensions in between; cosines and sines are
    multiplied by `attention_factor` (default 0.1 ln(factor) + 1).
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __call__(self, frequencies: np.ndarray, base: float, dim: int) -> tuple[np.ndarray, float]:
        def dimension(turns: float) -> float:
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float64) - low) / max(high - low, 1e-3)
        keep = 1.0 - np.clip(ramp, 0.0, 1.0)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0
        return frequencies * (keep + (1.0 - keep) / self.factor), scale


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates the two halves of each head by position times frequency (the half-split convention).

    Args:
        base: wavelength base theta.
        scaling: a frequency scaling, or None.
    """

    base: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __call__(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """positions int32[B, T] -> cosines and sines, float32[B, T, head_dim / 2]."""
        if head_dim % 2:
            raise UserError(f"rotary positions need an even head_dim, not {head_dim}")
        frequencies = self.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        scale = 1.0
        if self.scaling is not None:
            frequencies, scale = self.scaling(frequencies, self.base, head_dim)
        angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotate x [B, T, heads, head_dim] by cosines and sines [B, T, head_dim / 2]; float32 inside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosines, sines = cosines[:, :, None, :], sines[:, :, None, :]
    rotated = jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return rotated.astype(x.dtype)
