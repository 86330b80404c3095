"""The experts of one layer where they live: gather what the plan copies, send tokens, compute, bring them back.

All of it runs inside one `jax.shard_map` over the batch axes of the trainer's mesh, in which the tokens of the batch
are divided; the experts' store is divided over `EXPERT_AXES`, nodes first. Without a mesh, or on one device, the
same code runs with no exchange at all.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from research.errors import UserError
from research.moe.dispatch import make_dispatch
from research.moe.placement import plan
from research.moe.placement.collectives import (
    Axes,
    broadcast_experts,
    device_index,
    exchange,
    own_experts,
    rows_or_zero,
    sparse_all_gather,
)
from research.moe.placement.cost import Work
from research.moe.placement.plan import Topology
from research.moe.placement.policies import Policy
from research.moe.routing import Routing
from research.nn.reports import Measurement

PyTree = Any

# As in `research.training.partitioning`, of which a model knows nothing.
BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXES = ("fsdp", "expert")
_SAVED = ("dot_general", "ragged_dot_general")


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that the program is traced for, if it has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def topology_of(mesh: Any) -> Topology:
    """The devices among which experts are placed: `fsdp` counts nodes, `expert` the devices of one."""
    return Topology(1, 1) if mesh is None else Topology(*(mesh.shape[axis] for axis in EXPERT_AXES))


class PlacedExperts(struct.PyTreeNode):
    """Stands in the parameter tree in place of a layer's `experts` while they are in the store.

    rows int32[E]: where the store has each expert; ahead int32[D, m]: the copies made before the gate.
    capacity: tokens that one device sends to one other, as a multiple of an even share (its choices / D); what does
    not fit is dropped and counted. None: as many as there are, so that nothing is ever dropped.
    rematerialise: gather the copies again in backward instead of keeping them.
    """

    rows: jax.Array
    ahead: jax.Array
    policy: Policy = struct.field(pytree_node=False)
    topology: Topology = struct.field(pytree_node=False)
    capacity: float | None = struct.field(pytree_node=False)
    rematerialise: bool = struct.field(pytree_node=False)

    def run(
        self, routing: Routing, x: jax.Array, store: PyTree, experts: nn.Module
    ) -> tuple[jax.Array, jax.Array, dict[str, Measurement]]:
        """x [N, width] of a routing -> (the gated sum of the experts [N, width], choices dropped f32[], measurements).

        store: leaves [R, ...]. experts: a module (dispatch, buffer) -> buffer whose `num_experts` is free, such as
        `FeedForwardExperts`, applied to the slots of a device. Measurements: `imbalance` (load of the fullest device
        over the mean), `moved_bytes` (parameters copied to other devices, once), `crossed` (share of the choices
        computed on another device), `moved_share` (lambda).
        """
        mesh = current_mesh()
        arguments = routing.index, routing.gate, routing.mask, x, store, self.rows, self.ahead
        if mesh is None:
            y, totals = self._local(experts, (), (), *arguments)
        else:
            tokens, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
            homes = jax.tree.map(lambda _: PartitionSpec(EXPERT_AXES), store)
            y, totals = jax.shard_map(
                functools.partial(self._local, experts, EXPERT_AXES, BATCH_AXES),
                mesh=mesh,
                in_specs=(tokens, tokens, tokens, tokens, homes, everywhere, everywhere),
                out_specs=(tokens, everywhere),
                axis_names=set(BATCH_AXES),
            )(*arguments)
        one, chosen = totals["groups"], totals["choices"]
        measured = {
            "imbalance": (totals["imbalance"], one),
            "moved_bytes": (totals["moved_bytes"], jnp.float32(1)),
            "moved_share": (totals["moved_share"], one),
            "crossed": (totals["crossed"], chosen),
        }
        return y, totals["dropped"], measured

    def _local(
        self,
        experts: nn.Module,
        axes: Axes,
        batch_axes: Axes,
        index: jax.Array,
        gate: jax.Array,
        mask: jax.Array,
        x: jax.Array,
        store: PyTree,
        rows: jax.Array,
        ahead: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One device's part: its tokens x [n, width] and its block of the store."""
        topology, num_experts = self.topology, rows.shape[0]
        devices = topology.devices
        slots = self.policy.slots(num_experts, topology)
        work = _work(store, x)
        me = device_index(axes)
        owner = rows // (jax.tree.leaves(store)[0].shape[0])
        own = plan.own_table(owner, devices, slots.own)
        if not slots.ahead_broadcast:
            ahead = plan.within_limit(ahead, owner, slots.ahead_limit)

        expert = jnp.where(mask[:, None], index, num_experts).reshape(-1)  # of each of the P choices
        pairs = expert.shape[0]
        mine = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")
        counts = jnp.zeros((devices, num_experts), jnp.int32).at[me].set(mine)
        counts = lax.psum(counts, axes) if axes else counts
        late = self.policy.late(counts, ahead, owner, topology, work, self.rematerialise)
        if not slots.late_broadcast:
            late = plan.within_limit(late, owner, slots.late_limit)
        table = jnp.concatenate([own, ahead, late], axis=1)
        held = plan.hold(table, num_experts)
        slot_of = plan.slot_of(table, num_experts)

        # Where every choice goes: the r-th of this device for an expert takes its turn among the eligible ones.
        places, number = plan.destinations(held, topology)
        turn = _place_among_equals(expert, num_experts)
        known = jnp.minimum(expert, num_experts - 1)
        to = places[me, known, (turn + me) % jnp.maximum(number[me, known], 1)]
        real = expert < num_experts
        here = real & (to == me)
        away = jnp.where(real & (to != me), to, devices)

        number_of_slots, k = table.shape[1], index.shape[1]
        numbers = jnp.arange(pairs, dtype=jnp.int32)
        inputs = rows_or_zero(x, jnp.where(here, numbers, pairs) // k)
        slot = jnp.where(here, slot_of[me, known], number_of_slots)
        capacity = 0 if slots.complete else self._capacity(pairs)
        if capacity:
            place = _place_among_equals(away, devices)
            sent = (away < devices) & (place < capacity)
            at = jnp.where(sent, away * capacity + place, devices * capacity)
            pair = jnp.full(devices * capacity, pairs, jnp.int32).at[at].set(numbers, mode="drop")
            outgoing = rows_or_zero(x, pair // k).reshape(devices, capacity, -1)
            wanted = jnp.append(slot_of[to, known], number_of_slots)[pair].reshape(devices, capacity)
            with jax.named_scope("send_tokens"):
                incoming, slots_in = exchange(outgoing, axes), exchange(wanted, axes)
            inputs = jnp.concatenate([inputs, incoming.reshape(-1, x.shape[-1])])
            slot = jnp.concatenate([slot, slots_in.reshape(-1)])

        def compute(store: PyTree, inputs: jax.Array) -> jax.Array:
            # From here on every replica has gradients of its own. They are summed here, at the homes, and not
            # inside the branch below, which some replicas take and others do not.
            home = _varying(own_experts(store, rows, own[me], axes), batch_axes)
            fixed = dict(owner=owner, own_place=plan.own_place(owner), axes=axes)

            def gather(copies: jax.Array, limit: int, broadcast: bool) -> PyTree:
                if broadcast:
                    hot = jnp.max(copies, axis=0)
                    return broadcast_experts(home, hot, limit=limit, devices=devices, **fixed)
                return sparse_all_gather(home, copies, limit=limit, **fixed)

            parts = [home]
            if slots.ahead:
                parts.append(gather(ahead, slots.ahead_limit, slots.ahead_broadcast))
            if slots.late:
                late_ = functools.partial(gather, late, slots.late_limit, slots.late_broadcast)
                parts.append(_if_any(late, late_, home))
            weights = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
            return _experts_of_slots(experts, weights, inputs, slot)

        if self.rematerialise:
            compute = jax.checkpoint(compute, policy=lambda primitive, *_, **__: primitive.name in _SAVED)
        outputs = compute(store, inputs)

        results = outputs[:pairs]
        if capacity:
            with jax.named_scope("return_tokens"):
                back = exchange(outputs[pairs:].reshape(devices, capacity, -1), axes)
            returned = rows_or_zero(back.reshape(devices * capacity, -1), at)
            results = jnp.where(here[:, None], results, returned)
        results = results.reshape(*index.shape, -1).astype(jnp.float32)
        y = jnp.sum(results * gate[..., None], axis=1).astype(x.dtype)

        flow = plan.traffic(counts, held, topology)
        lost = jnp.sum(real & ~here & ~sent, dtype=jnp.float32) if capacity else jnp.zeros((), jnp.float32)
        copied = plan.moved(ahead) + plan.moved(late)
        group = {
            "imbalance": plan.imbalance(flow),
            "moved_bytes": copied.astype(jnp.float32) * work.expert_bytes,
            "moved_share": plan.moved_share(jnp.concatenate([ahead, late], axis=1), num_experts),
            "crossed": plan.crossing(flow).astype(jnp.float32),
            "choices": jnp.sum(counts).astype(jnp.float32),
            "groups": jnp.float32(1),
        }
        if batch_axes:
            # A group is the devices that share one set of homes: `data` counts groups.
            others = tuple(axis for axis in batch_axes if axis not in axes)
            group = {name: lax.psum(_varying(value, others), others) for name, value in group.items()}
            lost = lax.psum(_varying(lost, batch_axes), batch_axes)
        return y, jax.tree.map(lax.stop_gradient, group | {"dropped": lost})

    def _capacity(self, pairs: int) -> int:
        """Tokens that one device sends to one other, of its `pairs` choices."""
        devices = self.topology.devices
        if devices == 1:
            return 0
        if self.capacity is None:
            return pairs
        return min(pairs, math.ceil(self.capacity * pairs / devices - 1e-6))


def check_capacity(capacity: float | None, where: str) -> None:
    """Raise `UserError` unless the factor is positive or None."""
    if capacity is not None and not capacity > 0:
        raise UserError(f"{where}.capacity is {capacity}; it must be above 0, or None to drop nothing")


def _work(store: PyTree, x: jax.Array) -> Work:
    leaves = jax.tree.leaves(store)
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
    each = sum(size * leaf.dtype.itemsize for size, leaf in zip(sizes, leaves, strict=True))
    return Work(each, x.shape[-1] * x.dtype.itemsize, 2 * sum(sizes))


def _if_any(late: jax.Array, gather: Callable[[], PyTree], home: PyTree) -> PyTree:
    """The late copies, for which nothing is sent where there are none."""
    count = late.shape[1]

    def none() -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(count, *leaf.shape[1:])), home)

    return lax.cond(jnp.any(late >= 0), gather, none)


