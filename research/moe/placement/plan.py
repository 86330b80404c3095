"""Plans: which device holds which experts of a layer, and where a token goes under a plan.

A plan is int32 data, never a constant of the program: a new plan every step compiles nothing. Every function here
is traced integer code without gradient and gives the same on every device.

E experts, D devices (`Topology`), S slots a device. A table int32[D, S] names the expert in each slot, -1 where it
is empty; `held` bool[D, E] says the same by expert. *Home* of an expert is the one device that owns its parameters
and optimizer state; a *copy* is what another device holds of it for one step.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.errors import UserError


@dataclass(frozen=True)
class Topology:
    """D = nodes * per_node devices, node by node. Traffic inside a node is taken to be the cheaper one."""

    nodes: int
    per_node: int

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    @property
    def node_of(self) -> np.ndarray:
        """int[D]."""
        return np.arange(self.devices) // self.per_node

    @property
    def same_node(self) -> np.ndarray:
        """bool[D, D]."""
        return self.node_of[:, None] == self.node_of[None, :]


def check_divides(num_experts: int, devices: int, where: str) -> None:
    """Raise `UserError` unless the experts of a layer divide evenly over the devices."""
    if num_experts % devices:
        raise UserError(
            f"{where}: {num_experts} experts do not divide over the {devices} devices of the expert axes (fsdp x "
            f"expert); give a number of devices that divides {num_experts}"
        )


def hold(table: jax.Array, num_experts: int) -> jax.Array:
    """Table int32[D, S] -> held bool[D, E]."""
    return jnp.any(table[:, :, None] == jnp.arange(num_experts), axis=1)


def slot_of(table: jax.Array, num_experts: int) -> jax.Array:
    """Table int32[D, S] -> int32[D, E]: the slot of each expert on each device, S where it has none."""
    devices, slots = table.shape
    expert = jnp.where(table < 0, num_experts, table)
    empty = jnp.full((devices, num_experts), slots, jnp.int32)
    rows = jnp.arange(devices)[:, None]
    return empty.at[rows, expert].min(jnp.arange(slots, dtype=jnp.int32)[None], mode="drop")


def own_table(owner: jax.Array, devices: int, most: int) -> jax.Array:
    """owner int32[E] -> int32[D, most]: the experts at home on each device, ascending. None owns more than `most`."""
    experts = jnp.arange(owner.shape[0], dtype=jnp.int32)
    empty = jnp.full((devices, most), -1, jnp.int32)
    return empty.at[owner, own_place(owner)].set(experts, mode="drop")


def own_place(owner: jax.Array) -> jax.Array:
    """owner int32[E] -> int32[E]: the place of each expert among those of its home."""
    earlier = jnp.tril(owner[:, None] == owner[None, :], -1)
    return jnp.sum(earlier, axis=1, dtype=jnp.int32)


def materialise(
    load: jax.Array,
    owner: jax.Array,
    held: jax.Array,
    topology: Topology,
    *,
    reach: int,
    memory: int,
    pair_limit: int | None = None,
) -> jax.Array:
    """Sparse materialisation (Hecate, algorithm 1): copies int32[D, m] of the hottest experts for one step.

    load f32[E]: expected tokens of each expert. owner int32[E]: its home. held bool[D, E]: what devices hold already,
    homes included. reach: t, how many different experts may move. memory: copies a device has room for.
    pair_limit: the most copies that one home sends to one device.

    With t = min(t, E) and m = min(memory, t). If t <= m, every device gets the t hottest that it lacks, the i-th
    hottest in slot i. Otherwise
    the t hottest, hottest first, share the D m slots in proportion to their load; a copy goes to a node that lacks
    the expert, the one with most free slots, and once all nodes have it to the node with most free slots; in it to
    the device with most free slots. Ties: the lower number.
    """
    devices, num_experts = held.shape
    memory = min(memory, num_experts)
    reach = min(reach, num_experts)
    memory = min(memory, reach)
    if memory == 0 or devices == 1:
        return jnp.full((devices, memory), -1, jnp.int32)
    heat, hottest = lax.top_k(load, reach)
    # What the experts not yet walked weigh, each with those behind it.
    rest = jnp.cumsum(heat[::-1])[::-1]

    def walk(i, state):
        held, used, sent, table = state
        expert = hottest[i]
        free = memory - used
        can = ~held[:, expert] & (free > 0)
        if pair_limit is not None:
            can &= sent[owner[expert]] < pair_limit
        slot = used
        if reach <= memory:
            chosen, slot = can, i
        else:
            share = jnp.where(rest[i] > 0, heat[i] / rest[i], 0.0)
            replicas = jnp.floor(share * jnp.sum(free) + 0.5).astype(jnp.int32)
            chosen = can & (_preference(can, free, held[:, expert], topology) < replicas)
        table = table.at[jnp.arange(devices), jnp.where(chosen, slot, memory)].set(expert, mode="drop")
        held = held.at[:, expert].set(held[:, expert] | chosen)
        return held, used + chosen, sent.at[owner[expert]].add(chosen), table

    # Of the mesh axes that the load differs over, as the loop's state must be.
    zeros = functools.partial(jnp.zeros_like, load, dtype=jnp.int32)
    state = (
        held | (zeros(shape=()) > 0),
        zeros(shape=devices),
        zeros(shape=(devices, devices)),
        zeros(shape=(devices, memory)) - 1,
    )
    return lax.fori_loop(0, reach, walk, state)[3]


def _preference(can: jax.Array, free: jax.Array, has: jax.Array, topology: Topology) -> jax.Array:
    """int32[D]: in which order devices take copies of one expert, 0 first; those that can't are last.

    Copies go one by one to the node with most free slots, of which each takes one, so the q-th copy of a node
    with f free slots comes when that node has f - q left; nodes without the expert come before all of that.
    """
    shape = (topology.nodes, topology.per_node)
    can, free, has = can.reshape(shape), free.reshape(shape), has.reshape(shape)
    within = rank(jnp.where(can, -free, 1))  # in its node: most free slots first
    left = jnp.sum(free, axis=1, keepdims=True) - within
    first = ~jnp.any(has, axis=1, keepdims=True) & (within == 0)
    key = jnp.where(first, 0, 1 + jnp.max(left)) + jnp.max(left) - left
    key = jnp.where(can, key, jnp.iinfo(jnp.int32).max)
    return rank(key.reshape(1, -1))[0]


def rank(keys: jax.Array) -> jax.Array:
    """keys [..., n] -> int32[..., n]: the place of each in ascending order, ties in order of position."""
    before = (keys[..., None, :] < keys[..., :, None]) | jnp.tril(
        keys[..., None, :] == keys[..., :, None], -1
    )
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def everything(owner: jax.Array, devices: int) -> jax.Array:
    """Copies int32[D, E] of all experts, but for those at home: FSDP. Expert e is in slot e."""
    experts = jnp.arange(owner.shape[0], dtype=jnp.int32)
    return jnp.where(owner[None] == jnp.arange(devices)[:, None], -1, experts)


def _gathered(chosen: jax.Array) -> jax.Array:
    """bool[..., n] -> int32[..., n]: the numbers of the chosen, ascending, then -1."""
    place = jnp.where(chosen, jnp.cumsum(chosen, axis=-1) - 1, chosen.shape[-1])
    numbers = jnp.broadcast_to(jnp.arange(chosen.shape[-1], dtype=jnp.int32), chosen.shape)
    put = lambda place, numbers: jnp.full_like(numbers, -1).at[place].set(numbers, mode="drop")  # noqa: E731
    for _ in range(chosen.ndim - 1):
        put = jax.vmap(put)
    return put(place, numbers)


def within_limit(copies: jax.Array, owner: jax.Array, limit: int) -> jax.Array:
    """The copies int32[D, m] without those beyond the `limit`-th of one home on one device."""
    return jnp.where(queue_place(copies, owner) < limit, copies, -1)


def queue_place(copies: jax.Array, owner: jax.Array) -> jax.Array:
    """int32[D, m]: how many of a device's copies before this one come from the same home."""
    home = jnp.where(copies < 0, -1, owner[copies])
    same = (home[:, :, None] == home[:, None, :]) & (home >= 0)[:, None, :]
    return jnp.sum(jnp.tril(same, -1), axis=2, dtype=jnp.int32)


