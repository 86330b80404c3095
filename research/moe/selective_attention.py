"""SMHA: attention whose heads see only the tokens routed to them (Union of Experts, arXiv 2503.02495).

A router sends every token to k of the n heads. Head i projects its tokens alone, attends among them, and adds its
output where they came from; a token that head i did not select is for it neither query nor key:

    y = sum_i scatter_i( softmax(Q_i K_i^T / sqrt(d)) V_i W_o,i ),   Q_i, K_i, V_i = gather_i(x) W_q,i, W_k,i, W_v,i

With S slots a head for the T tokens of a sequence this costs S / T of the projections and (S / T)^2 of the scores.
The parameters are those of `research.nn.attention.Attention`, cut by heads, and a router; with k = n it is that
attention. The released code gives selected heads the weight 1 (`unit`), through which the router never learns.
"""

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.errors import UserError
from research.moe.dispatch import batched_dot
from research.moe.layer import report_routing
from research.moe.routing import Router, Routing, check_choices, route
from research.moe.selection import (
    chosen_experts,
    drop_gates,
    gate_of_expert,
    number_taken,
    selection_dispatch,
    slot_count,
    slot_share,
    take,
    take_behind,
    token_of_slot,
)
from research.nn import weights
from research.nn.attention import Context
from research.nn.attention_kernels import AttentionKernel, AutoAttention, AutoCachedAttention, CachedKernel
from research.nn.compute_once import compute_once
from research.nn.linear import Linear
from research.nn.masks import Causal, Full
from research.nn.rotary import Rotary, rotate

UnitGate = Literal["unit", "unit_straight_through"]
# Key and value [B, n, P, d] of new tokens, and which of them each head takes, bool[B, n, P, 1].
Rows = tuple[jax.Array, jax.Array, jax.Array]

_NO_TOKEN = np.iinfo(np.int32).max


class SelectiveCache(struct.PyTreeNode):
    """The `LayerCache` of SMHA: every head keeps its own tokens only, in order.

    Slot j of head h holds its j-th token: key, value [B, n, slots, d], and its number in the sequence, token
    int32[B, n, slots]. An empty slot has the largest number there is.
    """

    key: jax.Array
    value: jax.Array
    token: jax.Array

    @classmethod
    def empty(cls, batch: int, slots: int, heads: int, head_dim: int, dtype: jnp.dtype) -> "SelectiveCache":
        rows = jnp.zeros((batch, heads, slots, head_dim), dtype)
        return cls(rows, rows, jnp.full((batch, heads, slots), _NO_TOKEN, jnp.int32))

    def read(self, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """-> key, value, token and valid bool[B, n, slots], those of each head."""
        return self.key, self.value, self.token, self.token < length[:, None, None]

    def append(self, fresh: Rows, length: jax.Array, count: jax.Array) -> "SelectiveCache":
        """As `LayerCache.append`; what a head does not take is not written."""
        key, value, taken = fresh
        batch, heads, slots = self.token.shape
        number = jnp.arange(key.shape[2])
        taken = taken[..., 0] & (number < count[:, None, None])
        held = jnp.sum(self.token < length[:, None, None], axis=-1, keepdims=True)
        slot = jnp.where(taken, held + jnp.cumsum(taken, axis=-1) - 1, slots)
        row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]

        def write(buffer: jax.Array, rows: jax.Array) -> jax.Array:
            return buffer.at[row, head, slot].set(rows.astype(buffer.dtype), mode="drop")

        # Slots behind what is held are of tokens that were rolled back.
        token = jnp.where(jnp.arange(slots) < held, self.token, _NO_TOKEN)
        new = jnp.broadcast_to(length[:, None, None] + number, taken.shape)
        return SelectiveCache(write(self.key, key), write(self.value, value), write(token, new))

    def select(self, rows: jax.Array) -> "SelectiveCache":
        return SelectiveCache(self.key[rows], self.value[rows], self.token[rows])


class _Parameters(Linear):
    """A `Linear` that hands out its kernel and bias."""

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        kernel, bias = self.parameters(width)
        return weights.materialize(kernel), bias