def _varying(tree: PyTree, axes: Axes) -> PyTree:
    """The values, typed as differing between the devices of all `axes`; their gradients are then summed there."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _experts_of_slots(experts: nn.Module, weights: PyTree, inputs: jax.Array, slot: jax.Array) -> jax.Array:
    """inputs [M, width], each through the expert in its slot int32[M]; 0 where that is beyond the last."""
    count = jax.tree.leaves(weights)[0].shape[0]
    none = jnp.zeros((inputs.shape[0], count), jnp.float32)
    routing = Routing(none, none, slot[:, None], none[:, :1], slot < count)
    dispatch = make_dispatch(routing, dtype=inputs.dtype)
    outputs = experts.clone(num_experts=count).apply({"params": weights}, dispatch, dispatch.scatter(inputs))
    return dispatch.gather_slots(outputs)[:, 0]


def _place_among_equals(keys: jax.Array, count: int) -> jax.Array:
    """keys int32[P] in 0..count -> int32[P]: how many equal ones come before each."""
    order = jnp.argsort(keys, stable=True)
    many = jnp.zeros(count + 1, jnp.int32).at[keys].add(1)
    place = jnp.arange(keys.shape[0], dtype=jnp.int32) - (jnp.cumsum(many) - many)[keys[order]]
    return jnp.zeros_like(place).at[order].set(place)
