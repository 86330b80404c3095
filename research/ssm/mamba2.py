"""Mamba-2: a state-space mixer in the place of attention (arXiv 2405.21060, section 7 and figure 6).

    z, (x, B, C), dt = W_in u                      gate, what the convolution reads, step sizes
    x, B, C = silu(conv(x, B, C))                  depthwise, causal, over `conv_width` tokens
    dt = softplus(dt + dt_bias)   A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T     y_t = S_t C_t + D x_t          (`research.ssm.ssd`)
    out = W_out RMSNorm(y * silu(z))

The mixer takes the place of a block's `attention`, at any depth, and needs no positions. Its cache is a state of fixed
size (`research.ssm.recurrent`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.attention import Context
from research.nn.compute_once import compute_once
from research.nn.linear import Linear, parameter
from research.nn.norm import RMSNorm
from research.ssm.recurrent import Convolution, RecurrentCache, Rows, init_a, init_dt, recur
from research.ssm.ssd import PLAIN, Scan


class Mamba2(nn.Module):
    """Args:
        num_heads, head_dim: H and P; the inner width is H P (twice the model's, as a rule).
        state_dim, num_groups: N and G, the groups of heads that share B and C, and are normalised each by itself.
        conv_width: tokens that the convolution sees.
        chunk: tokens of a chunk of the scan; changes speed alone.
        scan: how the scan is computed, see `research.ssm.ssd`.
        norm_eps: of the gated norm.
        use_bias, conv_bias: of the projections, and of the convolution.

    x is [B, T, width] or [B * T, width]. Returns the output and the `Rows` of the new tokens. Tokens of different
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
    ) -> tuple[jax.Array, Rows]:
        batch, length = context.positions.shape
        projected = Linear(self.inner + self.channels + self.num_heads, self.use_bias, name="input")(u)
        projected = projected.reshape(batch, length, -1)
        z, inputs, dt = jnp.split(projected, [self.inner, self.inner + self.channels], axis=-1)
        mixed = nn.silu(Convolution(self.conv_width, self.conv_bias, name="conv")(inputs, context, cache))
        if cache is None:
            mixed = compute_once(mixed)
        x, b, c = jnp.split(mixed, [self.inner, self.channels - self.num_groups * self.state_dim], axis=-1)
        x = x.reshape(batch, length, self.num_heads, self.head_dim)
        b, c = (y.reshape(batch, length, self.num_groups, self.state_dim) for y in (b, c))

        dt = jax.nn.softplus(dt.astype(jnp.float32) + self._vector("dt_bias", init_dt))
        log_decay = -jnp.exp(self._vector("A_log", init_a)) * dt
        scaled = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
        y = recur(scaled, log_decay, b, c, context, cache, self.chunk, self.scan)
        y = y + x * self._vector("D", nn.initializers.ones).astype(x.dtype)[:, None]
        y = y.reshape(batch, length, self.inner) * nn.silu(z)
        y = RMSNorm(self.norm_eps, groups=self.num_groups, name="norm")(y).reshape(*u.shape[:-1], self.inner)
        out = Linear(u.shape[-1], self.use_bias, name="output")(y)
        rows = Rows(
            inputs[:, None], scaled.swapaxes(1, 2), b.swapaxes(1, 2), log_decay.swapaxes(1, 2)[..., None]
        )
        return out, rows

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> RecurrentCache:
        """Of a size that `capacity` and `margin` do not change."""
        state = (self.num_heads, self.head_dim, self.state_dim)
        return RecurrentCache.empty(batch, (self.conv_width - 1, self.channels), state, dtype)

    def _vector(self, name: str, init: nn.initializers.Initializer) -> jax.Array:
        return parameter(self, name, init, (self.num_heads,)).astype(jnp.float32)
