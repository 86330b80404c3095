"""Normalisation over the last axis, statistics in float32."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.rms_norm import rms_norm
from research.nn.cpu_kernels import trained_by
from research.nn.linear import parameter

_LARGE = 1 << 14  # numbers from where on a kernel pays


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

        def norm(implementation: str, x: jax.Array, scale: jax.Array) -> jax.Array:
            return rms_norm(x, scale, self.epsilon, self.groups, implementation=implementation)

        plain = functools.partial(norm, "reference")
        suits = x.dtype == jnp.float32 and x.size >= _LARGE
        normalise = trained_by(functools.partial(norm, "cpu"), plain) if suits else plain
        return normalise(x.astype(jnp.float32), scale).astype(x.dtype).reshape(shape)


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
