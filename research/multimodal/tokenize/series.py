"""Time series, and whatever else sensors measure, step by step (arXiv 2307.10802)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.multimodal.tokenize.contract import Tokens
from research.nn.linear import Linear


def sinusoids(length: int, width: int) -> jax.Array:
    """f32[length, width]: sin(t / 10000^(2i / width)) at 2i, the cosine at 2i + 1 (arXiv 1706.03762, section 3.5)."""
    rates = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length)[:, None] * rates
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, -1)[:, :width]


class SeriesTokens(nn.Module):
    """A token a step: a circular convolution of the values, a sinusoid, and what the calendar says.

        x_t = W [v_{t-1}, v_t, v_{t+1}] + sinusoid_t + C a_t          v f32[L, channels], indices modulo L

    Args:
        width: D.
        length, channels: of a record `values`.
        calendar: numbers a_t of the calendar at each step, `calendar` f32[L, calendar] in a record (hour, weekday, day
            of the month, day of the year: 4); 0 where time is not known, as for inertial sensors.

    Parameters: convolution/kernel [3 channels, D], rows of taps and in them of channels; dates/kernel. At D = 768 with
    a calendar of 4 they are the 19 K (7 channels), 22 K (8), 51 K (21) and 2 M (862) that the paper says are trained.
    """

    width: int
    length: int
    channels: int
    calendar: int = 0

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = {"values": jax.ShapeDtypeStruct((self.length, self.channels), jnp.float32)}
        if self.calendar:
            spec["calendar"] = jax.ShapeDtypeStruct((self.length, self.calendar), jnp.float32)
        return spec

    @property
    def count(self) -> int:
        return self.length

    def setup(self) -> None:
        self.convolution = Linear(self.width)
        if self.calendar:
            self.dates = Linear(self.width)

    def values(self, values: jax.Array) -> jax.Array:
        """[B, L, channels] -> [B, L, D]: a series rolled along time gives tokens rolled likewise."""
        taps = [jnp.roll(values, shift, axis=1) for shift in (1, 0, -1)]
        return self.convolution(jnp.concatenate(taps, axis=-1))

    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens:
        x = self.values(record["values"])
        x = x + sinusoids(self.length, self.width).astype(x.dtype)
        return Tokens(x + self.dates(record["calendar"]) if self.calendar else x)
