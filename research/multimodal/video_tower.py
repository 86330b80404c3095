"""A tower of videos by divided space-time attention (TimeSformer, arXiv 2102.05095; as mPLUG-video, arXiv 2306.04362,
has it), which begins as an image tower.

Patches x [T, P, dv] of T frames and one class token c [dv], in every block:

    x <- x + W_fc TimeAttn(LN_t(x))        each place attends to itself in all frames
    c_f, y_f = SpaceAttn(LN([c; x_f]))     each frame by itself, with a copy of the class token
    c <- c + mean_f c_f;  x_f <- x_f + y_f;  [c; x] <- [c; x] + MLP(LN([c; x]))

W_fc, its bias and the temporal embedding, which is added to the patches alone, begin at 0: of one frame the tower makes
what the image tower makes of it, and frames have no order yet. The class token stands in every view of what is `Seen`.
Frames that are not there (grid 0) are seen by nothing.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.multimodal.tower import Tower
from research.nn.attention import Attention, Context
from research.nn.cache import Fresh, LayerCache
from research.nn.linear import Linear, parameter
from research.nn.transformer import Block


class FrameContext(Context):
    """Of tokens int32[N * T, class_token + P]. frames: T; class_token: whether they begin with one."""

    frames: int = struct.field(pytree_node=False, default=1)
    class_token: int = struct.field(pytree_node=False, default=0)


class FrameAttention(Attention):
    """Each frame by itself; what the class token reads is the mean over the frames that are there."""

    @nn.compact
    def __call__(
        self, x: jax.Array, context: FrameContext, cache: LayerCache | None = None
    ) -> tuple[jax.Array, Fresh]:
        out, fresh = super().__call__(x, context, cache)
        if not context.class_token:
            return out, fresh
        frames, tokens = context.frames, context.positions.shape[1]
        y = out.reshape(-1, frames, tokens, out.shape[-1])
        there = jnp.any(context.segments[:, 1:] > 0, axis=1).reshape(-1, frames, 1)
        total = jnp.sum(jnp.where(there, y[:, :, 0], 0.0), axis=1, keepdims=True, dtype=jnp.float32)
        mean = (total / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)).astype(y.dtype)
        y = jnp.concatenate([jnp.broadcast_to(mean[:, :, None], y[:, :, :1].shape), y[:, :, 1:]], axis=2)
        return y.reshape(out.shape), fresh


class SpaceTimeBlock(Block, kw_only=True):
    """A block whose `attention` is a `FrameAttention`, with one over time before it.

    Args:
        time: the attention over time, whose rule is `Full`.

    Parameters: those of a block, time_norm/..., time/..., time_output/{kernel,bias}.
    """

    time: Attention

    @nn.compact
    def __call__(
        self, x: jax.Array, context: FrameContext, cache: LayerCache | None = None
    ) -> tuple[jax.Array, Fresh]:
        frames, tokens, first = context.frames, context.positions.shape[1], context.class_token
        width, patches = x.shape[-1], tokens - first
        views = x.reshape(-1, frames, tokens, width)
        y = self.norm.copy(name="time_norm")(views[:, :, first:].swapaxes(1, 2)).reshape(-1, width)
        there = context.segments.reshape(-1, frames, tokens)[:, :, first:].swapaxes(1, 2).reshape(-1, frames)
        places = Context(jnp.broadcast_to(jnp.arange(frames), there.shape), there)
        y = self.time(y, places)[0]
        y = Linear(width, True, init_scale=0.0, name="time_output")(y)
        y = self._branch(y, "time").reshape(-1, patches, frames, width).swapaxes(1, 2)
        views = views + jnp.pad(y, ((0, 0), (0, 0), (first, 0), (0, 0)))
        return super().__call__(views.reshape(x.shape), context, cache)


class VideoTower(Tower, kw_only=True):
    """A tower whose views are the frames of a video, at most `frames`, and whose blocks are `SpaceTimeBlock`s.

    Parameters: those of a tower, and times [frames, dv], the temporal embedding.
    """

    frames: int

    def setup(self) -> None:
        super().setup()
        self.times = parameter(self, "times", nn.initializers.zeros, (self.frames, self.width))

    @nn.nowrap
    def in_time(self, x: jax.Array, views: int) -> jax.Array:
        if views > self.frames:
            raise UserError(f"VideoTower: {views} frames are given, and frames={self.frames}")
        own = self.times[:views, None].astype(x.dtype)
        return (x.reshape(-1, views, *x.shape[1:]) + own).reshape(x.shape)

    @nn.nowrap
    def context(self, positions: jax.Array, segments: jax.Array, views: int) -> FrameContext:
        return FrameContext(positions, segments, frames=views, class_token=int(self.class_token))


def begin_as_images(video: Any, image: Any, where: str = "tower") -> Any:
    """Parameters of a video tower -> the same with all that an image tower of its shape has. What the image tower does
    not know stays: it begins at 0, or behind what does.

    Raises:
        UserError: the image tower has a parameter that this one lacks, or one of another shape.
    """
    if isinstance(image, dict) and isinstance(video, dict):
        if unknown := next((name for name in image if name not in video), None):
            raise UserError(f"{where}: a video tower has no {unknown!r}, which the image tower has")
        return video | {
            name: begin_as_images(video[name], part, f"{where}/{name}") for name, part in image.items()
        }
    if isinstance(image, dict) or isinstance(video, dict) or image.shape != video.shape:
        shapes = (getattr(part, "shape", "a subtree") for part in (image, video))
        raise UserError("{}: the image tower's is {}, and the video tower's {}".format(where, *shapes))
    return image
