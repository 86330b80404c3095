"""Normalisation over the last axis, statistics in float32."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.rms_norm import rms_norm
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.linear import parameter

_LARGE = 1 << 14  # elements; XLA's norm of fewer and its gradient are as fast


class RMSNorm(nn.Module):
    """x / rms(x) * scale (arXiv 1910.07467).

    Args:
        unit_offset: the scale is stored minus one (Gemma).
        axes: how many trailing axes are normalised together, with one flat scale (OLMoE: heads and their width).
        groups: equal parts of the width that are normalised each by itself (Mamba-2).
    """

    epsilon: float = 1e-6
    unit_offset: bool = False
    axes: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape
        x = x.reshape(*shape[: -self.axes], math.prod(shape[-self.axes :]))
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = parameter(self, "scale", init, (x.shape[-1],)).astype(jnp.float32)
        if self.unit_offset:
            scale = 1.0 + scale
        large = x.dtype == jnp.float32 and x.size >= _LARGE
        normalise = _trained if large and use_cpu_kernels() else _plain
        y = normalise(x.astype(jnp.float32), scale, self.epsilon, self.groups)
        return y.astype(x.dtype).reshape(shape)


def _plain(x: jax.Array, scale: jax.Array, epsilon: float, groups: int) -> jax.Array:
    return rms_norm(x, scale, epsilon, groups, implementation="reference")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _trained(x: jax.Array, scale: jax.Array, epsilon: float, groups: int) -> jax.Array:
    """By the kernel for a CPU where a gradient is taken.

    A model that is only run keeps XLA's norm: there it is as fast for few rows, and a row has the same bits among few
    and among many.
    """
    return _plain(x, scale, epsilon, groups)


def _forward(x: jax.Array, scale: jax.Array, epsilon: float, groups: int):
    return jax.vjp(lambda x, scale: rms_norm(x, scale, epsilon, groups), x, scale)


def _backward(epsilon: float, groups: int, pull, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pull(dy)


_trained.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias (Ba et al., arXiv 1607.06450)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, width).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, width).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        return (centred * inverse * scale + bias).astype(x.dtype)
