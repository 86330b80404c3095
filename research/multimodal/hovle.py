"""HoVLE: causal layers in front of an unchanged decoder embed patches and words alike (arXiv 2412.16158).

The picture is cut into at most `most` tiles of side x side pixels in the grid nearest to its aspect, and a thumbnail
where there are several. A tile's patches are embedded by one matrix with a bias, and get learned positions; words get
the decoder's own embedding. Both run in one causal sequence through the holistic module, E layers like the decoder's:

    [x_I; x_T] -> E layers -> [y_I; y_T] -> the decoder, in the places of its embedded tokens

and pixel shuffle leaves a fourth of the patches, W_2 GELU(W_1 [2 x 2 neighbours]), before the module ("pre"), or behind
it ("post"). In "post" the module's sequence is longer than the decoder's; the decoder's is the same in both. A row then
depends on the patches up to the last of its four, so within a picture it is pairs of rows of patches that are causal.

Stages: 1. `HolisticTraining` on `Unpaired` data, -cos(y_I, z_I) - cos(y_T, z_T), means over tokens: z_I are a frozen
vision encoder's features, z_T the decoder's embedded words; picture and text in a sequence do not belong together. 2.
Cross-entropy through the frozen decoder. 3. All is trained. The encoder is no part of the model.

Every decoded token passes through the module: the cache has E layers, then the decoder's. In "post" those of the
module hold more rows than the decoder's; positions there are such that they end in those of the decoder, so that
behind a picture both have the same.

The number of layers, E = 8, and how features wider than the decoder are compared (through a linear map that is dropped
after stage 1, behind the encoder's own pixel shuffle) are not in the paper as we know it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.data.dialogues import Dialogue
from research.errors import UserError
from research.multimodal.connectors import shuffle_square
from research.multimodal.conversations import Conversations
from research.multimodal.media import Crop, Media, Planner
from research.multimodal.model import VLM, PictureCache, Pictures, splice
from research.multimodal.task import VisionLanguage, batch_pictures
from research.multimodal.tower import Seen, Tower, patch_mask, resized_positions
from research.nn.attention import Context
from research.nn.cache import Fresh, LayerCache
from research.nn.linear import Linear, parameter
from research.nn.masks import Steps, Window
from research.nn.transformer import LayerStack
from research.training.task import Batch, Metrics, cast_floats, dropout_rngs, saved_parameters

MARKS = 2  # rows of an image that are <img> and </img>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(Planner):
    """InternVL's dynamic tiling (arXiv 2404.16821): tiles row by row, then the thumbnail; between `<img>` and `</img>`.

    Args: side, of a tile; most, how many tiles; factor, of the pixel shuffle.
    """

    side: int
    most: int = 12
    factor: int = 2

    def __post_init__(self):
        if self.side % (self.factor * self.patch) or self.most < 1:
            raise UserError(
                f"Tiles: side={self.side}, patch={self.patch}, factor={self.factor}, most={self.most}: a side of whole "
                "squares of factor x factor patches, and at least one tile"
            )

    @property
    def views(self) -> int:
        return self.most + (self.most > 1)

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def rows_of_tile(self) -> int:
        return self.patches // self.factor**2

    @property
    def rows(self) -> int:
        return MARKS + self.views * self.rows_of_tile

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the grid nearest to the picture's aspect; of equals the last, by number of tiles, that
        the picture has half the pixels of."""
        grids = [
            (columns, rows)
            for columns in range(1, self.most + 1)
            for rows in range(1, self.most + 1)
            if columns * rows <= self.most
        ]
        best, least = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            gap = abs(width / height - columns / rows)
            large = width * height > 0.5 * self.side**2 * columns * rows
            if gap < least or (gap == least and large):
                best, least = (columns, rows), gap
        return best

    def plan(self, width: int, height: int) -> tuple[Crop, ...]:
        columns, rows = self.tiles(width, height)
        s = self.side
        size = columns * s, rows * s
        parts = [
            Crop(size, (c * s, r * s, (c + 1) * s, (r + 1) * s)) for r in range(rows) for c in range(columns)
        ]
        return (*parts, Crop.whole(s, s)) if len(parts) > 1 else tuple(parts)

    def spell(self, crops: Sequence[Crop]) -> list[int | str]:
        return [0, *range(MARKS, MARKS + len(crops) * self.rows_of_tile), 1]


