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
from research.moe.dispatch import CapacityDispatch, Dispatch, SortedDispatch
from research.moe.grouped import in_one_call
from research.moe.grouped_ffn import (
    grouped_feed_forward,
    in_panels,
    kernel_feed_forward,
    kernel_suits,
    panels_feed_forward,
)
from research.moe.routing import wrong_number
from research.nn.linear import parameter
from research.nn.mlp import ACTIVATIONS, Activation
from research.nn.weights import Kernel


class ExpertWeights(nn.Module):
    """The parameters of E linear maps: {"kernel": [E, in, features]} and, with a bias, "bias" [E, features].

    Kernels are drawn as that of `Linear`. A kernel in the parameter tree may be structured (leaves stacked along
    the experts) or narrower than `features`. Raises `UserError` where the tree has another number of experts.
    """

    num_experts: int
    features: int
    use_bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, width: int) -> dict[str, Kernel]:
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "truncated_normal", batch_axis=(0,)
        )
        found = {"kernel": parameter(self, "kernel", init, (self.num_experts, width, self.features))}
        count = jax.tree.leaves(found)[0].shape[0]
        if count != self.num_experts:
            raise wrong_number("/".join(self.path), count, self.num_experts)
        if self.use_bias:
            shape = (self.num_experts, self.features)
            found["bias"] = parameter(self, "bias", nn.initializers.zeros, shape)
        return found


class ExpertLinear(ExpertWeights):
    """y = x W_e + b_e with the kernel of each row's expert: buffer [..., in] -> buffer [..., features]."""

    @nn.compact
    def __call__(self, dispatch: Dispatch, buffer: jax.Array) -> jax.Array:
        return affine(dispatch, buffer, ExpertWeights.__call__(self, buffer.shape[-1]))


class FeedForwardExperts(nn.Module):
    """E feed-forward networks of `hidden_dim` units: gated, down(act(gate x) * up x), or plain, down(act(up x)).

    Parameters: {gate, up, down}/{kernel, bias} as `ExpertWeights` has them, without `gate` where not gated.
    """

    num_experts: int
    hidden_dim: int
    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False

    @nn.compact
    def __call__(self, dispatch: Dispatch, buffer: jax.Array) -> jax.Array:
        width = buffer.shape[-1]
        shapes = {
            "gate": (width, self.hidden_dim),
            "up": (width, self.hidden_dim),
            "down": (self.hidden_dim, width),
        }
        params = {
            name: ExpertWeights(self.num_experts, outputs, self.use_bias, name=name)(inputs)
            for name, (inputs, outputs) in shapes.items()
            if self.gated or name != "gate"
        }
        return feed_forward(dispatch, buffer, params, self.activation)


def affine(dispatch: Dispatch, buffer: jax.Array, params: Mapping[str, Kernel]) -> jax.Array:
    """Buffer [..., in] through its experts' linear maps {"kernel", "bias"} -> buffer [..., out]."""
    buffer = dispatch.dot(buffer, params["kernel"])
    return dispatch.bias(buffer, params["bias"]) if "bias" in params else buffer


def feed_forward(
    dispatch: Dispatch, buffer: jax.Array, params: Mapping[str, Mapping[str, Kernel]], activation: Activation
) -> jax.Array:
    """Buffer [..., width] through its experts' FFNs {gate, up, down}/{kernel, bias} -> buffer [..., width]."""
    in_order = isinstance(dispatch, SortedDispatch) and dispatch.grouped_dot is None
    if in_order and in_panels(params, activation):
        return panels_feed_forward(buffer, params, dispatch.groups)
    if all(isinstance(leaf, jax.Array) for part in params.values() for leaf in part.values()):
        rows = buffer.reshape(-1, buffer.shape[-1])
        grouped = in_order or isinstance(dispatch, CapacityDispatch)
        kernel = grouped and in_one_call(rows, params["up"]["kernel"], dispatch.groups)
        if kernel and kernel_suits(params, activation):
            return kernel_feed_forward(rows, params, dispatch.groups).reshape(buffer.shape)
        if in_order and not kernel and dispatch.in_pieces:
            return grouped_feed_forward(buffer, params, dispatch.groups, dispatch.tile, activation)
    up, act = affine(dispatch, buffer, params["up"]), ACTIVATIONS[activation]
    hidden = act(affine(dispatch, buffer, params["gate"])) * up if "gate" in params else act(up)
    return affine(dispatch, hidden, params["down"])


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
