"""Experts: feed-forward networks stacked along a first axis, one kernel [E, in, out] a projection.

What an expert computes is written over a `Dispatch`, which multiplies every row of its buffer by the kernel of
the row's expert; so the same experts run under any backend.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.moe.dispatch import Dispatch
from research.moe.routing import wrong_number
from research.nn.linear import parameter
from research.nn.mlp import ACTIVATIONS, Activation


class ExpertLinear(nn.Module):
    """y = x W_e + b_e with the kernel of each row's expert: buffer [..., in] -> buffer [..., features].

    Parameters: kernel [E, in, features], drawn as that of `Linear`, bias [E, features]. A kernel in the
    parameter tree may be structured (leaves stacked along the experts) or narrower than `features`.
    """

    num_experts: int
    features: int
    use_bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, dispatch: Dispatch, buffer: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "truncated_normal", batch_axis=(0,)
        )
        shape = (self.num_experts, buffer.shape[-1], self.features)
        kernel = parameter(self, "kernel", init, shape)
        found = jax.tree.leaves(kernel)[0].shape[0]
        if found != self.num_experts:
            raise wrong_number("/".join(self.path), found, self.num_experts)
        buffer = dispatch.dot(buffer, kernel)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.num_experts, self.features))
            buffer = dispatch.bias(buffer, bias)
        return buffer


class FeedForwardExperts(nn.Module):
    """E feed-forward networks of `hidden_dim` units: gated, down(act(gate x) * up x), or plain, down(act(up x)).

    Parameters: {gate, up, down}/kernel as `ExpertLinear` has them, without `gate` where not gated.
    """

    num_experts: int
    hidden_dim: int
    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False

    @nn.compact
    def __call__(self, dispatch: Dispatch, buffer: jax.Array) -> jax.Array:
        width, act = buffer.shape[-1], ACTIVATIONS[self.activation]

        def linear(features: int, name: str) -> ExpertLinear:
            return ExpertLinear(self.num_experts, features, self.use_bias, name=name)

        up = linear(self.hidden_dim, "up")(dispatch, buffer)
        hidden = act(linear(self.hidden_dim, "gate")(dispatch, buffer)) * up if self.gated else act(up)
        return linear(width, "down")(dispatch, hidden)


def slice_dense(mlp: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """A dense FFN's parameters cut into `parts` experts, whose outputs add up to the FFN's.

    {gate, up, down}/{kernel, bias} -> the same names with leading axis `parts`: columns of gate and up with their
    biases, rows of down; every expert has its share of the output bias. Raises `UserError` if the hidden units
    do not divide.
    """
    hidden = mlp["down"]["kernel"].shape[0]
    if hidden % parts:
        raise UserError(f"the FFN's {hidden} hidden units do not divide into {parts} experts")
    cut = {}
    for name in ("gate", "up"):
        if name in mlp:
            kernel = mlp[name]["kernel"]
            cut[name] = {"kernel": jnp.stack(jnp.split(kernel, parts, axis=-1))}
            if "bias" in mlp[name]:
                cut[name]["bias"] = mlp[name]["bias"].reshape(parts, -1)
    cut["down"] = {"kernel": mlp["down"]["kernel"].reshape(parts, hidden // parts, -1)}
    if "bias" in mlp["down"]:
        bias = mlp["down"]["bias"] / parts
        cut["down"]["bias"] = jnp.broadcast_to(bias, (parts, *bias.shape))
    return cut


def merge_slices(experts: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `slice_dense`: the FFN whose output is the sum of all experts'."""
    merged = {}
    for name in ("gate", "up"):
        if name in experts:
            kernel = experts[name]["kernel"]  # [E, in, f]
            merged[name] = {"kernel": kernel.swapaxes(0, 1).reshape(kernel.shape[1], -1)}
            if "bias" in experts[name]:
                merged[name]["bias"] = experts[name]["bias"].reshape(-1)
    down = experts["down"]["kernel"]
    merged["down"] = {"kernel": down.reshape(-1, down.shape[-1])}
    if "bias" in experts["down"]:
        merged["down"]["bias"] = jnp.sum(experts["down"]["bias"], axis=0)
    return merged
