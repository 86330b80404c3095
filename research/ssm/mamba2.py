"""Mamba-2: a state-space mixer in the place of attention (arXiv 2405.21060, section 7 and figure 6).

    z, (x, B, C), dt = W_in u                      gate, what the convolution reads, step sizes
    x, B, C = silu(conv(x, B, C))                  depthwise, causal, over `conv_width` tokens
    dt = softplus(dt + dt_bias)   A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T     y_t = S_t C_t + D x_t          (`research.ssm.ssd`)
    out = W_out RMSNorm(y * silu(z))

The mixer takes the place of a block's `attention`, at any depth, and needs no positions. Its cache is a state of fixed
size (`research.ssm.recurrent`). Without a cache, in float32 on a CPU, one kernel computes what lies between the two
projections and the state that a cache takes (`kernels_pallas.ssd.mixer`); its gradient is that of the plain form.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

import kernels_pallas.ssd
from kernels_pallas.ssd.reference import convolve
from research.errors import UserError
from research.nn.attention import Context
from research.nn.compute_once import compute_once
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.linear import Linear, parameter
from research.nn.norm import RMSNorm
from research.ssm.recurrent import Convolution, RecurrentCache, Rows, init_a, init_dt, recur
from research.ssm.ssd import PLAIN, Scan


class Mamba2Prompt(struct.PyTreeNode):
    """The `PromptRows` of a Mamba-2 layer, tokens on the third axis.

    projected [B, 1, T, inner + channels + H] and segments int32[B, 1, T, 1] or None. Where the axis of tokens has a
    size of 1, it is for all of them: kernel [1, conv_width, 1, channels], bias [1, 1, 1, channels], dt_bias and a_log
    [1, 1, 1, H]; state float32[B, inner, 1, N] behind `behind` tokens, int32[B, 1, 1, 1]. length: T.
    """

    projected: jax.Array
    segments: jax.Array | None
    kernel: jax.Array
    bias: jax.Array
    dt_bias: jax.Array
    a_log: jax.Array
    state: jax.Array
    behind: jax.Array
    head_dim: int = struct.field(pytree_node=False)
    groups: int = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)

    def count(self) -> jax.Array:
        if (self.projected.shape[2], self.behind.shape[2]) != (self.length, 1):
            raise UserError("the rows of a prompt are committed in their order, without a path")
        return self.behind[:, 0, 0, 0]

    def cache(self) -> RecurrentCache:
        taps, channels = self.kernel.shape[1], self.kernel.shape[3]
        heads, inner = self.a_log.shape[3], self.state.shape[1]
        place = self.count()[:, None] + jnp.arange(1 - taps, 0)
        found = jnp.take_along_axis(self.projected[:, 0], jnp.maximum(place, 0)[..., None], axis=1)
        conv = jnp.where((place >= 0)[..., None], found[..., inner : inner + channels], 0)
        state = self.state.reshape(len(self.state), heads, self.head_dim, -1)
        return RecurrentCache(conv[:, None], state[:, None])

    def rows(self) -> Rows:
        self.count()  # raises
        inner, channels = self.state.shape[1], self.kernel.shape[3]
        _, inputs, steps = jnp.split(self.projected[:, 0], [inner, inner + channels], axis=-1)
        segments = None if self.segments is None else self.segments[:, 0, :, 0]
        mixed = compute_once(nn.silu(convolve(inputs, self.kernel[0, :, 0], segments) + self.bias[0, 0, 0]))
        vectors = self.dt_bias[0, 0, 0], self.a_log[0, 0, 0]
        _, scaled, b, _, log_decay = _tokens(mixed, steps, *vectors, self.head_dim, self.groups)
        return _rows(inputs, scaled, b, log_decay)


class Mamba2(nn.Module):
    """Args:
        num_heads, head_dim: H and P; the inner width is H P (twice the model's, as a rule).
        state_dim, num_groups: N and G, the groups of heads that share B and C, and are normalised each by itself.
        conv_width: tokens that the convolution sees.
        chunk: tokens of a chunk of the scan; changes speed alone.
        scan: how the scan is computed, see `research.ssm.ssd`. Only the plain one gives way to the kernel for a CPU, in
            float32 and for the sizes that it takes.
        norm_eps: of the gated norm.
        use_bias, conv_bias: of the projections, and of the convolution.

    x is [B, T, width] or [B * T, width]. Returns the output and the rows of the new tokens. Tokens of different
    segments do not meet. Parameters: input/kernel [width, 2 H P + 2 G N + H] in the order z, x, B, C, dt;
    conv/{kernel,bias} [conv_width, channels], the last tap on the token itself; A_log, D, dt_bias [H];
    norm/scale [H P]; output/kernel.
    """

    num_heads: int
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_width: int = 4
    chunk: int = 128
    scan: Scan = PLAIN
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
    ) -> tuple[jax.Array, Rows | Mamba2Prompt]:
        batch, length = context.positions.shape
        projected = Linear(self.inner + self.channels + self.num_heads, self.use_bias, name="input")(u)
        projected = projected.reshape(batch, length, -1)
        y, rows = self._read_prompt(projected, context) if cache is None else (None, None)
        if y is None:
            y, rows = self._read(projected, context, cache)
        out = Linear(u.shape[-1], self.use_bias, name="output")(y.reshape(*u.shape[:-1], self.inner))
        return out, rows

    def _read(
        self, projected: jax.Array, context: Context, cache: RecurrentCache | None
    ) -> tuple[jax.Array, Rows]:
        """What lies between the projections, [B, T, inner], and the rows of the tokens."""
        batch, length, _ = projected.shape
        z, inputs, steps = jnp.split(projected, [self.inner, self.inner + self.channels], axis=-1)
        mixed = nn.silu(Convolution(self.conv_width, self.conv_bias, name="conv")(inputs, context, cache))
        if cache is None:
            mixed = compute_once(mixed)
        vectors = self._vector("dt_bias", init_dt), self._vector("A_log", init_a)
        x, scaled, b, c, log_decay = _tokens(mixed, steps, *vectors, self.head_dim, self.num_groups)
        y = recur(scaled, log_decay, b, c, context, cache, self.chunk, self.scan)
        y = y + x * self._vector("D", nn.initializers.ones).astype(x.dtype)[:, None]
        y = y.reshape(batch, length, self.inner) * nn.silu(z)
        y = RMSNorm(self.norm_eps, groups=self.num_groups, name="norm")(y)
        return y, _rows(inputs, scaled, b, log_decay)

    def _read_prompt(
        self, projected: jax.Array, context: Context
    ) -> tuple[jax.Array, Mamba2Prompt] | tuple[None, None]:
        """The same by the kernel for a CPU, or None where it does not take this layer."""
        there = self.has_variable("params", "conv")  # not while parameters are drawn
        if not there or self.scan != PLAIN or projected.dtype != jnp.float32 or not use_cpu_kernels():
            return None, None
        if not kernels_pallas.ssd.takes_on_cpu(self.head_dim, self.state_dim, self.conv_width):
            return None, None
        conv = self.get_variable("params", "conv")
        kernel = conv["kernel"].astype(jnp.float32)
        bias = conv["bias"].astype(jnp.float32) if self.conv_bias else jnp.zeros(self.channels)
        scale = self.get_variable("params", "norm")["scale"].astype(jnp.float32)
        a_log, skip, dt_bias = (
            self.get_variable("params", name).astype(jnp.float32) for name in ("A_log", "D", "dt_bias")
        )
        segments = context.segments
        count = _first_segment(projected, segments)
        options = dict(
            head_dim=self.head_dim, state_dim=self.state_dim, epsilon=self.norm_eps, chunk=self.chunk
        )
        operands = (projected, kernel, bias, a_log, skip, dt_bias, scale, segments, count)
        y, state = kernels_pallas.ssd.mixer(*operands, **options)
        return y, Mamba2Prompt(
            projected[:, None],
            None if segments is None else segments[:, None, :, None],
            kernel[None, :, None],
            *(vector.reshape(1, 1, 1, -1) for vector in (bias, dt_bias, a_log)),
            state.reshape(len(state), self.inner, 1, self.state_dim),
            count.reshape(-1, 1, 1, 1),
            self.head_dim,
            self.num_groups,
            projected.shape[1],
        )

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> RecurrentCache:
        """Of a size that `capacity` and `margin` do not change."""
        state = (self.num_heads, self.head_dim, self.state_dim)
        return RecurrentCache.empty(batch, (self.conv_width - 1, self.channels), state, dtype)

    def _vector(self, name: str, init: nn.initializers.Initializer) -> jax.Array:
        return parameter(self, name, init, (self.num_heads,)).astype(jnp.float32)


def _tokens(
    mixed: jax.Array, steps: jax.Array, dt_bias: jax.Array, a_log: jax.Array, head_dim: int, groups: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the convolution gave [B, T, channels], steps [B, T, H] -> x and dt x [B, T, H, P], B and C [B, T, G, N], log
    decays [B, T, H]."""
    batch, length, heads = steps.shape
    inner = heads * head_dim
    x, b, c = jnp.split(mixed, [inner, (inner + mixed.shape[-1]) // 2], axis=-1)
    x = x.reshape(batch, length, heads, head_dim)
    b, c = (y.reshape(batch, length, groups, -1) for y in (b, c))
    dt = jax.nn.softplus(steps.astype(jnp.float32) + dt_bias)
    scaled = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
    return x, scaled, b, c, -jnp.exp(a_log) * dt


def _rows(inputs: jax.Array, scaled: jax.Array, b: jax.Array, log_decay: jax.Array) -> Rows:
    return Rows(inputs[:, None], scaled.swapaxes(1, 2), b.swapaxes(1, 2), log_decay.swapaxes(1, 2)[..., None])


def _first_segment(x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """int32[B]: tokens of x [B, T, ...] before the first change of segment; none of padding."""
    batch, length = x.shape[:2]
    if segments is None:
        return jnp.full(batch, length, jnp.int32)
    other = (segments != segments[:, :1]) | (segments == 0)
    return jnp.where(jnp.any(other, axis=1), jnp.argmax(other, axis=1), length).astype(jnp.int32)