class PatchEmbedding(nn.Module):
    """Media -> Seen: a matrix with a bias and learned positions of side x side patches, interpolated for other squares.

    Parameters: projection/{kernel,bias}, positions [side^2, width].
    """

    width: int
    side: int

    @nn.compact
    def __call__(self, media: Media) -> Seen:
        *leading, patches, pixels = media.patches.shape
        x = Linear(self.width, use_bias=True, name="projection")(media.patches.reshape(-1, patches, pixels))
        table = parameter(self, "positions", nn.initializers.normal(0.02), (self.side**2, self.width))
        if patches != self.side**2:
            table = resized_positions(table, media.grid.reshape(-1, 2), patches)
        x = (x + table.astype(x.dtype)).reshape(*leading, patches, self.width)
        return Seen(x, patch_mask(media.grid, patches), media.grid, x[None])


class HolisticEmbedding(LayerStack):
    """The module's layers, without a norm behind them: x [B, T, width] -> the same, and their fresh rows."""

    def setup(self) -> None:
        if self.scan_layers:
            raise UserError("HolisticEmbedding: its few layers are unrolled: set scan_layers=False")
        self.make_layers()

    def __call__(
        self, x: jax.Array, context: Context, cache: tuple[LayerCache, ...] | None = None
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        return self.run_layers(x, context, cache)


class LongRows(struct.PyTreeNode):
    """Fresh rows of a layer that read more rows than there are tokens: extra int32[B] more."""

    rows: Any
    extra: jax.Array


class LongCache(struct.PyTreeNode):
    """A `LayerCache` that holds extra int32[B] rows more than tokens; index and length are those of the tokens."""

    inner: LayerCache
    extra: jax.Array

    @property
    def margin(self) -> int:
        return getattr(self.inner, "margin", 1)

    def reversible(self, margin: int) -> "LongCache":
        if not hasattr(self.inner, "reversible"):
            return self
        return self.replace(inner=self.inner.reversible(margin))

    def read(self, length: jax.Array) -> tuple[jax.Array, ...]:
        first, second, *places = self.inner.read(length + self.extra)
        if not places:
            return first, second  # a state
        index, valid = places
        return first, second, index - self.extra[:, None], valid

    def append(self, fresh: Any, length: jax.Array, count: jax.Array) -> "LongCache":
        start = length + self.extra
        if not isinstance(fresh, LongRows):
            return self.replace(inner=self.inner.append(fresh, start, count))
        inner = self.inner.append(fresh.rows, start, count + fresh.extra)
        return LongCache(inner, self.extra + fresh.extra)

    def check_rollback(self, length: jax.Array) -> None:
        if hasattr(self.inner, "check_rollback"):
            self.inner.check_rollback(length + self.extra)

    def select(self, rows: jax.Array) -> "LongCache":
        return LongCache(self.inner.select(rows), self.extra[rows])


class HoVLE(VLM, kw_only=True):
    """A VLM whose planner is a `Tiles`, whose tower is a `PatchEmbedding`, and whose connector a `ShuffledProjection`.

    Args:
        holistic: the module.
        shuffle: whether the connector stands before the module or behind it.

    Its parameters add holistic/layer_i/...
    """

    holistic: HolisticEmbedding
    shuffle: Literal["pre", "post"] = "pre"

    @property
    def stacks(self) -> dict[str, LayerStack]:
        """Its stacks of causal layers, by their names, in the order in which a token passes them."""
        return {"holistic": self.holistic, "decoder": self.decoder}

    def features(
        self,
        tokens: jax.Array,
        pictures: Pictures | None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """As of `VLM`; the module's fresh rows come first."""
        y, seen, positions, own = self.embedded(tokens, pictures, segments, prefix)
        hidden, fresh = super().run(y, Context(positions, segments, prefix), seen)
        return hidden, (*own, *fresh)

    def embedded(
        self,
        tokens: jax.Array,
        pictures: Pictures | None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, jax.Array, tuple[Fresh, ...]]:
        """-> what the module gives to the decoder [B, T, D], what the tower sees, positions, the module's rows."""
        if self.shuffle == "pre" or pictures is None:
            x, seen, positions = self.enter(tokens, pictures)
            y, fresh = self.holistic(x, Context(positions, segments, prefix))
            return y, seen, positions, fresh
        if prefix is not None or self.planner.share != "none":
            raise UserError(
                "HoVLE: behind the module (`post`) tokens are causal and have positions of their own"
            )
        seen = self.tower(pictures.media)
        long = self.lengthened(pictures, segments)
        marks = jnp.broadcast_to(self.connector.marks, (len(tokens), MARKS, self.width))
        kind = pictures.slot % self.planner.rows
        text = splice(self.embed(tokens), marks, jnp.where((pictures.slot >= 0) & (kind < MARKS), kind, -1))
        patches = seen.tokens.reshape(len(tokens), -1, self.width)
        x = splice(jnp.take_along_axis(text, long.token[..., None], axis=1), patches, long.patch)
        y, fresh = self.holistic(x, Context(long.positions, long.segments))
        # Patches back to their places, and through the connector; all else is copied.
        place = jnp.where(long.patch >= 0, long.patch, patches.shape[1])
        row = jnp.arange(len(tokens))[:, None]
        patches = jnp.zeros_like(patches).at[row, place].set(y.astype(patches.dtype), mode="drop")
        rows = self.connector(seen.replace(tokens=patches.reshape(seen.tokens.shape)), pictures.media)
        self.check_rows(rows)
        text = jnp.take_along_axis(y, long.start[..., None], axis=1)
        slot = jnp.where(kind < MARKS, -1, pictures.slot)
        y = splice(text, rows.reshape(len(tokens), -1, self.width), slot)
        return y, seen, pictures.positions, tuple(LongRows(own, long.extra) for own in fresh)

    @nn.nowrap
    def lengthened(self, pictures: Pictures, segments: jax.Array | None) -> "Long":
        """The module's sequence in "post": factor^2 patches, row-major in their tile, for every row of a tile."""
        planner, slot = self.planner, pictures.slot
        each, area = planner.rows_of_tile, planner.factor**2
        places = pictures.media.grid.shape[1] * planner.views * each
        batch, count = slot.shape
        tiled = (slot >= 0) & (slot % planner.rows >= MARKS)
        size = jnp.where(tiled, area, 1)
        ends = jnp.cumsum(size, axis=1)
        index = jnp.arange(count + (area - 1) * min(count, places))
        token = jax.vmap(lambda row: jnp.searchsorted(row, index, side="right"))(ends)
        there = token < count
        token = jnp.minimum(token, count - 1)
        start = ends - size
        at = lambda x: jnp.take_along_axis(x, token, axis=1)  # noqa: E731
        row = at(slot) % planner.rows - MARKS
        tile = at(slot) // planner.rows * planner.views + row // each
        # A tile's rows stand side by side, so its first patch is area * (row within the tile) places before.
        patch = tile * planner.patches + area * (row % each) + index - at(start)
        extra = (area - 1) * jnp.sum(tiled, axis=1)
        own = jnp.ones_like(slot) if segments is None else segments
        return Long(
            token=token,
            patch=jnp.where(at(tiled) & there, patch, -1),
            start=start,
            positions=index - extra[:, None],
            segments=jnp.where(there, at(own), 0),
            extra=extra,
        )

    def run(
        self, x: jax.Array, context: Context, seen: Any, cache: tuple[LayerCache, ...] | None = None
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        """As of `VLM`, with the module in front."""
        count = self.holistic.num_layers
        own, rest = (None, None) if cache is None else (cache[:count], cache[count:])
        y, first = self.holistic(x, context, own)
        hidden, fresh = super().run(y, context, seen, rest)
        return hidden, (*first, *fresh)

    @nn.nowrap
    def check_steps(self, wanted: bool) -> None:
        """As of `VLM`; the module's layers must see ahead as the decoder's do."""
        super().check_steps(wanted)
        rules = [getattr(block.attention, "rule", None) for block in self.holistic.blocks]
        if wanted and not any(isinstance(rule, Steps) for rule in rules):
            raise UserError(f"HoVLE.steps={self.steps!r} needs the rule Steps in `holistic`, too")

    def init_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, margin: int = 64
    ) -> PictureCache:
        """As of `VLM`; the module's caches come first, and have room in "post" for prompts of patches alone."""
        cache = super().init_cache(batch, capacity, dtype, margin)
        post = self.shuffle == "post"
        rules = [getattr(block.attention, "rule", None) for block in self.holistic.blocks]
        if post and any(isinstance(rule, Window) and rule.sinks for rule in rules):
            raise UserError(
                "HoVLE: where patches are read one by one (`post`) the module's windows count no first tokens: no sinks"
            )
        own = self.holistic.init_layer_caches(
            batch, capacity * (self.planner.factor**2 if post else 1), margin, dtype
        )
        if post:
            own = tuple(LongCache(layer, jnp.zeros((batch,), jnp.int32)) for layer in own)
        return cache.replace(layers=(*own, *cache.layers))


class Long(struct.PyTreeNode):
    """The module's sequence in "post", L places for T tokens.

    token int32[B, L], the token of each place; patch int32[B, L], which of the row's I * V * P patches stands there, -1
    for none; start int32[B, T], the (first) place of each token; positions and segments int32[B, L]; extra int32[B].
    """

    token: jax.Array
    patch: jax.Array
    start: jax.Array
    positions: jax.Array
    segments: jax.Array
    extra: jax.Array


ASKED = ("targets", "weights", "target_bytes")


@dataclasses.dataclass(eq=False)
class Unpaired(Conversations):
    """Batches of `Conversations` without targets: the images of a dialogue, and then the texts of another one."""

    def dialogue(self, number: int) -> Dialogue:
        images = self.source[number].images
        other = self.source[(number + len(self.source) // 2) % len(self.source)]
        said = " ".join(text for turn in other.turns for text in turn).replace("<image>", "")
        return Dialogue(images, (("<image>" * len(images), said),))

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: x for name, x in super().element_spec().items() if name not in ASKED}

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x for name, x in super().take(numbers).items() if name not in ASKED}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HolisticTraining(VisionLanguage):
    """All three stages: batches of `Unpaired` are distilled, others answered as in `VisionLanguage`.

    Metrics of distillation: `loss`, -(`image_cosine` + `text_cosine`), each a mean over its tokens. Parameters are the
    model's, teacher/... and head/kernel, the linear map to the teacher's features; a run is saved as the model alone,
    and `start_from` reads no more: teacher and map are then drawn.

    Args:
        teacher: a frozen `Tower` of the planner's patches.
    """

    teacher: Tower

    def init(self, key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        planner, width = self.model.planner, self.model.width
        media = jax.tree.map(lambda x: jnp.asarray(x)[None], planner.nothing(1))
        teacher = self.teacher.init(keys[1], media)["params"]
        features = Linear(self.teacher.width * planner.factor**2)
        head = features.init(keys[2], jnp.zeros((1, width)))["params"]
        return super().init(keys[0]) | {"teacher": teacher, "head": head}

    @property
    def start(self) -> Callable[[jax.Array], Any]:
        if self.parts or self.start_from is None:
            return super().start

        def begin(key: jax.Array) -> Any:
            params = jax.jit(self.init)(key)
            return params | saved_parameters(self.start_from, self.unpack(params))

        return begin

    def unpack(self, params: Any) -> Any:
        return {name: part for name, part in params.items() if name not in ("teacher", "head")}

    def _metrics(
        self, params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Metrics, jax.Array, dict[str, jax.Array]]:
        if "targets" in batch:
            return super()._metrics(self.unpack(params), batch, key)
        self.model.check_steps("step_ends" in batch)
        params = cast_floats(params, self.compute_dtype)
        model, planner, pictures = self.model, self.model.planner, batch_pictures(batch, self.compute_dtype)
        variables = {"params": self.unpack(params)}
        read = batch["tokens"], pictures, batch["segments"], batch.get("step_ends")
        y, *_ = model.apply(variables, *read, rngs=dropout_rngs(key), method="embedded")
        words = model.apply(variables, batch["tokens"], method="embed")
        seen = self.teacher.apply({"params": params["teacher"]}, pictures.media)
        features = shuffle_square(seen.tokens, planner.factor)
        features = features.reshape(len(y), pictures.media.grid.shape[1], -1, features.shape[-1])
        # Rows as the planner spells them.
        features = jnp.pad(features, ((0, 0), (0, 0), (MARKS, 0), (0, 0)))
        features = features.reshape(len(y), -1, features.shape[-1])
        slot = pictures.slot
        wanted = jnp.take_along_axis(features, jnp.maximum(slot, 0)[..., None], axis=1)
        said = Linear(features.shape[-1]).apply({"params": params["head"]}, y)
        tiled = (slot >= 0) & (slot % planner.rows >= MARKS)
        image = mean_cosine(said, jax.lax.stop_gradient(wanted), tiled)
        text = mean_cosine(y, jax.lax.stop_gradient(words), (slot < 0) & (batch["segments"] > 0))
        one = jnp.ones(())
        loss = -sum(total / jnp.maximum(count, 1.0) for total, count in (image, text))
        return {"loss": (loss, one), "image_cosine": image, "text_cosine": text}, jnp.zeros(()), {}


def mean_cosine(x: jax.Array, z: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of the cosines of x and z [B, T, c] in the places bool[B, T], their number), float32."""
    x, z = (y.astype(jnp.float32) for y in (x, z))
    norms = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1) * jnp.sum(z * z, -1), 1e-12))
    cosine = jnp.sum(x * z, axis=-1) / norms
    return jnp.sum(jnp.where(where, cosine, 0.0)), jnp.sum(where, dtype=jnp.float32)
