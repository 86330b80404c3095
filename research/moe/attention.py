"""Mixture of attention heads as in JetMoE (arXiv 2404.07413, section 3.2; MoA, arXiv 2210.05144).

An attention expert is a query and an output projection; keys and values are shared by all experts. With H key heads
of width d, P = H d, and the k experts e_1 ... e_k of token n, weighed by g_1 ... g_k:

    q_nj = x_n Wq_(e_j)             H query heads a slot j, k H in all; Wq [E, D, P]
    K, V = x W_k, x W_v             [D, P] each, the same for every expert
    o_nj = attention(rotary(q_nj), rotary(K), V)         head i of every slot reads key head i
    y_n  = sum_j g_j o_nj Wo_(e_j) + b                    Wo [E, P, D], b [D]

One routing decision serves queries and outputs, and o_nj goes back to the expert that asked. A cache holds the
shared keys and values alone, 2 P numbers a token, however many experts there are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.moe.dispatch import Backend, Dispatch, make_dispatch
from research.moe.experts import ExpertLinear
from research.moe.layer import report_routing
from research.moe.losses import Balance
from research.moe.routing import Norm, Router, check_choices, route
from research.nn import cache as caches
from research.nn.attention import Context, attend, empty_cache
from research.nn.attention_kernels import (
    AttentionKernel,
    AutoAttention,
    AutoCachedAttention,
    CachedKernel,
)
from research.nn.linear import Linear, parameter
from research.nn.masks import Causal, MaskRule, Window
from research.nn.rotary import Rotary


class AttentionExperts(nn.Module):
    """The projections that experts own: query/kernel [E, width, inner] and output/kernel [E, inner, width]."""

    num_experts: int
    width: int
    inner: int

    def setup(self) -> None:
        self.query = ExpertLinear(self.num_experts, self.inner)
        self.output = ExpertLinear(self.num_experts, self.width)

    def queries(self, dispatch: Dispatch, x: jax.Array) -> jax.Array:
        """x [N, width] -> [N, k, inner], a row for every slot of a token."""
        return dispatch.gather_slots(self.query(dispatch, dispatch.scatter(x)))

    def outputs(self, dispatch: Dispatch, x: jax.Array, gate: jax.Array) -> jax.Array:
        """x [N, k, inner] of the slots -> [N, width], their outputs weighed by gate [N, k] and added."""
        return dispatch.combine(self.output(dispatch, dispatch.scatter_slots(x)), gate)


class MixtureOfAttention(nn.Module):
    """Attention whose queries and outputs are experts', with shared keys and values; a mixer of `Block`.

    Args:
        num_experts, k: E and k.
        num_kv_heads, head_dim: H and d; a token has k H query heads.
        rule: the mask rule, one for all heads.
        rotary: rotary embedding, or None.
        scale: factor of the scores, default head_dim ** -0.5.
        output_bias: b, one for all experts.
        kernel, cached_kernel: how the product is computed without a cache, and with one.
        cache_kind: how the tokens of a layer that sees all of them are kept, by default as they are.
        norm, dispatch, capacity_factor, noise, balance, balance_weight, z_weight: as of `research.moe.layer.MoE`.
            Queries of a slot that found no capacity are 0, and so is its output.

    Takes and returns what `research.nn.attention.Attention` does, reports what `MoE` reports, and leaves its
    `Routing` in mutable "intermediates".

    Parameters: router/kernel, experts/{query,output}/kernel, {key,value}/kernel, bias.
    """

    num_experts: int
    k: int
    num_kv_heads: int
    head_dim: int
    rule: MaskRule = Causal()
    rotary: Rotary | None = None
    scale: float | None = None
    output_bias: bool = True
    kernel: AttentionKernel = AutoAttention()
    cached_kernel: CachedKernel = AutoCachedAttention()
    cache_kind: caches.CacheKind | None = None
    norm: Norm = "topk_softmax"
    dispatch: Backend = "auto"
    capacity_factor: float | None = None
    noise: float = 0.0
    balance: Balance = "jetmoe"
    balance_weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self.num_experts, self.k)
        if isinstance(self.rule, Window) and not isinstance(self.rule.size, int):
            raise UserError(
                f"MixtureOfAttention.rule: {self.rule} has a span for every head, but heads change their expert "
                "from token to token; give one span for all"
            )

    @property
    def num_heads(self) -> int:
        """Query heads of a token."""
        return self.k * self.num_kv_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: caches.LayerCache | None = None
    ) -> tuple[jax.Array, caches.Fresh]:
        batch, length = context.positions.shape
        inner, heads = self.num_kv_heads * self.head_dim, (self.num_kv_heads, self.head_dim)
        flat = x.reshape(-1, x.shape[-1])
        mask = None if context.segments is None else context.segments.reshape(-1) > 0
        logits = Router(self.num_experts, noise=self.noise, name="router")(flat)
        routing = route(logits, self.k, norm=self.norm, mask=mask)
        self.sow("intermediates", "routing", routing)
        factor = self.capacity_factor if context.length is None else None
        dispatch = make_dispatch(routing, self.dispatch, factor, dtype=flat.dtype)
        experts = AttentionExperts(self.num_experts, x.shape[-1], inner, name="experts")
        # `attend` lets query heads i k ... i k + k - 1 read key head i: the slots of a token become neighbours,
        # instead of keys and values being tiled once for every slot.
        query = experts.queries(dispatch, flat).reshape(batch, length, self.k, *heads)
        query = query.swapaxes(2, 3).reshape(batch, length, self.num_heads, self.head_dim)
        key = Linear(inner, name="key")(flat).reshape(batch, length, *heads)
        value = Linear(inner, name="value")(flat).reshape(batch, length, *heads)
        out, fresh = attend(
            query,
            key,
            value,
            context,
            cache,
            rule=self.rule,
            rotary=self.rotary,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            kernel=self.kernel,
            cached_kernel=self.cached_kernel,
        )
        out = out.reshape(-1, self.num_kv_heads, self.k, self.head_dim).swapaxes(1, 2)
        y = experts.outputs(dispatch, out.reshape(-1, self.k, inner), routing.gate)
        if self.output_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)).astype(y.dtype)
        report_routing(
            self, routing, dispatch.dropped, batch, self.balance, self.balance_weight, self.z_weight
        )
        return y.reshape(x.shape), fresh

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> caches.LayerCache:
        """As `empty_cache`: of the shared keys and values."""
        sizes = (batch, capacity, margin, self.num_kv_heads, self.head_dim, dtype)
        return empty_cache(self.rule, *sizes, kind=self.cache_kind)
