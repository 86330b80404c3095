"""From dense to mixture and back: functions from a model and its parameters to a model and its parameters.

`upcycle` (arXiv 2212.05055) makes every expert a copy of the layer's FFN and draws routers. A token's gates add up to
1, so the mixture computes what the dense model does, to the rounding of that sum, until training lets the copies, which
see different tokens, grow apart. `merge` makes fewer experts of many, each the mean of neighbours, or one dense FFN of
all: the inverse of `upcycle` as long as the copies are copies, and an approximation after that.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.moe.layer import MoE
from research.moe.routing import check_choices
from research.nn.mlp import MLP, GatedMLP
from research.nn.transformer import LayerStack

PyTree = Any


def upcycle(
    model: LayerStack, params: PyTree, num_experts: int, k: int, key: jax.Array, **fields: Any
) -> tuple[LayerStack, PyTree]:
    """Every FFN of the model as a mixture of `num_experts` copies, k for a token.

    fields: more of `MoE` (its balance loss, say). Raises `UserError` for a model whose FFNs are no `MLP` or `GatedMLP`,
    and for choices that `MoE` refuses.
    """
    check_choices(num_experts, k)

    def sparse(mlp: nn.Module) -> MoE:
        if isinstance(mlp, MoE):
            raise UserError(
                f"the model has {mlp.num_experts} experts a layer already, and more would change its outputs; merge "
                f"them to 1 first, or leave them"
            )
        if type(mlp) not in (MLP, GatedMLP):
            raise UserError(f"{type(mlp).__name__} can't be upcycled: only MLP and GatedMLP can")
        own = dict(hidden_dim=mlp.hidden_dim, activation=mlp.activation, use_bias=mlp.use_bias)
        return MoE(num_experts, k, gated=isinstance(mlp, GatedMLP), parent=None, **own, **fields)

    def copies(mlp: PyTree, number: int) -> PyTree:
        if "gate_up" in mlp:
            raise UserError("this FFN is fused for decoding (gate_up): upcycle it before `fuse_projections`")
        experts = {
            name: {leaf: _repeat(value, leaf, num_experts) for leaf, value in part.items()}
            for name, part in mlp.items()
        }
        leading, width = mlp["up"]["kernel"].shape[:-2], mlp["up"]["kernel"].shape[-2]
        draw = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", batch_axis=range(len(leading))
        )
        kernel = draw(jax.random.fold_in(key, number), (*leading, width, num_experts), jnp.float32)
        return {"router": {"kernel": kernel}, "experts": experts}

    return _convert(model, params, sparse, copies)


def merge(model: LayerStack, params: PyTree, num_experts: int) -> tuple[LayerStack, PyTree]:
    """Every mixture of the model with `num_experts` experts, each the mean of E / num_experts neighbours, as is its
    column of the router; with 1, a dense FFN.

    Raises `UserError` if the model has no mixture, or E does not divide, or one expert is left beside a shared one.
    """

    def fewer(mlp: nn.Module) -> nn.Module:
        if not isinstance(mlp, MoE):
            return mlp
        if num_experts < 1 or mlp.num_experts % num_experts:
            raise UserError(f"{mlp.num_experts} experts can't be merged into {num_experts} equal groups")
        if num_experts > 1:
            return mlp.clone(num_experts=num_experts, k=min(mlp.k, num_experts))
        if mlp.shared is not None or mlp.output_bias:
            raise UserError(
                "experts beside a shared expert or an output bias can't be merged into one dense FFN"
            )
        own = dict(hidden_dim=mlp.hidden_dim, activation=mlp.activation, use_bias=mlp.use_bias)
        return (GatedMLP if mlp.gated else MLP)(**own, parent=None)

    def means(mlp: PyTree, number: int) -> PyTree:
        if "experts" not in mlp:
            return mlp
        experts = {
            name: {leaf: _mean(value, leaf, num_experts) for leaf, value in part.items()}
            for name, part in mlp["experts"].items()
        }
        if num_experts == 1:
            return jax.tree.map_with_path(
                lambda path, value: jnp.squeeze(value, _axis(path[-1].key)), experts
            )
        router = {
            leaf: jnp.mean(value.reshape(*value.shape[:-1], num_experts, -1), axis=-1)
            for leaf, value in mlp["router"].items()
        }
        return {**mlp, "experts": experts, "router": router}

    if not any(isinstance(block.mlp, MoE) for block in model.blocks):
        raise UserError("the model has no mixture of experts, so there is nothing to merge")
    return _convert(model, params, fewer, means)


def _convert(
    model: LayerStack,
    params: PyTree,
    module: Callable[[nn.Module], nn.Module],
    tree: Callable[[PyTree, int], PyTree],
) -> tuple[LayerStack, PyTree]:
    """The model with `module` of every FFN, and the parameters with `tree` of every FFN's, unrolled or scanned."""
    blocks = tuple(block.clone(mlp=module(block.mlp)) for block in model.blocks)
    scanned = "layers" in params
    layers = params["layers"] if scanned else params
    converted = {
        name: {**layer, "mlp": tree(layer["mlp"], int(name.removeprefix("layer_")))}
        if name.startswith("layer_")
        else layer
        for name, layer in layers.items()
    }
    return model.clone(blocks=blocks), {**params, "layers": converted} if scanned else converted


def _axis(leaf: str) -> int:
    """Where the experts are in a kernel [..., E, in, out] or a bias [..., E, out]."""
    return -3 if leaf == "kernel" else -2


def _repeat(value: jax.Array, leaf: str, count: int) -> jax.Array:
    return jnp.repeat(jnp.expand_dims(value, _axis(leaf)), count, axis=_axis(leaf))


def _mean(value: jax.Array, leaf: str, groups: int) -> jax.Array:
    at = value.ndim + _axis(leaf)
    return jnp.mean(value.reshape(*value.shape[:at], groups, -1, *value.shape[at + 1 :]), axis=at + 1)
