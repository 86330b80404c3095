"""MomentumSMoE: the layers of a stack are the iterations of an optimizer (arXiv 2410.14574).

The residual update of an SMoE layer, x + u with u = sum_i g_i E_i(norm(x)), is read as one step of gradient descent
whose negative gradient is u. Better optimizers then make better residual updates. Their state has the shape of the
activations and is carried from MoE layer to MoE layer *through depth*: it is zero before the first layer, is never
kept between calls, and never looks at another position, so causality and caches are untouched.

    heavy-ball       p <- mu p + u                            x <- x + gamma p
    negative         the same with mu < 0
    robust           u is taken at y = x + alpha gamma p                                           (`robust_momentum`)
    Adam             m <- b1 m + (1 - b1) u     v <- b2 v + (1 - b2) u^2
                     x <- x + gamma m / sqrt(v + eps) - kappa x                                    (AdamSMoE)

The paper carries -u and subtracts; the sign is absorbed by the last linear map of the experts, and with "+" the cell
with mu = 0 and gamma = 1 is exactly the plain residual. States are float32 whatever the activations are.

`MomentumBlock` puts a cell around any FFN. In a pattern with plain blocks (GLaM, V-MoE in every other layer) those
pass the state on untouched.
"""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.attention import Context
from research.nn.cache import Fresh, LayerCache
from research.nn.mlp import feed_forward
from research.nn.reports import report_measurement
from research.nn.transformer import Block, Stream

LEARNABLE = ("mu", "gamma")


class Momentum(struct.PyTreeNode):
    """What is carried through depth, float32 of the shape of the hidden states, None what no layer needs.

    p: the heavy-ball buffer; first, second: Adam's moments m and v.
    """

    p: jax.Array | None = None
    first: jax.Array | None = None
    second: jax.Array | None = None


class HeavyBall(nn.Module):
    """p <- mu p + u, x <- x + gamma p; the FFN reads x + alpha gamma p.

    With alpha = 0 this is heavy-ball momentum, with mu < 0 negative momentum, and with mu = alpha = 0 and gamma = 1 the
    plain residual. If the FFN were the linear map u = -s x, the layers would converge just where |mu| < 1 and
    0 < gamma s < 2 (1 + mu), for alpha = 0.

    Args:
        mu: in (-1, 1). gamma: step size. alpha: how far the FFN looks ahead.
        learned: which of "mu" and "gamma" are parameters of every layer, momentum/mu and momentum/gamma, that begin
            with these values.
    """

    mu: float = 0.7
    gamma: float = 1.0
    alpha: float = 0.0
    learned: tuple[Literal["mu", "gamma"], ...] = ()

    def __post_init__(self):
        if not -1.0 < self.mu < 1.0:
            raise UserError(
                f"HeavyBall.mu: {self.mu} is not in (-1, 1), where the sum over layers is bounded"
            )
        if self.gamma <= 0.0:
            raise UserError(f"HeavyBall.gamma: {self.gamma} is not a positive step size")
        if unknown := set(self.learned) - set(LEARNABLE):
            raise UserError(f"HeavyBall.learned: {min(unknown)!r} is not one of {', '.join(LEARNABLE)}")
        super().__post_init__()

    def setup(self) -> None:
        self._learned = {
            name: self.param(name, nn.initializers.constant(getattr(self, name)), (), jnp.float32)
            for name in self.learned
        }

    @nn.nowrap  # so that no parameter is looked up: the stack asks a block that is no layer of its own
    def start(self, x: jax.Array) -> Momentum:
        """The state before the first layer."""
        return Momentum(p=jnp.zeros(x.shape, jnp.float32))

    def point(self, x: jax.Array, state: Momentum) -> jax.Array:
        """Where the FFN is evaluated."""
        if not self.alpha:
            return x
        return _add(x, self.alpha * self._value("gamma") * self._buffer(state))

    def step(self, x: jax.Array, u: jax.Array, state: Momentum) -> tuple[jax.Array, Momentum]:
        """x, u [..., width] -> x and the state after the layer."""
        p = self._value("mu") * self._buffer(state) + u.astype(jnp.float32)
        return _add(x, self._value("gamma") * p), state.replace(p=p)

    def _value(self, name: str) -> float | jax.Array:
        return self._learned[name].astype(jnp.float32) if name in self.learned else getattr(self, name)

    def _buffer(self, state: Momentum) -> jax.Array:
        if state.p is None:
            raise UserError(
                "a HeavyBall layer follows Adam layers that carry no buffer for it: give Adam the `mu` of the buffer"
            )
        return state.p


def robust_momentum(kappa: float, smoothness: float, rho: float | None = None) -> HeavyBall:
    """The robust momentum method (Cyrus et al., arXiv 1710.04753) as a cell.

        gamma = kappa (1 - rho)^2 (1 + rho) / L     mu = kappa rho^3 / (kappa - 1)
        alpha = rho^3 / ((kappa - 1) (1 - rho)^2 (1 + rho)),  so that alpha gamma = mu / L

    Args:
        kappa: condition number, above 1.
        smoothness: L.
        rho: rate of convergence, from 1 - 1 / sqrt(kappa), the fastest and the default, to 1 - 1 / kappa, gradient
            descent's, the most robust to noise.
    """
    if kappa <= 1.0 or smoothness <= 0.0:
        raise UserError(
            f"robust_momentum: kappa {kappa} and smoothness {smoothness} must be above 1 and above 0"
        )
    fast, slow = 1.0 - 1.0 / math.sqrt(kappa), 1.0 - 1.0 / kappa
    rho = fast if rho is None else rho
    if not fast <= rho <= slow:
        raise UserError(
            f"robust_momentum: rho {rho} is not between {fast:.4g} and {slow:.4g} of kappa {kappa}"
        )
    scale = (1.0 - rho) ** 2 * (1.0 + rho)
    return HeavyBall(
        mu=kappa * rho**3 / (kappa - 1.0),
        gamma=kappa * scale / smoothness,
        alpha=rho**3 / ((kappa - 1.0) * scale),
    )


