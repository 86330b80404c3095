"""Data selection: of the tokens that chose an expert, which it takes, and how they get there and back.

In Union of Experts (arXiv 2503.02495) every token chooses k of n experts, and an expert computes the tokens that
chose it, sequence by sequence and in their order. Under a fixed shape an expert has S slots a sequence, and where
more chose it some are left out. Two rules say which:

  running   an expert holds at most ceil(share (t + 1)) of the first t + 1 tokens: whether token t is taken depends
            on nothing behind it, and not on the length of the sequence either, so decoding agrees with training;
  ranked    the S tokens with the largest gates, which looks at the whole sequence: for encoders.

B sequences of T tokens, N = B T; n experts; k choices a token; S slots an expert and sequence.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.moe.dispatch import CapacityDispatch
from research.moe.routing import Routing, expert_choice


def slot_share(num_experts: int, k: int, capacity_factor: float | None) -> float:
    """The share of a sequence's tokens for which an expert has slots: factor k / n, and all for a factor of None.

    At a factor of 1 the experts have just the slots that evenly spread choices need.
    """
    if capacity_factor is None:
        return 1.0
    if not capacity_factor > 0:
        raise UserError(f"capacity_factor={capacity_factor}: must be positive, or None to leave no token out")
    return min(1.0, capacity_factor * k / num_experts)


def slot_count(length: int, share: float) -> int:
    """S = ceil(share T), in the float32 arithmetic of `_allowed`."""
    return int(math.ceil(np.float32(share) * np.float32(length)))


def _allowed(position: jax.Array, share: float) -> jax.Array:
    """How many of the tokens up to `position` an expert may hold, int32 of the same shape."""
    return jnp.ceil(jnp.float32(share) * (position + 1).astype(jnp.float32)).astype(jnp.int32)


def chosen_experts(routing: Routing, batch: int) -> jax.Array:
    """bool[B, T, n]: the choices of the real tokens."""
    chosen = jax.nn.one_hot(routing.index, routing.num_experts, dtype=jnp.bool_).any(axis=1)
    return (chosen & routing.mask[:, None]).reshape(batch, -1, routing.num_experts)


def take(routing: Routing, batch: int, share: float, ranked: bool) -> jax.Array:
    """bool[B, T, n]: the tokens each expert takes, at most `slot_count` a sequence."""
    chosen = chosen_experts(routing, batch)
    if share >= 1.0:
        return chosen
    if ranked:
        return _take_ranked(chosen, routing.probs.reshape(chosen.shape), share)
    return _take_running(chosen, share)


def _take_running(chosen: jax.Array, share: float) -> jax.Array:
    # held_t = min(held_(t-1) + chosen_t, allowed_t) unrolled: with S_t the choices up to t, held_t is the smaller
    # of S_t and, over all s <= t, of allowed_s + S_t - S_s.
    total = jnp.cumsum(chosen.astype(jnp.int32), axis=1)
    room = _allowed(jnp.arange(chosen.shape[1]), share)[:, None] - total
    held = total + jnp.minimum(jax.lax.cummin(room, axis=1), 0)
    before = jnp.pad(held[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return held > before


def _take_ranked(chosen: jax.Array, probs: jax.Array, share: float) -> jax.Array:
    batch, length, count = chosen.shape
    index, gate = expert_choice(jnp.where(chosen, probs, -1.0), slot_count(length, share))
    experts = jnp.arange(count)[None, :, None]
    return jnp.zeros_like(chosen).at[_rows(batch), index, experts].set(gate >= 0.0)


def take_behind(
    chosen: jax.Array, held: jax.Array, positions: jax.Array, tree: jax.Array, share: float
) -> tuple[jax.Array, jax.Array]:
    """The running rule for the nodes of a tree behind a prefix.

    chosen bool[B, N, n]; held int32[B, n], how many tokens of the prefix each expert holds; positions int32[B, N] in
    the sequence; tree bool[b, N, N], ancestors and itself. -> taken bool[B, N, n], and before int32[B, N, n], how
    many tokens the expert holds of the prefix and the node's ancestors.
    """
    ancestors = tree & ~jnp.eye(tree.shape[-1], dtype=bool)
    added = chosen.astype(jnp.int32)
    along = jnp.sum(jnp.where(ancestors[..., None], added[:, None], 0), axis=2)  # over strict ancestors
    if share >= 1.0:
        return chosen, held[:, None] + along
    allowed = _allowed(positions, share)[..., None]
    room = jnp.where(ancestors[..., None], (allowed - along - added)[:, None], held[:, None, None])
    before = along + jnp.minimum(jnp.min(room, axis=2), held[:, None])
    return chosen & (before < allowed), before


def selection_dispatch(routing: Routing, taken: jax.Array, slots: int) -> CapacityDispatch:
    """The dispatch of taken bool[B, T, n] (at most `slots` a sequence): buffer [n, B S, width], an expert's slots of
    one sequence side by side and its tokens there in order, the empty slots last.
    """
    batch, length, count = taken.shape
    tokens, k = routing.index.shape
    order = jnp.sort(jnp.where(taken, jnp.arange(length)[None, :, None], length), axis=1)[
        :, :slots
    ]  # [B, S, n]
    token = jnp.where(order < length, order + _rows(batch) * length, tokens)
    token = token.transpose(2, 0, 1).reshape(count, -1)  # [n, B S]
    choices = jnp.take(routing.index, token, axis=0, mode="fill", fill_value=count)  # [n, B S, k]
    choice = jnp.argmax(choices == jnp.arange(count)[:, None, None], axis=-1)
    pair_of_slot = jnp.where(token < tokens, token * k + choice, tokens * k).reshape(-1)
    slot = number_taken(taken) + _rows(batch) * slots + jnp.arange(count) * (batch * slots)
    slot = jnp.where(taken, slot, count * batch * slots).reshape(-1, count)
    chosen = jnp.sum(chosen_experts(routing, batch), axis=(0, 1), dtype=jnp.float32)
    return CapacityDispatch(
        pair_of_slot.astype(jnp.int32),
        jnp.take_along_axis(slot, routing.index, axis=1).astype(jnp.int32),
        chosen,
        jnp.sum(chosen) - jnp.sum(taken, dtype=jnp.float32),
    )


def number_taken(taken: jax.Array) -> jax.Array:
    """int32[B, T, n]: the number of each token, from 0, among those of its sequence that an expert takes."""
    return jnp.cumsum(taken.astype(jnp.int32), axis=1) - 1


def token_of_slot(dispatch: CapacityDispatch) -> jax.Array:
    """int32[n, B S]: the token in each slot, N in empty ones."""
    tokens = dispatch.pair_of_slot // dispatch.slot_of_pair.shape[1]
    return tokens.reshape(dispatch.counts.shape[0], -1)


def drop_gates(routing: Routing, taken: jax.Array) -> Routing:
    """The same routing with gates of 0 where an expert did not take the token."""
    flat = taken.reshape(-1, taken.shape[-1])
    return routing.replace(
        gate=jnp.where(jnp.take_along_axis(flat, routing.index, axis=1), routing.gate, 0.0)
    )


def gate_of_expert(routing: Routing) -> jax.Array:
    """f32[N, n]: every expert's gate, 0 where it was not chosen."""
    chosen = jax.nn.one_hot(routing.index, routing.num_experts, dtype=jnp.float32)
    return jnp.einsum("nke,nk->ne", chosen, routing.gate)


def _rows(batch: int) -> jax.Array:
    return jnp.arange(batch)[:, None, None]
