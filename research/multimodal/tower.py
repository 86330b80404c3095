"""Towers that give the states of every layer: a ViT shaped as CLIP's or SigLIP's, for views of any grid, and one shaped
as AST, for sounds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.multimodal.media import Media
from research.nn.attention import Context
from research.nn.linear import Linear, parameter
from research.nn.norm import LayerNorm
from research.nn.transformer import LayerStack


class Seen(struct.PyTreeNode):
    """What a tower makes of media.

    tokens [B, I, V, P, dv]: features of the patches, from the tower's layer `feature`. mask bool[B, I, V, P]: where
    there is one. grid int32[B, I, V, 2]. taps [L + 1, B, I, V, 1 + P, dv]: what enters the first layer and what leaves
    every one, the class token (0 where the tower has none) and then the patches.
    """

    tokens: jax.Array
    mask: jax.Array
    grid: jax.Array
    taps: jax.Array


def patch_mask(grid: jax.Array, patches: int) -> jax.Array:
    """grid int32[..., 2] -> bool[..., P], which of the places of a view hold a patch."""
    return jnp.arange(patches) < (grid[..., 0] * grid[..., 1])[..., None]


def cubic_weights(count: jax.Array, length: int, side: int, sharpness: float = -0.75) -> jax.Array:
    """How `count` int32[...] places along a line are interpolated from `side` samples, float32[..., length, side].

    Cubic convolution (Keys 1981, a = -0.75), pixel centres aligned, samples beyond the ends repeated, no smoothing: as
    torch's bicubic. The identity, exactly, where count is side. Places from `count` on are those of the last.
    """
    last = jnp.maximum(count - 1, 0)[..., None]
    place = jnp.minimum(jnp.arange(length), last).astype(jnp.float32)
    source = (place + 0.5) * (side / jnp.maximum(count, 1)[..., None]) - 0.5
    floor = jnp.floor(source)
    offsets = jnp.arange(-1, 3)
    distance = jnp.abs(source[..., None] - (floor[..., None] + offsets))  # [..., length, 4]
    near = ((sharpness + 2) * distance - (sharpness + 3)) * distance**2 + 1
    far = sharpness * (((distance - 5) * distance + 8) * distance - 4)
    weight = jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0.0))
    index = jnp.clip(floor[..., None].astype(jnp.int32) + offsets, 0, side - 1)
    return jnp.einsum("...lt,...lts->...ls", weight, jax.nn.one_hot(index, side), precision="highest")


def resized_positions(table: jax.Array, grid: jax.Array, patches: int) -> jax.Array:
    """A table [side^2, D] of a square of positions, for views of other grids int32[N, 2] -> [N, P, D], row-major.

    Rows and columns are interpolated apart, and each patch takes its own: no shape depends on the grid.
    """
    side = round(table.shape[0] ** 0.5)
    square = table.astype(jnp.float32).reshape(side, side, -1)
    index, columns = jnp.arange(patches), jnp.maximum(grid[:, 1:], 1)
    row, column = index // columns, index % columns  # [N, P]
    # [N, P, side] each: what a patch takes of every row and of every column.
    rows = jnp.take_along_axis(cubic_weights(grid[:, 0], patches, side), row[..., None], axis=1)
    along = jnp.take_along_axis(cubic_weights(grid[:, 1], patches, side), column[..., None], axis=1)
    return jnp.einsum("npr,npc,rcd->npd", rows, along, square, precision="highest")


class PatchTower(LayerStack, kw_only=True):
    """Patches, learned positions, a stack of blocks whose rule is `Full`. A subclass says how many positions there are,
    and which a patch has.

    Args:
        width: dv.
        class_token: one learned token in front, with a position of its own.
        feature: which layer's output the tokens are, counted from the end: -1 is the last, -2 (LLaVA) the one before.
        patch_bias: of the patch embedding (SigLIP has one, CLIP none).
        pre_norm, post_norm: templates of the norm of what enters the first layer (CLIP), and of the last tap (SigLIP).
        norm_all: every tap goes through `post_norm`, not the last alone.
    """

    width: int
    class_token: bool = False
    feature: int = -1
    patch_bias: bool = True
    pre_norm: nn.Module | None = None
    post_norm: nn.Module | None = LayerNorm()
    norm_all: bool = False

    @property
    def places(self) -> int:
        """Learned positions of patches."""
        raise NotImplementedError

    @nn.nowrap
    def placed(self, table: jax.Array, grid: jax.Array, patches: int) -> jax.Array:
        """The table [places, dv], for views of grids int32[N, 2] -> what is added to their patches [N or 1, P, dv]."""
        raise NotImplementedError

    def setup(self) -> None:
        self.projection = Linear(self.width, use_bias=self.patch_bias)
        init = nn.initializers.normal(0.02)
        self.positions = parameter(self, "positions", init, (self.places + self.class_token, self.width))
        if self.class_token:
            self.token = parameter(self, "class_token", init, (1, self.width))
        # Copies, as towers side by side may have been given one template.
        self.first_norm = None if self.pre_norm is None else self.pre_norm.clone(parent=None)
        self.last_norm = None if self.post_norm is None else self.post_norm.clone(parent=None)
        self.make_layers()

    def __call__(self, media: Media) -> Seen:
        """Media of any leading axes [..., V, P, p * p * 3] -> Seen of the same."""
        *leading, patches, _ = media.patches.shape
        grid = media.grid.reshape(-1, 2)
        x = self.projection(media.patches.reshape(-1, patches, media.patches.shape[-1]))
        first, table = jnp.split(self.positions, [int(self.class_token)])
        x = x + self.placed(table, grid, patches).astype(x.dtype)
        x = self.in_time(x, media.patches.shape[-3])
        there = patch_mask(grid, patches)
        if self.class_token:
            start = jnp.broadcast_to((self.token + first).astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([start, x], axis=1)
            there = jnp.pad(there, ((0, 0), (1, 0)), constant_values=True)
        if self.first_norm is not None:
            x = self.first_norm(x)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        context = self.context(positions, there.astype(jnp.int32), media.patches.shape[-3])
        taps = [x]
        for layer in range(self.num_layers):
            stream, _ = self.run_span(self.enter(taps[-1]), context, None, layer, layer + 1)
            taps.append(stream.x.reshape(x.shape))
        if self.last_norm is not None:
            taps = [self.last_norm(tap) if self.norm_all else tap for tap in taps[:-1]] + [
                self.last_norm(taps[-1])
            ]
        if not -self.num_layers - 1 <= self.feature < 0:
            raise UserError(
                f"{type(self).__name__}: feature={self.feature}: from -1 to {-self.num_layers - 1} is expected"
            )
        tokens = taps[self.feature][:, int(self.class_token) :]
        if not self.class_token:
            taps = [jnp.pad(tap, ((0, 0), (1, 0), (0, 0))) for tap in taps]
        return Seen(
            tokens.reshape(*leading, patches, self.width),
            patch_mask(media.grid, patches),
            media.grid,
            jnp.stack(taps).reshape(len(taps), *leading, 1 + patches, self.width),
        )

    @nn.nowrap
    def in_time(self, x: jax.Array, views: int) -> jax.Array:
        """Patches [N, P, dv] with their positions -> what a tower of videos makes of them; N is a multiple of `views`,
        which vary fastest."""
        return x

    @nn.nowrap
    def context(self, positions: jax.Array, segments: jax.Array, views: int) -> Context:
        """What the blocks are told of tokens int32[N, T]."""
        return Context(positions, segments)


class Tower(PatchTower, kw_only=True):
    """A tower of images.

    Args:
        side: in patches, of the square that positions were learned for; other grids are interpolated.
        flexible: whether grids differ from view to view; else the table is added as it is, which is much less work.
    """

    side: int
    flexible: bool = False

    @property
    def places(self) -> int:
        return self.side**2

    @nn.nowrap
    def placed(self, table: jax.Array, grid: jax.Array, patches: int) -> jax.Array:
        if self.flexible:
            return resized_positions(table, grid, patches)
        if patches != self.places:
            raise UserError(
                f"Tower: side={self.side} has {self.places} positions and views have {patches} patches; "
                "set flexible=True to interpolate"
            )
        return table[None]


class SpectrogramTower(PatchTower, kw_only=True):
    """A tower of spectrograms (AST, arXiv 2104.01778): patches are overlapping windows of time and frequency, those of
    a step in time side by side. A shorter sound has the first steps' positions.

    AST's second token in front, of its distillation, is left out: what it is a mean with is the class token.

    Args:
        steps, bands: windows along time, the most there can be, and along frequency.
    """

    steps: int
    bands: int

    @property
    def places(self) -> int:
        return self.steps * self.bands

    @nn.nowrap
    def placed(self, table: jax.Array, grid: jax.Array, patches: int) -> jax.Array:
        if patches != self.places:
            raise UserError(
                f"SpectrogramTower: steps={self.steps} of bands={self.bands} are {self.places} positions, and sounds "
                f"have {patches} windows"
            )
        return table[None]
