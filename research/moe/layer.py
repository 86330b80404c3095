"""Sparse mixture of experts as an FFN (arXiv 1701.06538; top-k of softmax gates as in 2401.04088).

    y = sum_{e in top-k(W_r x)} gate_e(x) FFN_e(x)   [+ the output of experts that every token shares]

Router, dispatch and experts are separate pieces; this module joins them and reports its losses and its load.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.moe import losses
from research.moe.dispatch import Backend, check_dispatch, make_dispatch
from research.moe.experts import FeedForwardExperts
from research.moe.grouped import PallasGroupedDot
from research.moe.losses import Balance
from research.moe.routing import Norm, Ranks, Router, Routing, check_choices, route
from research.nn.attention import Context
from research.nn.linear import Linear, parameter
from research.nn.mlp import Activation
from research.nn.panels import holds_stacked_panels
from research.nn.reports import report_loss, report_measurement


class MoE(nn.Module):
    """k of E experts for every token.

    Args:
        num_experts, k: E and k.
        hidden_dim, activation, gated, use_bias: of every expert, see `FeedForwardExperts`.
        norm: gate normalisation, see `route`.
        ranks: which places of a token's order of preference are taken, see `route`; default the first k.
            "random" draws from the rng stream "routing", by layer and place.
        dispatch, capacity_factor, grouped_dot: see `make_dispatch`. Where a cache is read, nothing is ever dropped:
            what a token becomes must not depend on what is decoded beside it.
        noise, router_bias: of the `Router`.
        balance, balance_weight: a balance loss and its weight; weight 0 has none. One per sequence and averaged
            for "gshard" and "mole".
        z_weight: weight of the router's z-loss (1e-3 is usual); 0 has none.
        shared: an FFN that every token goes through beside its experts, x -> y; or None.
        gate_shared: weigh its output by sigmoid(x w) (Qwen 2 MoE).
        output_bias: one bias [width] on the sum (JetMoE).

    Called with x [B, T, width] or [B * T, width] and the places of the tokens; padding (segment 0) is not
    routed, and gets 0 from the experts. Reports losses `balance` and `router_z`, and measurements: `load` (share
    of the choices, f32[E]), `max_over_mean` load, router `entropy` (nats), `dropped` (share of the choices),
    `router_non_finite` (share of the logits). With mutable "intermediates" it also leaves its `Routing` there.

    Parameters: router/{kernel,bias}, experts/{gate,up,down}/{kernel,bias}, shared/..., shared_gate/kernel, bias.
    """

    num_experts: int
    k: int
    hidden_dim: int
    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False
    norm: Norm = "topk_softmax"
    ranks: Ranks | None = None
    dispatch: Backend = "auto"
    capacity_factor: float | None = None
    grouped_dot: PallasGroupedDot | None = None
    noise: float = 0.0
    router_bias: bool = False
    balance: Balance = "jetmoe"
    balance_weight: float = 0.01
    z_weight: float = 0.0
    shared: nn.Module | None = None
    gate_shared: bool = False
    output_bias: bool = False

    takes_context = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self.num_experts, self.k)
        check_dispatch(self.dispatch, self.capacity_factor, self.grouped_dot)
        if self.gate_shared and self.shared is None:
            raise UserError("MoE: gate_shared weighs the output of `shared`, and there is none")

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        mask = None if context.segments is None else context.segments.reshape(-1) > 0
        logits = Router(self.num_experts, self.router_bias, self.noise, name="router")(flat)
        keys = None
        if self.ranks == "random":
            # By place, so that decoding step by step routes as the whole sequence does.
            fold = jax.vmap(functools.partial(jax.random.fold_in, self.make_rng("routing")))
            keys = fold(context.positions.reshape(-1))
        routing = route(logits, self.k, norm=self.norm, ranks=self.ranks, mask=mask, key=keys)
        self.sow("intermediates", "routing", routing)
        experts = FeedForwardExperts(
            self.num_experts, self.hidden_dim, self.activation, self.gated, self.use_bias, name="experts"
        )
        placed = self.get_variable("params", "experts") if self.has_variable("params", "experts") else None
        if hasattr(placed, "run"):  # the tree says where its experts are: see research.moe.placement
            experts = experts.clone(parent=None, name=None)
            y, dropped, measured = placed.run(routing, flat, context.store["experts"], experts)
            for name, (total, weight) in measured.items():
                report_measurement(self, name, total, weight)
        else:
            decoding = context.length is not None
            backend = "auto" if decoding and self.dispatch == "capacity" else self.dispatch
            factor = None if decoding else self.capacity_factor
            dispatch = make_dispatch(
                routing,
                backend,
                factor,
                self.grouped_dot,
                blocks=not holds_stacked_panels(placed),
                dtype=flat.dtype,
            )
            y = dispatch.combine(experts(dispatch, dispatch.scatter(flat)), routing.gate)
            dropped = dispatch.dropped
        if self.output_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)).astype(y.dtype)
        if self.shared is not None:
            y = y + self._shared(flat)
        report_routing(
            self,
            routing,
            dropped,
            context.positions.shape[0],
            self.balance,
            self.balance_weight,
            self.z_weight,
        )
        return y.reshape(x.shape)

    def _shared(self, x: jax.Array) -> jax.Array:
        y = self.shared(x)
        if self.gate_shared:
            y = y * jax.nn.sigmoid(Linear(1, name="shared_gate")(x))
        return y


def report_routing(
    module: nn.Module,
    routing: Routing,
    dropped: jax.Array,
    sequences: int,
    balance: Balance,
    balance_weight: float,
    z_weight: float,
) -> None:
    """The losses and measurements of a layer that routes, as `MoE` lists them; it routed `sequences` sequences."""
    if balance_weight:
        report_loss(module, "balance", balance_weight * losses.balance_loss(routing, balance, sequences))
    if z_weight:
        report_loss(module, "router_z", z_weight * losses.router_z_loss(routing))
    counts = losses.load(routing)
    total, tokens, one = jnp.sum(counts), jnp.sum(routing.mask, dtype=jnp.float32), jnp.float32(1)
    report_measurement(module, "load", counts, total)
    report_measurement(module, "max_over_mean", losses.max_over_mean(counts), one)
    report_measurement(module, "entropy", losses.entropy(routing), tokens)
    report_measurement(module, "dropped", dropped, total)
    bad = jnp.sum(~jnp.isfinite(routing.logits), dtype=jnp.float32)
    report_measurement(module, "router_non_finite", bad, jnp.float32(routing.logits.size))