def eligible(held: jax.Array, topology: Topology) -> jax.Array:
    """bool[D, E, D]: where a token on device s goes for expert e: to s if that holds e, else to holders of its node,
    else to all holders."""
    here = held.T[None] & jnp.eye(topology.devices, dtype=bool)[:, None]
    near = held.T[None] & topology.same_node[:, None]
    far = jnp.broadcast_to(held.T[None], near.shape)
    exists = lambda places: jnp.any(places, axis=2, keepdims=True)  # noqa: E731
    return jnp.where(exists(here), here, jnp.where(exists(near), near, far))


def destinations(held: jax.Array, topology: Topology) -> tuple[jax.Array, jax.Array]:
    """(places int32[D, E, D], number int32[D, E]): the eligible devices of a token on s for e, `number` of them.

    The r-th token of s for e goes to places[s, e, (r + s) % number]: spread evenly, and not all sources begin with
    the same one.
    """
    fits = eligible(held, topology)
    return _gathered(fits), jnp.sum(fits, axis=2, dtype=jnp.int32)


def traffic(counts: jax.Array, held: jax.Array, topology: Topology) -> jax.Array:
    """counts int32[D, E], choices of each device's own tokens -> int32[D, D]: how many go from s to d, exactly."""
    places, number = destinations(held, topology)
    devices = topology.devices
    source, turn = jnp.arange(devices)[:, None, None], jnp.arange(devices)
    many = jnp.maximum(number, 1)[:, :, None]
    # Of c tokens taking turns from s on, turn j is met once for each r < c with (r + s) % number = j.
    met = (counts[:, :, None] - (turn - source) % many + many - 1) // many
    met = jnp.where(turn < number[:, :, None], jnp.maximum(met, 0), 0)
    to = jnp.where(places < 0, devices, places)
    flow = jnp.zeros((devices, devices), jnp.int32)
    return flow.at[jnp.broadcast_to(source, places.shape), to].add(met, mode="drop")


def moved(copies: jax.Array) -> jax.Array:
    """How many copies of experts a plan moves, int32[]: its non-empty slots."""
    return jnp.sum(copies >= 0, dtype=jnp.int32)


def moved_share(copies: jax.Array, num_experts: int) -> jax.Array:
    """lambda f32[]: different experts moved / E. No device receives more than lambda of a layer's bytes."""
    return jnp.sum(jnp.any(hold(copies, num_experts), axis=0)) / num_experts


def imbalance(flow: jax.Array) -> jax.Array:
    """Traffic [D, D] -> load of the fullest device over the mean load, f32[]; 1 in balance, at most D."""
    loads = jnp.sum(flow, axis=0)
    return jnp.max(loads) / jnp.maximum(jnp.mean(loads.astype(jnp.float32)), 1e-9)


def crossing(flow: jax.Array) -> jax.Array:
    """Traffic [D, D] -> how many choices leave their device, int32[]."""
    return jnp.sum(flow) - jnp.trace(flow)


def most_owned(num_experts: int, devices: int, factor: float) -> int:
    """The most experts of one layer that a device may own: `factor` times its even share, rounded up."""
    return min(num_experts, math.ceil(factor * num_experts / devices - 1e-9))