class SMHA(nn.Module):
    """Selective multi-head attention: k of n heads for every token.

    Args:
        num_heads, head_dim, k: n, d and k.
        rule: Causal(), or Full() in encoders.
        rotary: rotary embedding, or None.
        rope_positions: "original", the tokens' places in the sequence, or "compact", their places among the
            head's own tokens (the released code).
        norm: "unit", the faithful weight 1 that never trains the router, or "unit_straight_through", whose value
            is 1 and whose gradient does.
        balance_weight: of the balance loss over all choices ("jetmoe" of `balance_loss`). The released code has none,
            and none trains its router.
        capacity_factor: slots a head has, over the k / n of a sequence's tokens that even routing needs; None
            leaves no token out. Beyond it a causal head takes tokens by the running rule of `research.moe.selection`,
            which looks at nothing ahead and which a cache goes on with; an encoder's takes those of the largest gates.
        dispatch: "capacity" gathers each head's tokens and computes these alone; "dense" computes all heads for all
            tokens and masks (the oracle); "auto": "capacity" where a factor is given.
        use_bias, output_bias: biases of query, key and value, and of the output.
        kernel, cached_kernel: how attention is computed without a cache, and with one.

    x is [B, T, width] or [B * T, width]. Returns the output, which is the bias alone for padding, and `Rows`. With a
    cache all heads' projections of the new tokens are computed and the rows masked. Reports what `report_routing` says,
    and leaves its `Routing` in mutable "intermediates". Raises `UserError` for other rules, and for a cache under
    Full().

    Parameters: {query,key,value,output}/{kernel,bias} as in `Attention`; router/{kernel [width, n],bias}.
    """

    num_heads: int
    head_dim: int
    k: int
    rule: Causal | Full = Causal()
    rotary: Rotary | None = None
    rope_positions: Literal["original", "compact"] = "original"
    norm: UnitGate = "unit_straight_through"
    balance_weight: float = 0.0
    capacity_factor: float | None = None
    dispatch: Literal["auto", "dense", "capacity"] = "auto"
    use_bias: bool = False
    output_bias: bool = False
    kernel: AttentionKernel = AutoAttention()
    cached_kernel: CachedKernel = AutoCachedAttention()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self.num_heads, self.k)
        if not isinstance(self.rule, Causal | Full):
            raise UserError(f"SMHA: rule={self.rule}: heads of selected tokens take Causal() or Full()")
        check_unit_gate(self.norm, "SMHA")

    @property
    def share(self) -> float:
        """S / T, the share of a sequence for which a head has slots."""
        return slot_share(self.num_heads, self.k, self.capacity_factor)

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: SelectiveCache | None = None
    ) -> tuple[jax.Array, Rows]:
        flat, shape = x.reshape(-1, x.shape[-1]), context.positions.shape
        real = None if context.segments is None else context.segments.reshape(-1) > 0
        logits = Router(self.num_heads, use_bias=True, name="router")(flat)
        routing = route(logits, self.k, norm=self.norm, mask=real)
        self.sow("intermediates", "routing", routing)
        if cache is not None:
            y, fresh = self._extend(flat, context, cache, routing)
            return y.reshape(x.shape), fresh
        taken = take(routing, shape[0], self.share, ranked=isinstance(self.rule, Full))
        routing = drop_gates(routing, taken)
        dropped = jnp.sum(chosen_experts(routing, shape[0])) - jnp.sum(taken)
        report_routing(
            self, routing, dropped.astype(jnp.float32), shape[0], "jetmoe", self.balance_weight, z_weight=0.0
        )
        compacted = self.dispatch == "capacity" or (
            self.dispatch == "auto" and self.capacity_factor is not None
        )
        run = self._compacted if compacted else self._masked
        y, key, value = run(flat, context, routing, taken)
        return y.reshape(x.shape), (key, value, taken.transpose(0, 2, 1)[..., None])

    def _masked(
        self, x: jax.Array, context: Context, routing: Routing, taken: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All heads over all tokens. -> y [N, width], key and value [B, n, T, d]."""
        batch, length = context.positions.shape
        query, key, value = self._project(x, batch)  # [B, n, T, d]
        segments = jnp.ones_like(context.positions) if context.segments is None else context.segments
        segments = jnp.where(taken.swapaxes(1, 2), segments[:, None], 0)  # [B, n, T]
        if self.rotary is not None:
            positions = context.positions[:, None]
            if self.rope_positions == "compact":
                positions = jnp.maximum(number_taken(taken), 0).swapaxes(1, 2)
            query, key = _rotate_heads(self._angles(positions), query, key)
        out = self._attend(query, key, value, segments)
        return self._output(out, gate_of_expert(routing), x.shape[-1]), key, value

    def _compacted(
        self, x: jax.Array, context: Context, routing: Routing, taken: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Every head over its own tokens. -> as `_masked`; keys and values of tokens it did not take are 0."""
        batch, length = context.positions.shape
        slots = slot_count(length, self.share)
        dispatch = selection_dispatch(routing, taken, slots)
        token = token_of_slot(dispatch)  # [n, B S]
        query, key, value = self._project_slots(dispatch.scatter(x), batch)  # [n, B, S, d]
        shape = query.shape[:-1]
        segments = jnp.ones_like(context.positions) if context.segments is None else context.segments
        segments = _of_slots(segments.reshape(-1), token).reshape(shape)
        if self.rotary is not None:
            if self.rope_positions == "compact":
                angles = self._angles(jnp.arange(slots)[None, None])
            else:
                tables = (
                    table.reshape(batch * length, -1) for table in self._angles(context.positions[:, None])
                )
                angles = tuple(_of_slots(table, token).reshape(*shape, -1) for table in tables)
            query, key = _rotate_heads(angles, query, key)
        out = self._attend(query, key, value, segments).reshape(self.num_heads, -1, self.head_dim)
        kernel, bias = _Parameters(x.shape[-1], self.output_bias, name="output")(
            self.num_heads * self.head_dim
        )
        parts = batched_dot(out, kernel.reshape(self.num_heads, self.head_dim, -1))
        y = dispatch.combine(parts, routing.gate)
        y = y if bias is None else y + bias.astype(y.dtype)
        # Only decoding reads these; elsewhere they are not computed.
        slot = number_taken(taken) + jnp.arange(batch)[:, None, None] * slots
        slot = jnp.where(taken, slot, batch * slots).transpose(2, 0, 1)  # [n, B, T]
        rows = (jax.vmap(_of_slots)(r.reshape(self.num_heads, -1, self.head_dim), slot) for r in (key, value))
        key, value = (r.swapaxes(0, 1) for r in rows)
        return y, key, value

    def _extend(
        self, x: jax.Array, context: Context, cache: SelectiveCache, routing: Routing
    ) -> tuple[jax.Array, Rows]:
        if isinstance(self.rule, Full):
            raise UserError(
                "SMHA: a cache needs rule=Causal(): under Full() heads look at the whole sequence"
            )
        batch, count = context.positions.shape
        cached_key, cached_value, _, valid = cache.read(context.length)
        held = jnp.sum(valid, axis=-1)  # [B, n]
        chosen = chosen_experts(routing, batch)
        taken, before = take_behind(chosen, held, context.positions, context.tree, self.share)
        query, key, value = self._project(x, batch)  # [B, n, N, d]
        if self.rotary is not None:
            compact = self.rope_positions == "compact"
            positions = before.swapaxes(1, 2) if compact else context.positions[:, None]
            query, key = _rotate_heads(self._angles(positions), query, key)
        heads_take = taken.swapaxes(1, 2)  # [B, n, N]
        # A token sees itself where the head did not take it as well: its row is not used, and must not be empty.
        fresh_mask = (context.tree[:, None] & heads_take[:, :, None]) | jnp.eye(count, dtype=bool)
        out = self.cached_kernel(
            query,
            (cached_key, cached_value),
            (key, value),
            jnp.max(held, axis=-1),
            jnp.broadcast_to(valid[:, :, None], (*valid.shape[:2], count, valid.shape[2])),
            fresh_mask,
            scale=self.head_dim**-0.5,
            softcap=None,
        )
        gates = gate_of_expert(drop_gates(routing, taken))
        return self._output(out, gates, x.shape[-1]), (key, value, heads_take[..., None])

    def _project(self, x: jax.Array, batch: int) -> tuple[jax.Array, ...]:
        """x [N, width] -> query, key and value [B, n, T, d] of all tokens."""
        width = self.num_heads * self.head_dim
        if "qkv" in self.variables.get("params", {}):
            parts = jnp.split(Linear(3 * width, self.use_bias, name="qkv")(x), 3, axis=-1)
        else:
            parts = [Linear(width, self.use_bias, name=name)(x) for name in ("query", "key", "value")]
        return tuple(y.reshape(batch, -1, self.num_heads, self.head_dim).swapaxes(1, 2) for y in parts)

    def _project_slots(self, x: jax.Array, batch: int) -> tuple[jax.Array, ...]:
        """x [n, B S, width] -> query, key and value [n, B, S, d]: one product for the three."""
        width, n = self.num_heads * self.head_dim, self.num_heads
        if "qkv" in self.variables.get("params", {}):
            fused, bias = _Parameters(3 * width, self.use_bias, name="qkv")(x.shape[-1])
            kernels, biases = jnp.split(fused, 3, axis=-1), [] if bias is None else jnp.split(bias, 3)
        else:
            names = ("query", "key", "value")
            found = [_Parameters(width, self.use_bias, name=name)(x.shape[-1]) for name in names]
            kernels, biases = [k for k, _ in found], [b for _, b in found if b is not None]
        by_head = [kernel.reshape(x.shape[-1], n, -1).swapaxes(0, 1) for kernel in kernels]  # [n, width, d]
        y = batched_dot(x, jnp.concatenate(by_head, axis=-1))
        if biases:
            bias = jnp.concatenate([b.reshape(n, 1, -1) for b in biases], axis=-1)
            y = y + bias.astype(y.dtype)
        return tuple(jnp.split(y.reshape(n, batch, -1, 3 * self.head_dim), 3, axis=-1))

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """positions int32[a, b, c] -> cosines and sines [a, b, c, d / 2]."""
        shape = positions.shape
        tables = tuple(map(compute_once, self.rotary(positions.reshape(-1, shape[-1]), self.head_dim)))
        return tuple(table.reshape(*shape, -1) for table in tables)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        """[a, b, S, d] with segments int32[a, b, S], 0 where nothing is to be seen, among each S rows alone."""
        query, key, value = (y.reshape(-1, 1, *y.shape[2:]) for y in (query, key, value))
        places = dict(segments=segments.reshape(-1, segments.shape[-1]), prefix=None)
        out = self.kernel(query, key, value, self.rule, **places, scale=self.head_dim**-0.5, softcap=None)
        return out.reshape(*segments.shape, self.head_dim)

    def _output(self, out: jax.Array, gates: jax.Array, width: int) -> jax.Array:
        """out [B, n, T, d] of all heads, gates f32[N, n] -> y [N, width]."""
        rows = out.swapaxes(1, 2).reshape(-1, self.num_heads, self.head_dim)
        # `where`, as a head's row for a token it did not take means nothing.
        rows = jnp.where(gates[..., None] != 0, rows * gates[..., None].astype(rows.dtype), 0)
        return Linear(width, self.output_bias, name="output")(rows.reshape(rows.shape[0], -1))

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> SelectiveCache:
        """As many slots as a head can hold of `capacity` tokens."""
        slots = slot_count(capacity, self.share)
        return SelectiveCache.empty(batch, slots, self.num_heads, self.head_dim, dtype)


def check_unit_gate(norm: str, where: str) -> None:
    """Raise `UserError` unless slices of that gate normalisation add up to the dense block."""
    if norm not in get_args(UnitGate):
        raise UserError(f"{where}: norm={norm!r}: slices have weight 1; use unit or unit_straight_through")


def _of_slots(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows [M, ...] named by an index of any shape, 0 for one of M or more."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _rotate_heads(angles: tuple[jax.Array, jax.Array], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [a, b, S, d] rotated by cosines and sines [a or 1, b or 1, S, d / 2]."""
    shape = arrays[0].shape
    tables = [
        jnp.broadcast_to(x, (*shape[:-1], shape[-1] // 2)).reshape(-1, 1, shape[-1] // 2) for x in angles
    ]
    return tuple(rotate(x.reshape(-1, 1, 1, shape[-1]), *tables).reshape(shape) for x in arrays)
