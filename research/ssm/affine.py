"""A linear recurrence whose coefficients are the same for every token: s_t = s_{t-1} W + u_t."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn import weights
from research.nn.linear import Linear

# Tokens of one turn of the loop: a short sequence becomes straight code.
UNROLL = 16


def affine_scan(kernel: weights.Kernel, u: jax.Array, state: jax.Array | None = None) -> jax.Array:
    """kernel W [S, S], u [B, T, S], state s_0 [B, S] (by default 0) -> the last state s_T f32[B, S].

    Sums are float32, products in the dtype of u. W is applied T times: with a spectral radius above 1 long sequences
    overflow.
    """
    if state is None:
        state = jnp.zeros((u.shape[0], u.shape[2]), jnp.float32)

    def step(state: jax.Array, u: jax.Array) -> tuple[jax.Array, None]:
        moved = weights.dot(state.astype(u.dtype), kernel)
        return moved.astype(jnp.float32) + u.astype(jnp.float32), None

    final, _ = jax.lax.scan(step, state.astype(jnp.float32), u.swapaxes(0, 1), unroll=min(UNROLL, u.shape[1]))
    return final


class _Transition(Linear):
    """u [B, T, S] -> the last state of s_t = W s_{t-1} + b + u_t, [B, S]."""

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        kernel, bias = self.parameters(u.shape[-1])
        return affine_scan(kernel, u + bias.astype(u.dtype)).astype(u.dtype)


class AffineState(nn.Module):
    """x [B, T, width] -> the last state [B, state_dim] of s_t = (W_s s_{t-1} + b_s) + (W_u x_t + b_u), s_0 = 0.

    Nothing depends on the input but u_t: time-invariant, without a gate. Parameters: transition/{kernel,bias} (W_s and
    b_s), update/{kernel,bias}. The kernels are drawn with a variance of one over their inputs, so that the spectral
    radius of W_s is about 1.
    """

    state_dim: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        u = Linear(self.state_dim, use_bias=True, name="update")(x)
        return _Transition(self.state_dim, use_bias=True, name="transition")(u)
