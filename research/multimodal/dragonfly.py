"""Dragonfly: a picture at three zooms, of whose finest crops those like the crop around them stay (arXiv 2406.00977).

For a tower of side e pixels: the whole picture at e x e; four medium crops of one of the canvases 2e x 2e, e x 4e,
4e x e; 24 high crops of 6e x 4e, 4e x 6e, 3e x 8e, 8e x 3e, 2e x 12e, 12e x 2e. A canvas is chosen for the largest
min(pixels of the picture scaled into it, pixels of the picture), then for the least waste; the picture is stretched to
it.

All crops go through one tower, class token kept, and one linear map. With s_j and a_r the means of the tokens of high
crop j and medium crop r, each medium crop keeps the k high crops with the greatest <s_j, a_r> among those whose centre
lies in it: six where the canvases nest, at least four else. The chosen ones stand in ascending order behind the low and
the medium ones, a line break behind each crop. No gradient passes the choice. The released code takes blocks of six
consecutive crops for a medium crop's own, which for a 2 x 2 canvas are not those that lie in it; here it is the figure
of the paper.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.multimodal.connectors import Projection
from research.multimodal.media import Crop, Media, Planner
from research.multimodal.tower import Seen

Canvas = tuple[int, int]  # columns and rows of crops
MEDIUM: tuple[Canvas, ...] = ((2, 2), (1, 4), (4, 1))
HIGH: tuple[Canvas, ...] = ((6, 4), (4, 6), (3, 8), (8, 3), (2, 12), (12, 2))
REGIONS, FINE = 4, 24


def choose_canvas(width: int, height: int, side: int, canvases: Sequence[Canvas]) -> Canvas:
    """The canvas that keeps most of a picture's pixels, and wastes least of its own."""

    def score(canvas: Canvas) -> tuple[float, float]:
        w, h = canvas[0] * side, canvas[1] * side
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(w * h - kept)

    return max(canvases, key=score)


def region_of(high: Canvas, medium: Canvas) -> list[int]:
    """The medium crop in which the centre of each high crop lies, both row-major."""
    columns, rows = high
    return [
        int((r + 0.5) / rows * medium[1]) * medium[0] + int((c + 0.5) / columns * medium[0])
        for r in range(rows)
        for c in range(columns)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zooms(Planner):
    """Args: side, e; keep, k of a medium crop's six; class_token, whether crops have one."""

    side: int
    keep: int = 3
    class_token: bool = True

    def __post_init__(self):
        if self.side % self.patch or not 1 <= self.keep <= FINE // REGIONS:
            raise UserError(
                f"Zooms: side={self.side}, patch={self.patch}, keep={self.keep}: whole patches, and 1 to 6"
            )

    @property
    def views(self) -> int:
        return 1 + REGIONS + FINE

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Of a crop."""
        return self.patches + self.class_token

    @property
    def rows(self) -> int:
        return (1 + REGIONS * (1 + self.keep)) * self.tokens

    def plan(self, width: int, height: int) -> tuple[Crop, ...]:
        medium = choose_canvas(width, height, self.side, MEDIUM)
        high = choose_canvas(width, height, self.side, HIGH)
        regions = region_of(high, medium)
        if (least := min(regions.count(r) for r in range(REGIONS))) < self.keep:
            raise UserError(
                f"Zooms: keep={self.keep}, but of a picture of {width}x{height} a medium crop has {least} high ones"
            )
        return (
            Crop.whole(self.side, self.side),
            *self._tiles(medium, [0] * REGIONS),
            *self._tiles(high, regions),
        )

    def _tiles(self, canvas: Canvas, marks: Sequence[int]) -> list[Crop]:
        columns, rows = canvas
        e, size = self.side, (columns * self.side, rows * self.side)
        boxes = [(c * e, r * e, (c + 1) * e, (r + 1) * e) for r in range(rows) for c in range(columns)]
        return [Crop(size, box, mark=mark) for box, mark in zip(boxes, marks, strict=True)]

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        said: list[int | str] = []
        for crop in range(self.rows // self.tokens):
            said += [*range(crop * self.tokens, (crop + 1) * self.tokens), "\n"]
        return said


def select(fine: jax.Array, medium: jax.Array, regions: jax.Array, keep: int) -> jax.Array:
    """The high crops that stay, int32[N, 4 * keep], ascending: `keep` of every region's, of equal ones the first.

    fine [N, 24, T, d], medium [N, 4, T, d]: tokens after the map; regions int32[N, 24].
    """
    s, a = (jnp.mean(x.astype(jnp.float32), axis=2) for x in (fine, medium))
    scores = jnp.einsum("njd,nrd->nrj", s, a)
    own = regions[:, None] == jnp.arange(REGIONS)[:, None]
    _, index = jax.lax.top_k(jnp.where(own, scores, -jnp.inf), keep)
    return jnp.sort(index.reshape(index.shape[0], -1), axis=1)


class ZoomSelection(nn.Module):
    """Seen of 29 views -> the tokens of 1 + 4 + 4 k crops, [B, I, (5 + 4 k) T, width]. `Zooms` says what is where."""

    width: int
    keep: int
    class_token: bool = True
    feature: int = -1

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        tap = seen.taps[self.feature][..., 0 if self.class_token else 1 :, :]  # [B, I, V, T, dv]
        x = Projection(self.width, layers=1, name="projection")(tap)
        batch, images, views, tokens, width = x.shape
        x = x.reshape(batch * images, views, tokens, width)
        coarse, fine = x[:, : 1 + REGIONS], x[:, 1 + REGIONS :]
        regions = media.marks.reshape(batch * images, views)[:, 1 + REGIONS :]
        chosen = select(jax.lax.stop_gradient(fine), jax.lax.stop_gradient(coarse[:, 1:]), regions, self.keep)
        kept = jnp.take_along_axis(fine, chosen[..., None, None], axis=1)
        return jnp.concatenate([coarse, kept], axis=1).reshape(batch, images, -1, width)
