"""Union of Experts: one MLP and one attention cut into slices that are routed to (arXiv 2503.02495).

Columns of W_1 with rows of W_2 are a slice of an MLP, heads with their rows of W_o a slice of attention, as in tensor
parallelism; the sum over all n slices is the dense block. Where every token chooses k of them, x_t goes through

    UoME(x_t) = sum_{e in topk(softmax(W_g x_t + b))} act(x_t W_1,e + b_1,e) W_2,e + b_2,e,   k / n of the work

and attention is `research.moe.selective_attention.SMHA`. Selected slices have the weight 1, so that all of them
together are the dense block; as no loss balances them either, nothing trains the released code's router.
`unit_straight_through` keeps the value and gives it the gradient of p / stop_gradient(p).

`to_union` cuts a trained dense model and `to_dense` merges it back: functions from tree to tree.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError, nearest
from research.moe.dispatch import Backend, Dispatch, make_dispatch
from research.moe.experts import FeedForwardExperts, merge_slices, slice_dense
from research.moe.layer import report_routing
from research.moe.routing import Router, Routing, check_choices, route
from research.moe.selection import (
    drop_gates,
    selection_dispatch,
    slot_count,
    slot_share,
    take,
)
from research.moe.selective_attention import SMHA, UnitGate, check_unit_gate
from research.nn import weights
from research.nn.attention import Attention, Context
from research.nn.mlp import MLP, Activation, GatedMLP
from research.nn.transformer import Block, LayerStack

Selection = Literal["token", "ranked", "sample"]
PyTree = Any


class UoME(nn.Module):
    """An MLP of n slices, k of which compute each token.

    Args:
        num_experts, k: n and k.
        hidden_dim: units of one slice; the dense MLP has n times as many.
        activation, gated, use_bias: of the slices, see `FeedForwardExperts`. Every slice has an output bias of its
            own, the dense MLP their sum.
        selection: "token": every token chooses its slices (data selection; looks at nothing ahead). "ranked": a slice
            takes of those that chose it the ones with the largest gates, capacity_factor k / n of a sequence (data
            selection of the released code; looks ahead). "sample": one gate for every sequence, of all its tokens side
            by side, so that all sequences are as long as the one the parameters were made for (expert selection).
        norm, balance_weight: as in `SMHA`.
        capacity_factor: with "token", slots of a slice over the k / n of a sequence's tokens that even routing needs,
            taken by the running rule of `research.moe.selection`; None leaves no token out. Where a cache is read
            nothing is left out: an MLP doesn't know how many tokens came before.
        dispatch: see `make_dispatch`; with a capacity, "capacity" or, as the oracle, "dense".

    Called with x [B, T, width] or [B * T, width] and the places of the tokens; padding gets 0. Reports as `SMHA`, and
    leaves its `Routing` in mutable "intermediates". Raises `UserError` where a cache is read and `selection` looks at
    the whole sequence.

    Parameters: router/{kernel,bias}, experts/{gate,up,down}/{kernel,bias}.
    """

    num_experts: int
    k: int
    hidden_dim: int
    activation: Activation = "gelu"
    gated: bool = False
    use_bias: bool = True
    selection: Selection = "token"
    norm: UnitGate = "unit_straight_through"
    balance_weight: float = 0.0
    capacity_factor: float | None = None
    dispatch: Backend = "auto"

    takes_context = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self.num_experts, self.k)
        check_unit_gate(self.norm, "UoME")
        if self.selection not in ("token", "ranked", "sample"):
            close = nearest(self.selection, ("token", "ranked", "sample"))
            hint = f"; did you mean {close!r}?" if close else ": use token, ranked or sample"
            raise UserError(f"UoME: selection={self.selection!r}{hint}")
        if self.selection == "ranked" and self.capacity_factor is None:
            raise UserError(
                "UoME: selection='ranked' ranks for slots: set capacity_factor (the released code: 1)"
            )
        if self.selection == "sample" and self.capacity_factor is not None:
            raise UserError(
                "UoME: selection='sample' gives slices whole sequences; it has no capacity_factor"
            )
        if self.capacity_factor is not None and self.dispatch == "sorted":
            raise UserError(
                "UoME: dispatch='sorted' leaves nothing out: drop capacity_factor or use 'capacity'"
            )

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        if context.length is not None and self.selection != "token":
            raise UserError(
                f"UoME: selection={self.selection!r} looks at the whole sequence and can't decode; use 'token'"
            )
        flat, (batch, length) = x.reshape(-1, x.shape[-1]), context.positions.shape
        real = None if context.segments is None else context.segments.reshape(-1) > 0
        if self.selection == "sample":
            routing = self._route_samples(flat, batch, real)
        else:
            routing = route(self._router(flat), self.k, norm=self.norm, mask=real)
        self.sow("intermediates", "routing", routing)
        routing, dispatch = self._dispatch(
            routing, batch, length, flat.dtype, decoding=context.length is not None
        )
        experts = FeedForwardExperts(
            self.num_experts, self.hidden_dim, self.activation, self.gated, self.use_bias, name="experts"
        )
        y = dispatch.combine(experts(dispatch, dispatch.scatter(flat)), routing.gate)
        report_routing(self, routing, dispatch.dropped, batch, "jetmoe", self.balance_weight, z_weight=0.0)
        return y.reshape(x.shape)

    def _router(self, x: jax.Array) -> jax.Array:
        return Router(self.num_experts, use_bias=True, name="router")(x)

    def _route_samples(self, x: jax.Array, batch: int, real: jax.Array | None) -> Routing:
        """The routing of the tokens x [N, width] when each sequence chooses for all of its own."""
        inputs = x if real is None else jnp.where(real[:, None], x, 0)
        inputs = inputs.reshape(batch, -1)
        if self.has_variable("params", "router"):
            wanted = self.get_variable("params", "router")["kernel"].shape[0]
            if wanted != inputs.shape[1]:
                width = x.shape[1]
                raise UserError(
                    f"UoME: selection='sample' was made for sequences of {wanted // width} tokens, got "
                    f"{inputs.shape[1] // width}"
                )
        routing = route(self._router(inputs), self.k, norm=self.norm)
        routing = jax.tree.map(lambda y: jnp.repeat(y, x.shape[0] // batch, axis=0), routing)
        if real is None:
            return routing
        return routing.replace(mask=real, gate=jnp.where(real[:, None], routing.gate, 0.0))

    def _dispatch(
        self, routing: Routing, batch: int, length: int, dtype: jnp.dtype, decoding: bool
    ) -> tuple[Routing, Dispatch]:
        if self.capacity_factor is None or decoding:
            backend = "auto" if decoding and self.dispatch == "capacity" else self.dispatch
            return routing, make_dispatch(routing, backend, dtype=dtype)
        share = slot_share(self.num_experts, self.k, self.capacity_factor)
        taken = take(routing, batch, share, ranked=self.selection == "ranked")
        slots = selection_dispatch(routing, taken, slot_count(length, share))
        routing = drop_gates(routing, taken)
        if self.dispatch == "dense":
            return routing, make_dispatch(routing, "dense").replace(dropped=slots.dropped)
        return routing, slots


def to_union(params: PyTree, num_experts: int, num_heads: int, key: jax.Array) -> PyTree:
    """A dense model's parameters as those of a union: slices of its MLPs, the same attention, and new routers.

    With all of them selected the model is the same. Unrolled or scanned layers; structured kernels of MLPs are
    materialised. Raises `UserError` where the hidden units don't divide, or projections are fused.
    """

    def convert(layer: PyTree, key: jax.Array) -> PyTree:
        mlp, attention = layer["mlp"], layer["attention"]
        if "gate_up" in mlp:
            raise UserError(
                "this FFN is fused for decoding (gate_up): make a union of it before `fuse_projections`"
            )
        mlp = {name: part | {"kernel": weights.materialize(part["kernel"])} for name, part in mlp.items()}
        x = jnp.zeros((1, mlp["down"]["kernel"].shape[-1]))
        mlp_router, head_router = (
            Router(count, use_bias=True).init(k, x)["params"]
            for count, k in zip((num_experts, num_heads), jax.random.split(key), strict=True)
        )
        mlp = {"router": mlp_router, "experts": slice_dense(mlp, num_experts)}
        return {**layer, "mlp": mlp, "attention": {**attention, "router": head_router}}

    return _each_layer(params, convert, key)


def to_dense(params: PyTree) -> PyTree:
    """The inverse of `to_union`: the dense model that selects everything. The routers are forgotten."""

    def convert(layer: PyTree, _: jax.Array) -> PyTree:
        attention = {name: part for name, part in layer["attention"].items() if name != "router"}
        return {**layer, "mlp": merge_slices(layer["mlp"]["experts"]), "attention": attention}

    return _each_layer(params, convert, jax.random.key(0))


def _each_layer(params: PyTree, convert: Callable[[PyTree, jax.Array], PyTree], key: jax.Array) -> PyTree:
    if "layers" not in params:
        names = [name for name in params if name.startswith("layer_")]
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        return {n: convert(value, keys[n]) if n in keys else value for n, value in params.items()}
    layers = {}
    for name, layer in params["layers"].items():
        key, own = jax.random.split(key)
        keys = jax.random.split(own, jax.tree.leaves(layer)[0].shape[0])
        layers[name] = jax.vmap(convert)(layer, keys)
    return {**params, "layers": layers}


def union_model(model: LayerStack, num_experts: int, k: int, k_heads: int, **options: Any) -> LayerStack:
    """The module that `to_union` fits: k of num_experts MLP slices and k_heads of the heads for every token.

    options: fields that `SMHA` and `UoME` share (`norm`, `balance_weight`, `capacity_factor`). Raises `UserError` for
    blocks that can't be cut: key heads that several query heads share, norms of queries or keys, other FFNs.
    """

    def convert(block: Block) -> Block:
        attention, mlp = block.attention, block.mlp
        if not isinstance(attention, Attention) or not isinstance(mlp, MLP | GatedMLP):
            found = type(mlp if isinstance(attention, Attention) else attention).__name__
            raise UserError(f"a union is made of Attention with MLP or GatedMLP, not of {found}")
        if attention.kv_heads != attention.num_heads:
            raise UserError(
                f"num_kv_heads={attention.kv_heads}: heads that share keys can't be selected one by one"
            )
        for name in ("query_norm", "key_norm", "scale", "softcap"):
            if getattr(attention, name) is not None:
                raise UserError(f"SMHA has no {name}, which this attention has")
        if mlp.hidden_dim % num_experts:
            raise UserError(
                f"the FFN's {mlp.hidden_dim} hidden units do not divide into {num_experts} experts"
            )
        same = (
            "num_heads",
            "head_dim",
            "rule",
            "rotary",
            "use_bias",
            "output_bias",
            "kernel",
            "cached_kernel",
        )
        heads = SMHA(k=k_heads, **{name: getattr(attention, name) for name in same}, **options)
        slices = UoME(
            num_experts,
            k,
            mlp.hidden_dim // num_experts,
            mlp.activation,
            gated=isinstance(mlp, GatedMLP),
            use_bias=mlp.use_bias,
            **options,
        )
        return block.clone(attention=heads, mlp=slices)

    return model.clone(blocks=tuple(convert(block) for block in model.blocks))


def dense_model(model: LayerStack) -> LayerStack:
    """The module that `to_dense` fits."""

    def convert(block: Block) -> Block:
        heads, slices = block.attention, block.mlp
        if not isinstance(heads, SMHA) or not isinstance(slices, UoME):
            found = type(slices if isinstance(heads, SMHA) else heads).__name__
            raise UserError(f"only a union of SMHA and UoME is merged, not {found}")
        same = (
            "num_heads",
            "head_dim",
            "rule",
            "rotary",
            "use_bias",
            "output_bias",
            "kernel",
            "cached_kernel",
        )
        attention = Attention(**{name: getattr(heads, name) for name in same})
        cls = GatedMLP if slices.gated else MLP
        mlp = cls(slices.num_experts * slices.hidden_dim, slices.activation, slices.use_bias)
        return block.clone(attention=attention, mlp=mlp)

    return model.clone(blocks=tuple(convert(block) for block in model.blocks))
