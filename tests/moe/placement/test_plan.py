"""Plans against a slow reading of the paper: algorithm 1, who may compute a token, and exact counts of traffic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.moe.placement import plan
from research.moe.placement.plan import Topology

E, ONE_NODE, TWO_NODES = 8, Topology(1, 4), Topology(2, 2)
D = 4


def algorithm_1(load, owner, topology, reach, memory, pair_limit):
    """One copy after the other, as the paper says it. -> [set of experts copied to each device]."""
    devices = topology.devices
    held = [set(np.flatnonzero(owner == d)) for d in range(devices)]
    copies = [[] for _ in range(devices)]
    reach = min(reach, len(load))
    memory = min(memory, reach)
    free = lambda d: memory - len(copies[d])  # noqa: E731
    sent = np.zeros((devices, devices), int)
    order = sorted(range(len(load)), key=lambda e: (-load[e], e))[:reach]
    weight = float(sum(load[e] for e in order))
    for e in order:
        if reach <= memory:
            replicas = devices
        else:
            slots = sum(free(d) for d in range(devices))
            replicas = int(np.floor(load[e] / weight * slots + 0.5)) if weight else 0
        weight -= load[e]
        for _ in range(replicas):
            can = [
                d
                for d in range(devices)
                if e not in held[d] and free(d) and (pair_limit is None or sent[owner[e], d] < pair_limit)
            ]
            if not can:
                break

            def preference(d, e=e):
                mates = [x for x in range(devices) if topology.node_of[x] == topology.node_of[d]]
                lacking = not any(e in held[x] for x in mates)
                return (not lacking, -sum(map(free, mates)), topology.node_of[d], -free(d), d)

            d = min(can, key=preference)
            held[d].add(e)
            copies[d].append(e)
            sent[owner[e], d] += 1
    return copies


@pytest.mark.parametrize(
    "topology, reach, memory, limit",
    [
        (ONE_NODE, 2, 3, None),  # t <= m: the two hottest on all devices
        (ONE_NODE, 6, 2, None),
        (TWO_NODES, 6, 3, None),
        (TWO_NODES, 8, 3, 1),
        (ONE_NODE, 8, 8, None),  # t = E, m = E: FSDP
    ],
)
def test_sparse_materialisation_is_algorithm_1(topology, reach, memory, limit):
    random = np.random.default_rng(0)
    # Whole loads of few values, so that there are ties and no rounding; homes of uneven number.
    loads = np.concatenate([random.integers(0, 9, (30, E)), random.integers(0, 2, (2, E)), np.zeros((1, E))])
    owners = random.integers(0, D, (len(loads), E))

    @jax.jit
    @jax.vmap
    def copies(load, owner):
        home = owner[None] == jnp.arange(D)[:, None]
        return plan.materialise(load, owner, home, topology, reach=reach, memory=memory, pair_limit=limit)

    found = np.asarray(copies(jnp.float32(loads), jnp.int32(owners)))
    for load, owner, table in zip(loads, owners, found, strict=True):
        expected = algorithm_1(load, owner, topology, reach, memory, limit)
        assert [[e for e in row if e >= 0] for row in table] == expected


def test_no_copies_is_expert_parallelism_and_all_is_fsdp():
    owner = jnp.int32([0, 0, 1, 1, 2, 2, 3, 3])
    home = owner[None] == jnp.arange(D)[:, None]
    make = functools.partial(plan.materialise, jnp.arange(8.0), owner, home, ONE_NODE)
    assert make(reach=0, memory=4).shape == (D, 0)
    everything = jax.jit(functools.partial(make, reach=E, memory=E))()
    assert int(plan.moved(everything)) == D * E - E and float(plan.moved_share(everything, E)) == 1
    assert plan.hold(everything, E).sum(axis=1).tolist() == [6, 6, 6, 6]  # and its own two
    assert plan.everything(owner, D).tolist() == [
        [-1 if e // 2 == d else e for e in range(E)] for d in range(D)
    ]
    # What is broadcast: the i-th hottest in slot i of every device that lacks it.
    assert make(reach=2, memory=3).tolist() == [[7, 6], [7, 6], [7, 6], [-1, -1]]
    flow = plan.traffic(jnp.ones((D, E), jnp.int32), home | plan.hold(everything, E), ONE_NODE)
    assert int(plan.crossing(flow)) == 0 and float(plan.imbalance(flow)) == 1


def test_tables_by_hand():
    owner = jnp.int32([1, 0, 1, 1])
    assert plan.own_table(owner, 2, 3).tolist() == [[1, -1, -1], [0, 2, 3]]
    assert plan.own_place(owner).tolist() == [0, 0, 1, 2]
    table = jnp.int32([[1, -1, 3], [2, 0, -1]])
    assert plan.hold(table, 4).tolist() == [[False, True, False, True], [True, False, True, False]]
    assert plan.slot_of(table, 4).tolist() == [[3, 0, 3, 2], [1, 3, 0, 3]]
    # Device 0 takes 0, 2 and 3 from device 1: the third is beyond a limit of two.
    copies = jnp.int32([[0, 2, -1, 3], [1, -1, -1, -1]])
    assert plan.queue_place(copies, owner)[0, [0, 1, 3]].tolist() == [0, 1, 2]
    assert plan.within_limit(copies, owner, 2).tolist() == [[0, 2, -1, -1], [1, -1, -1, -1]]


def test_tokens_stay_here_or_near_and_spread_evenly():
    held = jnp.zeros((D, 3), bool)
    held = held.at[jnp.array([0, 1, 3]), 0].set(True)  # expert 0 on devices 0, 1 (node 0) and 3 (node 1)
    held = held.at[2, 1].set(True).at[3, 1].set(True)  # expert 1 on node 1 only
    held = held.at[1, 2].set(True)
    places = plan.eligible(held, TWO_NODES)
    assert [np.flatnonzero(places[s, 0]).tolist() for s in range(D)] == [[0], [1], [3], [3]]
    assert [np.flatnonzero(places[s, 1]).tolist() for s in range(D)] == [[2, 3], [2, 3], [2], [3]]
    assert [np.flatnonzero(places[s, 2]).tolist() for s in range(D)] == [[1]] * 4
    # On one node all devices are near: from 2, expert 0 is on any of its three holders.
    assert np.flatnonzero(plan.eligible(held, ONE_NODE)[2, 0]).tolist() == [0, 1, 3]


@pytest.mark.parametrize("topology", [ONE_NODE, TWO_NODES])
def test_traffic_counts_what_destinations_say(topology):
    random = np.random.default_rng(1)
    counts = random.integers(0, 7, (D, E))
    held = random.random((D, E)) < 0.4
    held[random.integers(0, D, E), np.arange(E)] = True
    flow = np.asarray(plan.traffic(jnp.int32(counts), jnp.asarray(held), topology))
    places, number = map(np.asarray, plan.destinations(jnp.asarray(held), topology))
    expected = np.zeros((D, D), int)
    for s in range(D):
        for e in range(E):
            to = [places[s, e, (r + s) % number[s, e]] for r in range(counts[s, e])]
            np.add.at(expected[s], to, 1)
            share = np.bincount(to, minlength=D)[places[s, e, : number[s, e]]]
            assert share.size == 0 or share.max() - share.min() <= 1  # evenly
    assert (flow == expected).all()
    assert float(plan.imbalance(jnp.asarray(flow))) == pytest.approx(
        4 * expected.sum(0).max() / expected.sum()
    )
    assert int(plan.crossing(jnp.asarray(flow))) == expected.sum() - np.trace(expected)
