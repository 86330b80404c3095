"""Mamba-2: a state-space mixer in the place of attention (arXiv 2405.21060, section 7 and figure 6).

    z, (x, B, C), dt = W_in u                      gate, what the convolution reads, step sizes
    x, B, C = silu(conv(x, B, C))                  depthwise, causal, over `conv_width` tokens
    dt = softplus(dt + dt_bias)   A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T     y_t = S_t C_t + D x_t          (`research.ssm.ssd`)
    out = W_out RMSNorm(y * silu(z))

The mixer takes the place of a block's `attention`, at any depth, and needs no positions. Its cache is a state of fixed
size: the last `conv_width - 1` inputs of the convolution and S. As attention does, it reads the cache and returns the
rows of new tokens; `Cache.commit` then advances the state along the accepted path alone, so nodes of a tree cost no
states of their own and a rejected draft leaves no trace.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.attention import Context
from research.nn.linear import Linear, parameter
from research.nn.norm import RMSNorm
from research.ssm.ssd import advance, ssd, ssd_tree


class Rows(NamedTuple):
    """What a mixer leaves of new tokens, each [B, *, T, *]: enough to advance its state along any path of them.

    conv [B, 1, T, channels], inputs of the convolution; x [B, H, T, P] with dt; b [B, G, T, N];
    log_decay [B, H, T, 1].
    """

    conv: jax.Array
    x: jax.Array
    b: jax.Array
    log_decay: jax.Array


class RecurrentCache(struct.PyTreeNode):
    """conv [B, conv_width - 1, channels], the newest inputs last; state float32 [B, H, P, N]."""

    conv: jax.Array
    state: jax.Array

    keeps_tokens = False

    def append(self, fresh: Rows, length: jax.Array, count: jax.Array) -> "RecurrentCache":
        """The state behind rows 0 .. count[b] of fresh; what lies before `length` is already in it."""
        x, b, log_decay = (y.swapaxes(1, 2) for y in (fresh.x, fresh.b, fresh.log_decay))
        state = advance(self.state, x, log_decay[..., 0], b, count)
        inputs = jnp.concatenate([self.conv, fresh.conv[:, 0].astype(self.conv.dtype)], axis=1)
        kept = count[:, None] + jnp.arange(self.conv.shape[1])
        return RecurrentCache(jnp.take_along_axis(inputs, kept[..., None], axis=1), state)

    def select(self, rows: jax.Array) -> "RecurrentCache":
        return RecurrentCache(self.conv[rows], self.state[rows])


class Mamba2(nn.Module):
    """Args:
        num_heads, head_dim: H and P; the inner width is H P (twice the model's, as a rule).
        state_dim, num_groups: N and G, the groups of heads that share B and C.
        conv_width: tokens that the convolution sees.
        chunk: tokens of a chunk of the scan; changes speed alone.
        norm_eps: of the gated norm.
        use_bias, conv_bias: of the projections, and of the convolution.

    x is [B, T, width] or [B * T, width]. Returns the output and the `Rows` of the new tokens. Tokens of different
    segments do not meet. Parameters: input/kernel [width, 2 H P + 2 G N + H] in the order z, x, B, C, dt;
    conv/{kernel,bias} [conv_width, channels], the last tap on the token itself; A_log, D, dt_bias [H]; norm/scale
    [H P];
    output/kernel.
    """

    num_heads: int
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_width: int = 4
    chunk: int = 128
    norm_eps: float = 1e-5
    use_bias: bool = False
    conv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_groups:
            raise UserError(f"num_heads={self.num_heads} is not a multiple of num_groups={self.num_groups}")
        if self.conv_width < 2:
            raise UserError(f"conv_width={self.conv_width}: the convolution sees at least 2 tokens")

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.inner + 2 * self.num_groups * self.state_dim

    @nn.compact
    def __call__(
        self, u: jax.Array, context: Context, cache: RecurrentCache | None = None
    ) -> tuple[jax.Array, Rows]:
        batch, length = context.positions.shape
        projected = Linear(self.inner + self.channels + self.num_heads, self.use_bias, name="input")(u)
        projected = projected.reshape(batch, length, -1)
        z, inputs, dt = jnp.split(projected, [self.inner, self.inner + self.channels], axis=-1)
        mixed = nn.silu(Convolution(self.conv_width, self.conv_bias, name="conv")(inputs, context, cache))
        x, b, c = jnp.split(mixed, [self.inner, self.channels - self.num_groups * self.state_dim], axis=-1)
        x = x.reshape(batch, length, self.num_heads, self.head_dim)
        b, c = (y.reshape(batch, length, self.num_groups, self.state_dim) for y in (b, c))

        dt = jax.nn.softplus(dt.astype(jnp.float32) + self._vector("dt_bias", _init_dt))
        log_decay = -jnp.exp(self._vector("A_log", _init_a)) * dt
        scaled = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
        if cache is None:
            y, _ = ssd(scaled, log_decay, b, c, chunk=self.chunk, segments=context.segments)
        else:
            y = ssd_tree(scaled, log_decay, b, c, tree=context.tree, state=cache.state)
        y = y + x * self._vector("D", nn.initializers.ones).astype(x.dtype)[:, None]
        y = y.reshape(batch, length, self.inner) * nn.silu(z)
        y = RMSNorm(self.norm_eps, name="norm")(y).reshape(*u.shape[:-1], self.inner)
        out = Linear(u.shape[-1], self.use_bias, name="output")(y)
        rows = Rows(
            inputs[:, None], scaled.swapaxes(1, 2), b.swapaxes(1, 2), log_decay.swapaxes(1, 2)[..., None]
        )
        return out, rows

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> RecurrentCache:
        """Of a size that `capacity` and `margin` do not change."""
        conv = jnp.zeros((batch, self.conv_width - 1, self.channels), dtype)
        state = (batch, self.num_heads, self.head_dim, self.state_dim)
        return RecurrentCache(conv, jnp.zeros(state, jnp.float32))

    def _vector(self, name: str, init: nn.initializers.Initializer) -> jax.Array:
        return parameter(self, name, init, (self.num_heads,)).astype(jnp.float32)


class Convolution(nn.Module):
    """Depthwise causal convolution over the tokens of a segment, or along the paths of a tree behind a cache.

    inputs [B, T, channels] -> the same. Parameters: kernel [width, channels], bias [channels].
    """

    width: int
    use_bias: bool

    @nn.compact
    def __call__(self, inputs: jax.Array, context: Context, cache: RecurrentCache | None) -> jax.Array:
        channels = inputs.shape[-1]
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=())
        kernel = parameter(self, "kernel", init, (self.width, channels)).astype(inputs.dtype)
        y = inputs * kernel[-1]
        for back in range(1, self.width):
            earlier = (
                _back(inputs, back, context) if cache is None else _up(inputs, back, context, cache.conv)
            )
            y = y + earlier * kernel[-1 - back]
        if self.use_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (channels,)).astype(y.dtype)
        return y


def _back(inputs: jax.Array, back: int, context: Context) -> jax.Array:
    """The inputs `back` tokens earlier in the same segment, 0 where there are none."""
    shifted = jnp.pad(inputs, ((0, 0), (back, 0), (0, 0)))[:, : inputs.shape[1]]
    if context.segments is None:
        return shifted
    before = jnp.pad(context.segments, ((0, 0), (back, 0)))[:, : inputs.shape[1]]
    return jnp.where((before == context.segments)[..., None], shifted, 0)


def _up(inputs: jax.Array, back: int, context: Context, cached: jax.Array) -> jax.Array:
    """The inputs `back` places further up each node's path: of an ancestor, or of a committed token."""
    batch, count = context.positions.shape
    tree = jnp.broadcast_to(context.tree, (batch, count, count))
    depth = context.positions - context.length[:, None]
    # A path has one node at each depth.
    ancestor = tree & (depth[:, None, :] == depth[:, :, None] - back)
    found = jnp.einsum("bji,bic->bjc", ancestor.astype(inputs.dtype), inputs)
    place = cached.shape[1] + depth - back  # behind the root there is what was committed
    committed = jnp.take_along_axis(cached, jnp.clip(place, 0, cached.shape[1] - 1)[..., None], axis=1)
    return found + jnp.where((place < cached.shape[1])[..., None], committed.astype(inputs.dtype), 0)


def _init_dt(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """softplus^-1 of a step size that is log-uniform in [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def _init_a(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """log of a rate that is uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