class Adam(nn.Module):
    """m <- b1 m + (1 - b1) u, v <- b2 v + (1 - b2) u^2, x <- x + gamma m / sqrt(v + eps) - kappa x.

    There is no bias correction, as in the paper: from the zero state the first layer takes
    (1 - b1) / sqrt(1 - b2) sign(u) = 3.16 sign(u) wherever |u| >> sqrt(eps / (1 - b2)), and hardly any gradient
    reaches its experts. A larger eps or a smaller gamma helps.

    Args:
        gamma, beta1, beta2, epsilon: as above.
        decay: kappa, decoupled decay of x.
        mu: where given, the layer also accumulates the heavy-ball buffer p <- mu p + u for `HeavyBall` layers after it.
            In the authors' released code the first layer is such an Adam layer with decay 1, all others heavy-ball.
    """

    gamma: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    decay: float = 0.0
    mu: float | None = None

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"Adam.{name}: {getattr(self, name)} is not in [0, 1)")
        if self.epsilon <= 0.0:
            raise UserError(
                f"Adam.epsilon: {self.epsilon} must be positive: v is zero before the first layer"
            )
        super().__post_init__()

    @nn.nowrap
    def start(self, x: jax.Array) -> Momentum:
        """The state before the first layer."""
        zeros = jnp.zeros(x.shape, jnp.float32)
        return Momentum(None if self.mu is None else zeros, zeros, zeros)

    def point(self, x: jax.Array, state: Momentum) -> jax.Array:
        """Where the FFN is evaluated."""
        return x

    def step(self, x: jax.Array, u: jax.Array, state: Momentum) -> tuple[jax.Array, Momentum]:
        """x, u [..., width] -> x and the state after the layer."""
        if state.first is None:
            raise UserError(
                "an Adam layer follows HeavyBall layers, whose state has no moments: begin with Adam"
            )
        u = u.astype(jnp.float32)
        first = self.beta1 * state.first + (1.0 - self.beta1) * u
        second = self.beta2 * state.second + (1.0 - self.beta2) * jnp.square(u)
        update = self.gamma * first * jax.lax.rsqrt(second + self.epsilon)
        if self.decay:
            update = update - self.decay * x.astype(jnp.float32)
        p = state.p if self.mu is None else self.mu * state.p + u
        return _add(x, update), Momentum(p, first, second)


class MomentumBlock(Block):
    """A block whose FFN branch is a step of an optimizer that runs through the layers.

    x <- x + mix(norm(x)) as in any block, and then, with the state that came from the MoE layer below,
    u = mlp(norm(point(x))), (x, state) <- step(x, u, state). Attention never touches the state. The parameters are
    those of `Block`. Reports the mean norm of its output as the measurement `output_norm`.

    Args:
        momentum: the cell, `HeavyBall` or `Adam`. Its state begins as the first such block of the stack says.
        post_norm_double: the layer of the authors' released code, post-norm with two residuals and two norms around the
            MoE: h = norm(x + mix(x)), then norm(h + norm(x')) where x' is the cell's step from h.
    """

    momentum: nn.Module = HeavyBall()
    post_norm_double: bool = False

    def init_depth(self, x: jax.Array) -> Momentum:
        """The state that the embedded tokens x [..., width] bring."""
        return self.momentum.start(x)

    @nn.compact
    def __call__(
        self, stream: Stream, context: Context, cache: LayerCache | None = None
    ) -> tuple[Stream, Fresh]:
        if self.post_norm_double:
            if self.post_norms:
                raise UserError("MomentumBlock: post_norm_double has its own norms; leave post_norms off")
            out, fresh = self._released(stream, context, cache)
        else:
            x, state = stream.x, stream.depth
            y, fresh = self.attention(self.norm.copy(name="attention_norm")(x), context, cache)
            x = x + self._branch(y, "attention")
            point = self.momentum.point(x, state)
            u = feed_forward(self.mlp, self.norm.copy(name="mlp_norm")(point), context)
            out = Stream(*self.momentum.step(x, self._branch(u, "mlp"), state))
        _report_norm(self, out.x, context)
        return out, fresh

    def _released(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Fresh]:
        y, fresh = self.attention(stream.x, context, cache)
        x = self.norm.copy(name="attention_norm")(stream.x + self._branch(y, "attention"))
        u = feed_forward(self.mlp, self.momentum.point(x, stream.depth), context)
        inner, state = self.momentum.step(x, self._branch(u, "mlp"), stream.depth)
        inner = self.norm.copy(name="mlp_norm")(inner)
        return Stream(self.norm.copy(name="mlp_post_norm")(x + inner), state), fresh


def _add(x: jax.Array, update: jax.Array) -> jax.Array:
    """x plus a float32 update, rounded once to the dtype of x."""
    return (x.astype(jnp.float32) + update).astype(x.dtype)


def _report_norm(block: nn.Module, x: jax.Array, context: Context) -> None:
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    real = jnp.ones(norms.shape) if context.segments is None else (context.segments != 0).reshape(norms.shape)
    report_measurement(block, "output_norm", jnp.sum(norms * real), jnp.sum(real).astype(jnp.float32))
