"""LLaVA-UHD: a picture of any shape in few slices of its own aspect, each compressed to q tokens (arXiv 2403.11703).

Plan, for a tower of side s pixels and at most M slices: n = min(ceil(W H / s^2), M). Of the grids of m columns and k
rows with m k in {n - 1, n, n + 1} (without 1, and at most M) the one with the least |log(W / H) - log(m / k)|; the
first of several, in increasing order of m k and m. With W and H rounded down to multiples of m and k, a cell of aspect
r gives slices of h = floor(s / sqrt(r)) by w = floor(h r) pixels, both rounded down to whole patches, so that no slice
has more patches than the tower's own square; the picture is scaled to (m w, k h) and cut. With n = 1 there are no
slices. The overview is the whole picture, of about s^2 pixels, in its own aspect.

Tower: positions are interpolated to the slice's grid. Connector: a grid of g x g learned queries, plus sines and
cosines of their place; query (i, j) attends to a window of points over its own cell of the slice's features, bilinear,
3 x 3 or nearer to the slice's aspect; keys are LN(W x) plus the same sines and cosines interpolated to the slice's
grid, values LN(W x); then a norm and a matrix.

Spelling: the slices row by row, behind each "," or, at the end of a row, a line break; then the overview.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.multimodal.connectors import read, split_heads
from research.multimodal.media import Crop, Media, Planner
from research.multimodal.tower import Seen, resized_positions
from research.nn.linear import Linear, parameter
from research.nn.norm import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slices(Planner):
    """Args: side, the tower's s; most, M; queries, g along each side; separators, whether "," and line breaks stand
    between slices."""

    side: int
    most: int = 7
    queries: int = 12
    separators: bool = True

    def __post_init__(self):
        if self.side % self.patch or self.most < 2:
            raise UserError(
                f"Slices: side={self.side}, patch={self.patch}, most={self.most}: whole patches and at least 2 slices"
            )

    @property
    def views(self) -> int:
        return self.most + 1

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def rows(self) -> int:
        return self.views * self.queries**2

    def fit(self, aspect: float) -> tuple[int, int]:
        """(width, height) of about s^2 pixels, whole patches, never more patches than a square of side s."""
        height = math.floor(self.side / math.sqrt(aspect))
        width = math.floor(height * aspect)
        most = self.patches  # of one strip: thinner pictures are squashed to it
        h, w = (min(max(length // self.patch, 1), most) for length in (height, width))
        return w * self.patch, h * self.patch

    def slices(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the grid, (1, 1) where nothing is sliced."""
        ideal = min(math.ceil(width * height / self.side**2), self.most)
        if ideal <= 1:
            return 1, 1
        counts = [n for n in (ideal - 1, ideal, ideal + 1) if 1 < n <= self.most]
        grids = [(m, n // m) for n in counts for m in range(1, n + 1) if n % m == 0]
        return min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))

    def plan(self, width: int, height: int) -> tuple[Crop, ...]:
        columns, rows = self.slices(width, height)
        overview = Crop.whole(*self.fit(width / height))
        if columns * rows == 1:
            return (overview,)
        cell = max(width // columns, 1), max(height // rows, 1)
        w, h = self.fit(cell[0] / cell[1])
        size = columns * w, rows * h
        parts = [
            Crop(size, (c * w, r * h, (c + 1) * w, (r + 1) * h)) for r in range(rows) for c in range(columns)
        ]
        return (*parts, overview)

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        each, said = self.queries**2, []
        for view, crop in enumerate(crops[:-1]):
            said += range(view * each, (view + 1) * each)
            if self.separators:
                said.append("\n" if crop.box[2] == crop.size[0] else ",")
        last = len(crops) - 1
        return said + list(range(last * each, (last + 1) * each))


@functools.cache
def sincos(side: int, width: int) -> np.ndarray:
    """float32[side, side, width]: a quarter each of sines and cosines of the row, and of the column."""
    if width % 4:
        raise UserError(f"sines and cosines of two axes need a width that is a multiple of 4, not {width}")
    rates = 1.0 / 10000 ** (np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * rates
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    table = np.empty((side, side, width))
    table[..., : width // 2], table[..., width // 2 :] = line[:, None], line
    return table.astype(np.float32)


def window_shape(grid: jax.Array) -> jax.Array:
    """grid int32[N, 2] -> int32[N, 2], rows and columns of points of a window: of 3 x 3, 2 x 4, 2 x 3, 3 x 4 and their
    transposes the one nearest to the grid's aspect."""
    shapes = jnp.asarray([(3, 3), (3, 4), (4, 3), (2, 3), (3, 2), (2, 4), (4, 2)])
    aspects = jnp.log(shapes[:, 1] / shapes[:, 0])
    aspect = jnp.log(jnp.maximum(grid[:, 1], 1) / jnp.maximum(grid[:, 0], 1))
    return shapes[jnp.argmin(jnp.abs(aspects - aspect[:, None]), axis=1)]


_DENSE = 128
"""Up to so many patches points are a product with a matrix [points, patches], whose gradient is another; beyond, they
are gathered, and their gradient scattered. Forward and backward, the product takes a CPU 0.4 to 0.7 of the time at 16
patches, and 2.6 times as long at 576."""


def sample_windows(x: jax.Array, grid: jax.Array, queries: int) -> tuple[jax.Array, jax.Array]:
    """x [N, P, d], row-major on grids int32[N, 2] -> points [N, queries^2, 12, d], and which are there.

    Cell (i, j) of a grid of queries x queries holds a window of points, bilinear between the centres of patches.
    """
    shape = window_shape(grid)
    point = jnp.arange(12)
    row, column = point // shape[:, 1:], point % shape[:, 1:]  # [N, 12]
    there = row < shape[:, :1]
    cell = jnp.arange(queries)

    def places(part: jax.Array, parts: jax.Array, count: jax.Array) -> jax.Array:
        """Coordinates [N, queries, 12] along an axis of `count` patches, inside the borders."""
        share = (part + 0.5)[:, None] / parts[:, None, None]
        place = (cell[:, None] + share) * (count[:, None, None] / queries) - 0.5
        return jnp.clip(place, 0.0, jnp.maximum(count - 1, 0)[:, None, None])

    y, x_ = places(row, shape[:, 0], grid[:, 0]), places(column, shape[:, 1], grid[:, 1])
    sample = _multiplied if x.shape[1] <= _DENSE else _gathered
    points = sample(x, y, x_, grid).reshape(x.shape[0], queries**2, 12, x.shape[-1])
    return points, jnp.broadcast_to(there[:, None], points.shape[:3])


def _multiplied(x: jax.Array, y: jax.Array, x_: jax.Array, grid: jax.Array) -> jax.Array:
    """y, x_ [N, g, 12], of rows and of columns of cells -> [N, g, g, 12, d]."""
    patch, width = jnp.arange(x.shape[1]), jnp.maximum(grid[:, 1:], 1)

    def share(place: jax.Array, patches: jax.Array) -> jax.Array:
        """What a place takes of the patches [N, P] along its axis, [N, g, 12, P]."""
        return jnp.maximum(1.0 - jnp.abs(place[..., None] - patches[:, None, None]), 0.0)

    weight = share(y, patch // width)[:, :, None] * share(x_, patch % width)[:, None]
    return jnp.einsum("nijkp,npd->nijkd", weight.astype(x.dtype), x)


def _gathered(x: jax.Array, y: jax.Array, x_: jax.Array, grid: jax.Array) -> jax.Array:
    """As `_multiplied`."""
    y, x_ = jnp.broadcast_arrays(y[:, :, None], x_[:, None])
    top, left = jnp.floor(y).astype(int), jnp.floor(x_).astype(int)
    down, along = y - top, x_ - left
    width = jnp.maximum(grid[:, 1], 1)[:, None, None, None]
    total = jnp.zeros((), x.dtype)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = (down if dy else 1 - down) * (along if dx else 1 - along)
        r = jnp.minimum(top + dy, jnp.maximum(grid[:, 0], 1)[:, None, None, None] - 1)
        c = jnp.minimum(left + dx, width - 1)
        index = (r * width + c).reshape(x.shape[0], -1, 1)
        taken = jnp.take_along_axis(x, index, axis=1).reshape(*weight.shape, -1)
        total += weight[..., None].astype(x.dtype) * taken
    return total


class WindowResampler(nn.Module):
    """[B, I, V, P, dv] -> [B, I, V * queries^2, width], every view to queries^2 rows."""

    queries: int
    width: int
    num_heads: int

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        batch, images, views, patches, dim = seen.tokens.shape
        count, g = batch * images * views, self.queries
        grid = media.grid.reshape(count, 2)
        x = Linear(self.width, name="key_value")(seen.tokens.reshape(count, patches, dim))
        x = LayerNorm(name="key_value_norm")(x)
        place = jnp.asarray(sincos(g, self.width)).reshape(g * g, -1)
        values, there = sample_windows(x, grid, g)
        # Sampling is linear: the positions, of which nothing is learned, are sampled apart.
        keys = values + sample_windows(resized_positions(place, grid, patches).astype(x.dtype), grid, g)[0]
        learned = parameter(self, "queries", nn.initializers.normal(0.02), (g * g, self.width))
        query = LayerNorm(name="query_norm")(learned) + place
        query = jnp.broadcast_to(query.astype(x.dtype), (count, g * g, self.width))
        shape = (count * g * g, -1, self.width)
        q, k, v = (
            split_heads(
                Linear(self.width, True, name=name)(y.reshape(-1, self.width)).reshape(shape), self.num_heads
            )
            for name, y in (("query", query), ("key", keys), ("value", values))
        )
        out = read(q, k, v, there.reshape(count * g * g, 1, 12)).reshape(-1, self.width)
        out = LayerNorm(name="output_norm")(Linear(self.width, True, name="output")(out))
        return Linear(self.width, name="projection")(out).reshape(batch, images, views * g * g, self.width)
