"""GlobalCom2: tokens of a high-resolution image dropped under the guidance of its thumbnail (arXiv 2501.05179).

    layout = Layout(grid=(2, 2), side=24, size=(1024, 768))
    kept = compress(thumbnail, crops, thumbnail_scores, crop_scores, newline, layout, GlobalCom2(ratio=0.25))
    kept.tokens, kept.valid        # [T, d] and bool [T], T static; vmap for a batch of one layout

An image comes as a thumbnail of n = side^2 tokens and a grid of m crops of n tokens each. What the [CLS] token of the
vision encoder thinks of a token is its score, s^G in the thumbnail and s^L in crops. Nothing is trained:

    thumbnail   the int(n R) tokens with the greatest s^G
    crop j      r_j = min(1, R (1 + sigma_j - mean sigma)), sigma = softmax(S / 10), S_j the sum of s^G in its region
                its int(n_j r_j) tokens with the greatest s^L / |s^L| + s^G / |s^G|, s^G resized to the crops' grid,
                over the n_j tokens that are image and not padding

The crops' tokens follow in raster order of the whole image, with a newline token behind every row of the grid, rows of
padding too. Numbers of the grid and the padding are known for an image on the host, so they are static; r_j is not, so
the output has room for the greatest sum of int(n_j r_j) and tells what is in use.

Scores: the authors' code takes q k^T / sqrt(d) *before* the softmax, averaged over heads, from the encoder's last
layer (features are those that enter it), and the temperature of 10 suits those. After the softmax they sum to 1 at
most, S / 10 is nearly constant and every r_j nearly R: `encode(..., softmaxed=True)` is there to compare.

At R = 1 crops below the mean still lose tokens; everything stays only where the regions' scores are equal.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.errors import UserError
from research.nn.attention_kernels import AttentionKernel
from research.nn.transformer import LayerStack, unscan_layers
from research.sparse.tokens import compact, keep_best


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an image lies in its crops: static, known on the host.

    Args:
        grid: rows and columns of crops.
        side: tokens of a crop along each side, and of the thumbnail.
        size: width and height of the original image, whose aspect ratio says where the padding is; None: no padding.
    """

    grid: tuple[int, int]
    side: int
    size: tuple[int, int] | None = None

    def __post_init__(self):
        if min(self.grid) < 1 or self.side < max(self.grid):
            raise UserError(
                f"Layout: grid={self.grid}, side={self.side}: a thumbnail has at least one row and column for each crop"
            )
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"Layout: size={self.size}: width and height are expected, at least 1 pixel each")
        if self.valid.size == 0 or not self.valid.any():
            raise UserError(
                f"Layout: an image of {self.size} pixels leaves no token in a grid of {self.grid}"
            )

    @property
    def crops(self) -> int:
        return self.grid[0] * self.grid[1]

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """bool [rows, columns] of the whole grid: where there is image. The padding is on both sides alike."""
        rows, columns = self.grid[0] * self.side, self.grid[1] * self.side
        mask = np.zeros((rows, columns), bool)
        width, height = self.size or (columns, rows)
        # Whole numbers: the share of a side times the other, rounded down.
        if width * rows > columns * height:
            padding = (rows - height * columns // width) // 2
            mask[padding : rows - padding] = True
        else:
            padding = (columns - width * rows // height) // 2
            mask[:, padding : columns - padding] = True
        return mask

    def to_crops(self, x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """[rows, columns] -> [crops, side^2]."""
        (gh, gw), s = self.grid, self.side
        return x.reshape(gh, s, gw, s).transpose(0, 2, 1, 3).reshape(gh * gw, s * s)

    def to_image(self, x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """[crops, side^2] -> [rows, columns]."""
        (gh, gw), s = self.grid, self.side
        return x.reshape(gh, gw, s, s).transpose(0, 2, 1, 3).reshape(gh * s, gw * s)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int [crops]: n_j, tokens of every crop that are image."""
        return self.to_crops(self.valid).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class GlobalCom2:
    """What is kept.

    Args:
        ratio: R, the share of tokens; the paper has .75, .5, .25 and .1.
        temperature: of the softmax over crops.
        order: "raster" puts every token where it is in the image. "authors" does as their code: the thumbnail by
            descending score, and a crop's tokens as if there were no padding before them, so that those of padded
            images come in a shifted order.
    """

    ratio: float = 0.25
    temperature: float = 10.0
    order: Literal["raster", "authors"] = "raster"

    def __post_init__(self):
        if not 0.0 < self.ratio <= 1.0 or self.temperature <= 0.0:
            raise UserError(
                f"GlobalCom2: ratio={self.ratio}, temperature={self.temperature}: a ratio in (0, 1] and a temperature "
                "above 0 are expected"
            )
        if self.order not in ("raster", "authors"):
            raise UserError(f"GlobalCom2: order={self.order!r} is neither 'raster' nor 'authors'")

    def budget(self, layout: Layout) -> int:
        """The most tokens that crops keep together: reached where all of sigma is on the largest crop."""
        counts = layout.counts
        most = self.ratio * (counts.sum() + counts.max() - counts.mean())
        return min(
            int(counts.sum()), int(most + 1e-2)
        )  # float32 sums of thousands round up by less than that

    def tokens(self, layout: Layout) -> int:
        """T, the static length of what `compress` returns."""
        return int(layout.side**2 * self.ratio) + self.budget(layout) + layout.grid[0] * layout.side


class Kept(struct.PyTreeNode):
    """tokens [T, d]; valid bool [T], false where r_j left room; index int32 [T]: of the thumbnail's tokens from 0, of
    the crops' from n on (crop by crop), n (m + 1) for a newline. ratios float32 [m]: r_j."""

    tokens: jax.Array
    valid: jax.Array
    index: jax.Array
    ratios: jax.Array


def crop_ratios(scores: jax.Array, grid: tuple[int, int], ratio: float, temperature: float) -> jax.Array:
    """s^G [n] -> r_j float32 [m]. Rows and columns that the grid does not divide belong to the last crops."""
    side = _side(scores)

    def parts(count: int) -> np.ndarray:
        return np.minimum(np.arange(side) // max(side // count, 1), count - 1)

    region = (parts(grid[0])[:, None] * grid[1] + parts(grid[1])).reshape(-1)
    sums = jax.ops.segment_sum(scores.astype(jnp.float32), region, grid[0] * grid[1])
    sigma = jax.nn.softmax(sums / temperature)
    return jnp.minimum(ratio * (1.0 + (sigma - jnp.mean(sigma))), 1.0)


def global_scores(scores: jax.Array, layout: Layout) -> jax.Array:
    """s^G [n] -> its value at every token of every crop, float32 [m, n]: the map resized to the part of the grid that
    is image (bilinear, half-pixel centres); 0 on padding."""
    side = _side(scores)
    rows, columns = (np.flatnonzero(layout.valid.any(axis=axis)) for axis in (1, 0))
    image = scores.astype(jnp.float32).reshape(side, side)
    shape = (len(rows), len(columns))
    resized = jax.image.resize(image, shape, "linear", antialias=False)
    whole = jnp.zeros(layout.valid.shape, jnp.float32)
    return layout.to_crops(jax.lax.dynamic_update_slice(whole, resized, (int(rows[0]), int(columns[0]))))


def holistic_scores(local: jax.Array, overall: jax.Array, valid: jax.Array) -> jax.Array:
    """s^L and s^G [m, n], both divided by their length over the valid tokens of a crop, and added."""

    def normalised(x: jax.Array) -> jax.Array:
        x = jnp.where(valid, x.astype(jnp.float32), 0.0)
        length = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / jnp.maximum(length, 1e-12)

    return normalised(local) + normalised(overall)


def compress(
    thumbnail: jax.Array,
    crops: jax.Array,
    thumbnail_scores: jax.Array,
    crop_scores: jax.Array,
    newline: jax.Array,
    layout: Layout,
    rule: GlobalCom2,
) -> Kept:
    """thumbnail [n, d], crops [m, n, d], their scores [n] and [m, n], newline [d] -> what is left, in order.

    Raises UserError where the shapes are not those of the layout.
    """
    n, m = layout.side**2, layout.crops
    shapes = tuple(x.shape[:-1] for x in (thumbnail, crops)), (thumbnail_scores.shape, crop_scores.shape)
    if shapes != (((n,), (m, n)),) * 2:
        raise UserError(
            f"compress: features {shapes[0]} and scores {shapes[1]} of thumbnail and crops; the layout's are "
            f"{(n,)} and {(m, n)}"
        )
    valid = jnp.asarray(layout.to_crops(layout.valid))
    ratios = crop_ratios(thumbnail_scores, layout.grid, rule.ratio, rule.temperature)
    scores = holistic_scores(crop_scores, global_scores(thumbnail_scores, layout), valid)
    keep = keep_best(scores, valid, jnp.floor(layout.counts * ratios))
    return assemble(
        thumbnail, crops, thumbnail_scores, keep, newline, layout, rule, rule.budget(layout), ratios
    )


def assemble(
    thumbnail: jax.Array,
    crops: jax.Array,
    thumbnail_scores: jax.Array,
    keep: jax.Array,
    newline: jax.Array,
    layout: Layout,
    rule: GlobalCom2,
    budget: int,
    ratios: jax.Array,
) -> Kept:
    """The chosen tokens in their order: `keep` bool [m, n] of the crops, at most `budget`, and the thumbnail's best."""
    n, m = layout.side**2, layout.crops
    _, first = jax.lax.top_k(thumbnail_scores, int(n * rule.ratio))
    number = n + jnp.arange(m * n, dtype=jnp.int32).reshape(m, n)
    if rule.order == "authors":
        # Token i of a crop's image is put in place i of the whole crop.
        source = jnp.asarray(np.argsort(~layout.to_crops(layout.valid), axis=1, kind="stable"))
        keep, number = (jnp.take_along_axis(x, source, axis=1) for x in (keep, number))
    else:
        first = jnp.sort(first)
    rows = layout.grid[0] * layout.side
    # A column of newlines stands to the right of the grid, and all of them stay.
    keep = jnp.pad(layout.to_image(keep), ((0, 0), (0, 1)), constant_values=True)
    number = jnp.pad(layout.to_image(number), ((0, 0), (0, 1)), constant_values=n * (m + 1))
    place, there = compact(keep.reshape(-1), budget + rows)
    index = jnp.concatenate([first.astype(jnp.int32), number.reshape(-1)[place]])
    table = jnp.concatenate([thumbnail, crops.reshape(m * n, -1), newline[None].astype(thumbnail.dtype)])
    there = jnp.concatenate([jnp.ones(first.shape, bool), there])
    return Kept(table[index], there, index, ratios)


class _Scores:
    """An `AttentionKernel` that writes down how the first token looks at the others; made and asked in one trace."""

    def __init__(self, inner: AttentionKernel, softmaxed: bool):
        self._inner, self._softmaxed, self.scores = inner, softmaxed, None

    def __call__(self, query, key, value, rule, *, segments, prefix, scale, softcap):
        key_heads = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
        scores = jnp.einsum("bhd,bhtd->bht", query[:, :, 0], key_heads, preferred_element_type=jnp.float32)
        scores = scores * scale
        if self._softmaxed:
            scores = jax.nn.softmax(scores, axis=-1)
        self.scores = jnp.mean(scores, axis=1)[:, 1:]
        places = dict(segments=segments, prefix=prefix, scale=scale, softcap=softcap)
        return self._inner(query, key, value, rule, **places)


def encode(
    model: LayerStack, params: Any, images: jax.Array, softmaxed: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """images [B, h, w, c] -> features that enter the last layer [B, n, d], scores float32 [B, n] of the class token
    there, and the logits of the class head.

    softmaxed: scores are shares of attention and not, as in the authors' code, what goes into the softmax.
    Raises UserError for an encoder without a class token or whose last mixer takes no kernel.
    """
    if model.pool != "class":
        raise UserError(f"GlobalCom2 asks the class token, and this ViT has pool={model.pool!r}")
    model, params = unscan_layers(model, params)
    blocks = [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]
    mixer = getattr(blocks[-1], "attention", None)
    if not hasattr(mixer, "kernel"):
        raise UserError(f"GlobalCom2: the last layer's mixer is {type(mixer).__name__}, not attention")
    tap = _Scores(mixer.kernel, softmaxed)
    blocks[-1] = blocks[-1].clone(attention=mixer.clone(kernel=tap))
    inputs = []

    def watch(next_call, args, kwargs, context):
        if context.module.name == f"layer_{model.num_layers - 1}" and context.method_name == "__call__":
            inputs.append(args[0])
        return next_call(*args, **kwargs)

    with nn.intercept_methods(watch):
        logits = model.clone(blocks=tuple(blocks)).apply({"params": params}, images)
    stream = getattr(inputs[0], "x", inputs[0])
    features = stream.reshape(images.shape[0], -1, stream.shape[-1])
    return features[:, 1:], tap.scores, logits


def _side(scores: jax.Array) -> int:
    side = round(scores.shape[0] ** 0.5)
    if scores.ndim != 1 or side * side != scores.shape[0]:
        raise UserError(f"scores of shape {scores.shape} are not those of a square thumbnail")
    return side
