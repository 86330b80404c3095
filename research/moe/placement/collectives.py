"""Sparse collectives over the experts' store, inside `jax.shard_map`.

All are exchanges of rows that int32 data choose, so their transposes are what the backward pass needs: that of
`sparse_all_gather` sums the gradients of the copies at the experts' homes, the sparse reduce-scatter. Nothing of it
is written by hand.

Every pair of devices exchanges `limit` rows, empty ones included, as XLA's all-to-all has one size for all pairs.
What goes to all devices alike is better broadcast: `broadcast_experts`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.moe.placement.plan import queue_place

PyTree = Any
Axes = tuple[str, ...]


def device_index(axes: Axes) -> jax.Array:
    """int32[]: this device along the axes, the last fastest; 0 where there are none."""
    return lax.axis_index(axes) if axes else jnp.int32(0)


def exchange(x: jax.Array, axes: Axes) -> jax.Array:
    """x [D, ...], row d for device d -> [D, ...], row s from device s."""
    return lax.all_to_all(x, axes, 0, 0) if axes else x


def rows_or_zero(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` of x; zeros for an index beyond its end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def own_experts(shard: PyTree, rows: jax.Array, mine: jax.Array, axes: Axes) -> PyTree:
    """This device's experts of one layer: leaves [R/D, ...] -> [most, ...], zeros in empty slots.

    rows int32[E], where the store has each expert; mine int32[most], the experts at home here (-1: none).
    """
    block = jax.tree.leaves(shard)[0].shape[0]
    local = jnp.where(mine < 0, block, rows[mine] - device_index(axes) * block)
    return jax.tree.map(lambda leaf: rows_or_zero(leaf, local), shard)


def sparse_all_gather(
    own: PyTree, copies: jax.Array, owner: jax.Array, own_place: jax.Array, *, limit: int, axes: Axes
) -> PyTree:
    """The experts that a plan copies to this device: leaves [most, ...] of every home -> [m, ...].

    copies int32[D, m], -1 in empty slots, which come out as zeros; owner int32[E]: home of each expert;
    own_place int32[E]: its place among its home's. limit: rows from one home to one device; the plan has no more.
    """
    devices = copies.shape[0]
    with jax.named_scope("sparse_all_gather"):
        me = device_index(axes)
        place = queue_place(copies, owner)
        home = jnp.where(copies < 0, devices, owner[copies])
        most = jax.tree.leaves(own)[0].shape[0]
        # What this device sends: for every other one a queue of places among its own.
        sends = jnp.where(home == me, place, limit)
        queues = jnp.full((devices, limit), most, jnp.int32)
        queues = queues.at[jnp.arange(devices)[:, None], sends].set(own_place[copies], mode="drop")
        arrived = jnp.where(copies[me] < 0, devices * limit, home[me] * limit + place[me])

        def move(leaf: jax.Array) -> jax.Array:
            received = exchange(rows_or_zero(leaf, queues), axes)
            return rows_or_zero(received.reshape(-1, *leaf.shape[1:]), arrived)

        return jax.tree.map(move, own)


def broadcast_experts(
    own: PyTree,
    hot: jax.Array,
    owner: jax.Array,
    own_place: jax.Array,
    *,
    limit: int,
    devices: int,
    axes: Axes,
) -> PyTree:
    """The same experts for all devices: leaves [most, ...] of every home -> [t, ...].

    hot int32[t], -1 for none, which comes out as zeros; owner, own_place as in `sparse_all_gather`. limit: how many
    of them have one home. A home cuts each of its hot experts into D pieces and sends every device one; then all
    gather the pieces. So no device, a home neither, sends or receives more than `limit + t` experts, where sending
    them whole would cost a home D - 1 times each.
    """
    with jax.named_scope("sparse_all_gather"):
        place = queue_place(hot[None], owner)[0]
        home = jnp.where(hot < 0, devices, owner[hot])
        most = jax.tree.leaves(own)[0].shape[0]
        queue = jnp.full(limit, most, jnp.int32)
        queue = queue.at[jnp.where(home == device_index(axes), place, limit)].set(own_place[hot], mode="drop")
        arrived = jnp.where(hot < 0, devices * limit, home * limit + place)

        def move(leaf: jax.Array) -> jax.Array:
            shape = leaf.shape[1:]
            flat = rows_or_zero(leaf, queue).reshape(limit, -1)
            size = flat.shape[1]
            pieces = jnp.pad(flat, ((0, 0), (0, -size % devices))).reshape(limit, devices, -1)
            mine = exchange(pieces.swapaxes(0, 1), axes)  # piece `me` of every home's hot experts
            mine = rows_or_zero(mine.reshape(devices * limit, -1), arrived)
            whole = lax.all_gather(mine, axes, axis=1, tiled=True) if axes else mine
            return whole[:, :size].reshape(-1, *shape)

        return jax.tree.map(move, own)


def permute_rows(leaf: jax.Array, source: jax.Array, axes: Axes) -> jax.Array:
    """Row r of the whole becomes what row source[r] was; leaf [R/D, ...] is this device's block, source int32[R].

    Goes in rounds of one row for every pair of devices, as many as the fullest pair needs, so that the memory
    beside the old and the new block is D rows.
    """
    block, devices = leaf.shape[0], source.shape[0] // leaf.shape[0]
    me = device_index(axes)
    comes_from = (source // block).reshape(devices, block)  # [to, place]
    pair = jax.nn.one_hot(comes_from, devices, dtype=jnp.int32)
    turn = jnp.sum((jnp.cumsum(pair, axis=1) - pair) * pair, axis=2)  # round in which the row arrives
    remote = comes_from != jnp.arange(devices)[:, None]
    within = (source % block).reshape(devices, block)
    local = jnp.where(remote[me], block, within[me])
    moved = rows_or_zero(leaf, local)
    to = jnp.arange(devices)[:, None]

    def round_(number: jax.Array, moved: jax.Array) -> jax.Array:
        now = remote & (turn == number)
        sends = jnp.full((devices,), block, jnp.int32)
        target = jnp.where(now & (comes_from == me), to, devices)
        sends = sends.at[target].set(within, mode="drop")
        received = exchange(rows_or_zero(leaf, sends), axes)  # [from, ...]
        places = jnp.full((devices,), block, jnp.int32)
        sender = jnp.where(now[me], comes_from[me], devices)
        places = places.at[sender].set(jnp.arange(block, dtype=jnp.int32), mode="drop")
        return moved.at[places].set(received, mode="drop")

    rounds = jnp.max(jnp.where(remote, turn + 1, 0))
    return lax.fori_loop(0, rounds, round_, moved) if axes else moved


def count_collectives(hlo: str, operation: str, scope: str = "") -> int:
    """How many instructions `operation` ("all-to-all") of a compiled program's text lie in a named scope."""
    starts = (f" {operation}(", f" {operation}-start(")
    lines = (line for line in hlo.splitlines() if any(start in line for start in starts))
    return sum(scope in line.partition("op_name=")[2] for line in lines)
