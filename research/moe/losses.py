"""Balance losses, router z-loss and measurements: pure functions of a `Routing`.

Padding counts nowhere. Sums are float32 and run over all tokens of the call, which under `jit` are those of the
global batch however it is divided; with accumulation every microbatch has its own loss.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from research.errors import UserError, nearest
from research.moe.routing import Routing

Balance = Literal["switch", "jetmoe", "gshard", "mole", "importance"]
BALANCES = get_args(Balance)


def load(routing: Routing) -> jax.Array:
    """How many choices fell on each expert, f32[E]; they add up to k times the real tokens."""
    return jnp.sum(_chosen(routing), axis=0)


def balance_loss(routing: Routing, kind: Balance = "jetmoe", groups: int = 1) -> jax.Array:
    """The loss f32[] that keeps experts equally loaded.

    With P_e the mean probability of expert e and f_e its share of the choices, which has no gradient:
      switch       E sum_e f_e P_e over the first choices (arXiv 2101.03961, equation 4); 1 in balance
      jetmoe       the same over all k choices, f_e of which sum to 1 (arXiv 2404.07413); 1 in balance
      gshard       `switch` of every group of tokens, averaged over the groups (arXiv 2006.16668, algorithm 1)
      mole         `gshard` without the factor E (arXiv 2401.16160, equation 5); 1 / E in balance
      importance   squared coefficient of variation of P over the experts (arXiv 1701.06538, equation 7); 0
    groups: into how many equal runs of tokens the N are cut, for gshard and mole: one per sequence.

    Raises `UserError` for an unknown kind.
    """
    if kind == "importance":
        mean = _mean(routing.probs, routing.mask)
        return jnp.var(mean) / jnp.square(jnp.mean(mean))
    if kind == "jetmoe":
        counts = load(routing)
        return _product(counts / jnp.maximum(jnp.sum(counts), 1.0), _mean(routing.probs, routing.mask))
    first = routing.replace(index=routing.index[:, :1])
    if kind == "switch":
        return _product(_mean(_chosen(first), first.mask), _mean(first.probs, first.mask))
    if kind in ("gshard", "mole"):
        chosen, probs, mask = (_grouped(y, groups) for y in (_chosen(first), first.probs, first.mask))
        share, mean = jax.vmap(_mean)(chosen, mask), jax.vmap(_mean)(probs, mask)
        real = jnp.any(mask, axis=1)
        each = jax.vmap(_product)(share, mean) / (1 if kind == "gshard" else routing.num_experts)
        return jnp.sum(each * real) / jnp.maximum(jnp.sum(real), 1)
    close = nearest(kind, BALANCES)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(BALANCES)}"
    raise UserError(f"balance={kind!r}: no such balance loss; {hint}")


def router_z_loss(routing: Routing) -> jax.Array:
    """The mean of logsumexp(logits)^2, f32[] (arXiv 2202.08906, equation 5)."""
    return _mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), routing.mask)


def entropy(routing: Routing) -> jax.Array:
    """Sum over the real tokens of the entropy of their router, nats f32[]; log E where it does not care."""
    nats = -jnp.sum(jax.scipy.special.xlogy(routing.probs, routing.probs), axis=-1)
    return jnp.sum(jnp.where(routing.mask, nats, 0.0))


def max_over_mean(counts: jax.Array) -> jax.Array:
    """counts [..., E] -> the load of the fullest expert over the mean load [...]; 1 in balance, at most E."""
    return jnp.max(counts, axis=-1) / jnp.maximum(jnp.mean(counts, axis=-1), 1e-9)


def variation(counts: jax.Array) -> jax.Array:
    """counts [..., E] -> coefficient of variation of the load [...]; 0 in balance."""
    return jnp.std(counts, axis=-1) / jnp.maximum(jnp.mean(counts, axis=-1), 1e-9)


def agreement(routing: Routing, other: Routing) -> jax.Array:
    """The share f32[] of the choices of real tokens that `other`, of the same tokens, has made as well.

    Between checkpoints: how settled a router is. Between layers or seeds it means nothing, as experts have no
    order.
    """
    same = jnp.any(routing.index[:, :, None] == other.index[:, None, :], axis=-1)
    return _mean(jnp.mean(same, axis=-1), routing.mask)


def mutual_information(routing: Routing, labels: jax.Array, num_labels: int) -> jax.Array:
    """Nats f32[] that a choice tells about the token's label, int32[N]: 0 where experts don't specialise."""
    chosen = _chosen(routing)
    joint = jax.ops.segment_sum(chosen, labels, num_labels)
    joint = joint / jnp.maximum(jnp.sum(joint), 1.0)
    apart = jnp.sum(joint, axis=0, keepdims=True) * jnp.sum(joint, axis=1, keepdims=True)
    return jnp.sum(jax.scipy.special.xlogy(joint, joint) - jax.scipy.special.xlogy(joint, apart))


def _chosen(routing: Routing) -> jax.Array:
    """f32[N, E]: 1 where the token chose the expert."""
    chosen = jax.nn.one_hot(routing.index, routing.num_experts, dtype=jnp.float32).sum(axis=1)
    return jnp.where(routing.mask[:, None], chosen, 0.0)


def _mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of x [N, ...] over the real tokens; 0 where there are none."""
    shaped = mask.reshape(mask.shape + (1,) * (x.ndim - 1))
    return jnp.sum(jnp.where(shaped, x, 0.0), axis=0) / jnp.maximum(jnp.sum(mask), 1)


def _product(share: jax.Array, mean: jax.Array) -> jax.Array:
    return share.shape[0] * jnp.sum(jax.lax.stop_gradient(share) * mean)


def _grouped(x: jax.Array, groups: int) -> jax.Array:
    return x.reshape(groups, -1, *x.shape[1:])
