"""Routing: which experts a token goes to, and how their outputs are weighed.

A router gives float32 logits; `route` picks k experts a token from them and says the gates. What becomes of the
choice (losses, dispatch, experts) is elsewhere: this file knows neither experts nor how tokens travel.

N tokens, E experts, k choices a token. Padding is told by a mask: such tokens have gates of 0, and everything
that counts or dispatches leaves them out.
"""

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError, nearest
from research.nn import weights
from research.nn.linear import parameter

Norm = Literal["topk_softmax", "softmax_topk_renorm", "softmax_topk", "unit", "unit_straight_through"]
Ranks = tuple[int, ...] | Literal["random"]

NORMS = get_args(Norm)
UNIT_SUM_NORMS = ("topk_softmax", "softmax_topk_renorm")  # gates of a token add up to 1


class Routing(struct.PyTreeNode):
    """The choice of every token.

    logits f32[N, E]; probs f32[N, E], their softmax; index i32[N, k], the experts in falling order of the logits;
    gate f32[N, k], their weights (0 for padding); mask bool[N], the real tokens.
    """

    logits: jax.Array
    probs: jax.Array
    index: jax.Array
    gate: jax.Array
    mask: jax.Array

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def k(self) -> int:
        return self.index.shape[-1]


def route(
    logits: jax.Array,
    k: int,
    *,
    norm: Norm = "topk_softmax",
    ranks: Ranks | None = None,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Routing:
    """Choose experts from router logits [N, E].

    Args:
        k: experts a token.
        norm: how gates come from logits z. `softmax_topk`: softmax over all E, at the chosen (V-MoE, Switch,
            OLMoE); `softmax_topk_renorm`: divided by their sum; `topk_softmax`: softmax over the chosen logits
            alone (JetMoE, Mixtral), the same but for rounding; `unit`: 1, through which the router gets no
            gradient (UoE, LLaVA-MoLE); `unit_straight_through`: p / stop_gradient(p), 1 with a gradient.
        ranks: the places of the chosen experts in the token's order of preference, 0 the best; default 0 ... k-1.
            (1,) is the weak pass of SCMoE. "random": one expert a token, uniformly, which needs `key`: one, or one a
            token [N].
        mask: bool[N], False for padding; default: all tokens are real.

    Among equal logits the expert of the lower number comes first, as in `lax.top_k`.
    Raises `UserError` for a k or ranks outside the experts, or an unknown norm.
    """
    count = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    index = _choose(jax.lax.stop_gradient(logits), k, count, ranks, key)
    mask = jnp.ones(logits.shape[:-1], bool) if mask is None else mask
    gate = jnp.where(mask[..., None], _gates(logits, probs, index, norm), 0.0)
    return Routing(logits, probs, index, gate, mask)


def _choose(logits: jax.Array, k: int, count: int, ranks: Ranks | None, key: jax.Array | None) -> jax.Array:
    check_choices(count, k)
    if ranks is None:
        return jax.lax.top_k(logits, k)[1]
    if ranks == "random":
        if key is None:
            raise UserError('ranks="random" needs a key')
        if key.ndim:
            return jax.vmap(lambda k: jax.random.randint(k, (1,), 0, count))(key)
        return jax.random.randint(key, (*logits.shape[:-1], 1), 0, count)
    if not ranks or len(set(ranks)) < len(ranks) or min(ranks) < 0 or max(ranks) >= count:
        raise UserError(
            f"ranks={tuple(ranks)}: ranks are different and lie in 0..{count - 1}, one per expert"
        )
    return jax.lax.top_k(logits, max(ranks) + 1)[1][..., jnp.array(ranks)]


def _gates(logits: jax.Array, probs: jax.Array, index: jax.Array, norm: Norm) -> jax.Array:
    chosen = jnp.take_along_axis(probs, index, axis=-1)
    if norm == "softmax_topk":
        return chosen
    if norm == "softmax_topk_renorm":
        # A rank far behind may have a probability of 0.
        return chosen / jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    if norm == "topk_softmax":
        return jax.nn.softmax(jnp.take_along_axis(logits, index, axis=-1), axis=-1)
    if norm == "unit":
        return jnp.ones_like(chosen)
    if norm == "unit_straight_through":
        log = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), index, axis=-1)
        return 1.0 + (log - jax.lax.stop_gradient(log))  # d log p = dp / p
    close = nearest(norm, NORMS)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(NORMS)}"
    raise UserError(f"norm={norm!r}: no such gate normalisation; {hint}")


def check_choices(num_experts: int, k: int) -> None:
    """Raise `UserError` unless k of `num_experts` experts can be chosen."""
    if num_experts < 1:
        raise UserError(f"num_experts={num_experts}: there must be at least 1 expert")
    if not 1 <= k <= num_experts:
        raise UserError(f"k={k}: a token goes to between 1 and all {num_experts} experts (num_experts)")


def expert_choice(
    probs: jax.Array, capacity: int, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Experts choose tokens: the `capacity` most probable tokens of every sequence (arXiv 2202.09368).

    probs f32[B, S, E], mask bool[B, S] (False: padding, never chosen with a gate) -> index i32[B, E, C] of
    tokens in their order of preference, gate f32[B, E, C]. A choice looks at the whole sequence, so in a causal
    model it leaks the future. Raises `UserError` for a capacity outside 1..S.
    """
    length = probs.shape[1]
    if not 1 <= capacity <= length:
        raise UserError(
            f"capacity={capacity}: an expert takes between 1 and all {length} tokens of a sequence"
        )
    if mask is not None:
        probs = jnp.where(mask[..., None], probs, 0.0)
    gate, index = jax.lax.top_k(probs.swapaxes(1, 2), capacity)
    return index, gate


class Router(nn.Module):
    """Linear router: x [N, D] -> float32 logits [N, E], whatever the dtype of x.

    noise: standard deviation of normal noise on the logits, added where `apply` is given a "dropout" key, that
    is in training. Parameters: kernel [D, E], bias [E].
    """

    num_experts: int
    use_bias: bool = False
    noise: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = parameter(self, "kernel", init, (x.shape[-1], self.num_experts))
        if kernel.shape[-1] != self.num_experts:
            raise wrong_number("/".join(self.path), kernel.shape[-1], self.num_experts)
        logits = weights.dot(x.astype(jnp.float32), kernel)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.num_experts,))
            logits = logits + bias.astype(jnp.float32)
        if self.noise and self.has_rng("dropout"):
            logits = logits + self.noise * jax.random.normal(self.make_rng("dropout"), logits.shape)
        return logits


def wrong_number(path: str, found: int, wanted: int) -> UserError:
    """The error of parameters with another number of experts than the model's."""
    return UserError(
        f"{path}: the parameters have {found} experts, the model {wanted}; give the model num_experts={found}, or "
        f"merge or upcycle them: python -m experiments.upcycle CHECKPOINT --experts={wanted} --output=DIRECTORY"
    )
