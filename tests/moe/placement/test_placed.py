"""Layers under a plan on 8 simulated devices: the same outputs and gradients as on one, whatever the plan; the bytes
and collectives that the plan says; and one compilation for all plans."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.errors import UserError
from research.moe.dispatch import make_dispatch
from research.moe.experts import FeedForwardExperts
from research.moe.placement import sharding
from research.moe.placement.collectives import count_collectives, permute_rows
from research.moe.placement.cost import CostModel, Work
from research.moe.placement.hecate import FSSDP
from research.moe.placement.placed import PlacedExperts, topology_of
from research.moe.placement.plan import Topology, check_divides
from research.moe.placement.policies import ExpertParallel, FullySharded, Replicated
from research.moe.routing import route
from research.training.partitioning import make_mesh

L, E, D, K, WIDTH, HIDDEN, TOKENS = 2, 16, 8, 2, 8, 4, 64
EXPERTS = FeedForwardExperts(E, HIDDEN, "relu_squared", gated=False)
EXPERT_BYTES = 2 * WIDTH * HIDDEN * 4  # up and down, float32
POLICY = FSSDP(overlap=8, memory=3)
MESH = {"fsdp": 2, "expert": 4}  # two nodes of four devices
COEFFICIENTS = 1.0 + jnp.arange(WIDTH)


def layers(params, x, mask, apply):
    """Two residual layers in a scan; `apply(routing, x, layer)` -> (y, measurements)."""

    def layer(x, params):
        # A router that prefers the low numbers, so that loads differ.
        logits = x @ params["router"] - 0.2 * jnp.arange(E)
        y, measured = apply(route(logits, K, mask=mask), x, params)
        return x + y, measured

    return jax.lax.scan(layer, x, params)


def oracle(params, x, mask):
    def apply(routing, x, layer):
        dispatch = make_dispatch(routing, "dense")
        y = EXPERTS.apply({"params": layer["experts"]}, dispatch, dispatch.scatter(x))
        return dispatch.combine(y, routing.gate), dispatch.counts

    y, counts = layers(params, x, mask, apply)
    return jnp.sum(jnp.sin(y) * COEFFICIENTS), (y, counts)


def placed(policy, mesh, rematerialise, capacity, params, store, x, mask, rows, ahead):
    def apply(routing, x, layer):
        static = policy, topology_of(mesh), capacity, rematerialise
        y, dropped, measured = PlacedExperts(layer["rows"], layer["ahead"], *static).run(
            routing, x, store, EXPERTS
        )
        return y, {**measured, "dropped": (dropped, 1.0)}

    y, measured = layers({**params, "rows": rows, "ahead": ahead}, x, mask, apply)
    return jnp.sum(jnp.sin(y) * COEFFICIENTS), (y, {name: a / b for name, (a, b) in measured.items()})


class Program:
    """Value and gradients (or the value alone) of the placed layers: one executable, run with any plan."""

    def __init__(self, policy, sizes, rematerialise=False, capacity=None, gradients=True):
        self.policy, self.mesh, self.gradients = policy, make_mesh(sizes), gradients
        self.topology = topology_of(self.mesh)
        function = functools.partial(placed, policy, self.mesh, rematerialise, capacity)
        if gradients:
            function = jax.grad(function, argnums=(0, 1, 2), has_aux=True)
        self.function, self.compiled = jax.jit(function), None
        self.ahead = jax.jit(jax.vmap(functools.partial(policy.ahead, topology=self.topology)))

    def run(self, problem, rows, ahead):
        place = lambda x, *spec: jax.device_put(x, NamedSharding(self.mesh, PartitionSpec(*spec)))  # noqa: E731
        store = jax.tree.map(lambda leaf: in_store(leaf, rows), problem.params["experts"])
        store = jax.tree.map(lambda leaf: place(leaf, ("fsdp", "expert")), store)
        tokens = ("data", "fsdp", "expert")
        x, mask = place(problem.x, tokens), place(problem.mask, tokens)
        everywhere = {"router": problem.params["router"]}, jnp.asarray(rows), jnp.asarray(ahead)
        router, rows_, ahead_ = jax.tree.map(place, everywhere)
        arguments = router, store, x, mask, rows_, ahead_
        if self.compiled is None:
            with jax.set_mesh(self.mesh):
                self.compiled = self.function.lower(*arguments).compile()
        result, (y, measured) = self.compiled(*arguments)
        if not self.gradients:
            return {"y": y}, jax.device_get(measured)
        router, store, x = result
        experts = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], store)
        return {"y": y, "x": x, "router": router["router"], **experts}, jax.device_get(measured)


def in_store(leaf, rows):
    """[L, E, ...] -> [L E, ...] with expert e of layer l in rows[l, e]."""
    store = np.zeros((rows.size, *leaf.shape[2:]), np.float32)
    store[rows] = leaf
    return store


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.float32(random.normal(size=shape) / 2)  # noqa: E731
    experts = {"up": {"kernel": normal(L, E, WIDTH, HIDDEN)}, "down": {"kernel": normal(L, E, HIDDEN, WIDTH)}}

    class Problem:
        params = {"router": normal(L, WIDTH, E), "experts": experts}
        x, mask = normal(TOKENS, WIDTH), jnp.arange(TOKENS) % 7 != 0

    (gradient, x), (y, counts) = jax.jit(jax.grad(oracle, argnums=(0, 1), has_aux=True))(
        Problem.params, Problem.x, Problem.mask
    )
    Problem.expected = {"y": y, "x": x, "router": gradient["router"], **gradient["experts"]}
    Problem.counts = np.asarray(counts)
    return Problem


@pytest.fixture(scope="module")
def kept():
    return Program(POLICY, MESH)


@pytest.fixture(scope="module")
def remade():
    return Program(POLICY, MESH, rematerialise=True)


EVEN = sharding.even_rows(L, E)


def uneven(problem):
    home = sharding.plan_shards(problem.counts, Topology(2, 4), reach=8, most=4)
    assert np.ptp(sharding.owned(sharding.assign_rows(EVEN, home, D), D)) > 0
    return sharding.assign_rows(EVEN, home, D)


def plans(problem, program):
    """(rows, copies int32[L, D, 3]) of several kinds."""
    owner = lambda rows: jnp.asarray(sharding.homes(rows, D))  # noqa: E731
    load = jnp.asarray(problem.counts)
    none = np.full((L, D, 3), -1, np.int32)
    hottest = none.copy()
    for layer in range(L):
        for device in range(D):
            lacks = [e for e in np.argsort(-problem.counts[layer])[:3] if EVEN[layer, e] // 4 != device]
            hottest[layer, device, : len(lacks)] = lacks
    other = uneven(problem)
    return {
        "none": (EVEN, none),
        "hot on all": (EVEN, hottest),
        "by load": (EVEN, np.asarray(program.ahead(load, owner(EVEN)))),
        "by load, uneven homes": (other, np.asarray(program.ahead(load, owner(other)))),
    }


def close(found, expected):
    # Sums of a few dozen float32 products in another order, through two layers: some 1e-6 of their size.
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree_util.tree_leaves_with_path(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * float(np.abs(b).max()), err_msg=str(path))


def test_any_plan_gives_the_outputs_and_gradients_of_one_device(problem, kept, remade):
    for name, (rows, copies) in plans(problem, kept).items():
        found, measured = kept.run(problem, rows, copies)
        close(found, problem.expected)
        again, _ = remade.run(problem, rows, copies)
        close(again, found)  # two programs, which XLA rounds differently
        # Bytes are those of the slots that are not empty; lambda counts the experts in them.
        full = (copies >= 0).sum(axis=(1, 2))
        assert measured["moved_bytes"].tolist() == (full * EXPERT_BYTES).tolist(), name
        moved = [len(set(layer[layer >= 0])) / E for layer in copies]
        assert measured["moved_share"].tolist() == pytest.approx(moved), name
        assert measured["dropped"].tolist() == [0, 0]


def test_copies_lower_imbalance_and_traffic(problem, kept):
    measured = {name: kept.run(problem, *plan)[1] for name, plan in plans(problem, kept).items()}
    owner = sharding.homes(EVEN, D)[0]
    load = np.bincount(owner, problem.counts[0], minlength=D)
    assert measured["none"]["imbalance"][0] == pytest.approx(load.max() / load.mean())
    assert (measured["by load"]["imbalance"] < measured["none"]["imbalance"]).all()
    assert (measured["by load"]["crossed"] < measured["none"]["crossed"]).all()


def test_collectives_of_the_compiled_loop(problem, kept, remade):
    """Two leaves a layer: gathered forward, their gradients summed backward, 4; rematerialised, gathered twice, 6."""
    counts = []
    for program in (kept, remade):
        program.run(problem, *plans(problem, program)["none"])
        text = program.compiled.as_text()
        counts.append(count_collectives(text, "all-to-all", "sparse_all_gather"))
        # Tokens and their slots go and come back, and the gradients of both journeys.
        assert count_collectives(text, "all-to-all") - counts[-1] == 5
        assert count_collectives(text, "all-gather", "sparse_all_gather") == 0
    assert counts == [4, 6]


def device_counts(problem):
    """int[D, E]: the choices of each device's own tokens in the first layer."""
    logits = problem.x @ problem.params["router"][0] - 0.2 * jnp.arange(E)
    index, mask = (
        np.asarray(route(logits, K).index).reshape(D, -1, K),
        np.asarray(problem.mask).reshape(D, -1),
    )
    return np.stack([np.bincount(i[m].reshape(-1), minlength=E) for i, m in zip(index, mask, strict=True)])


def test_expert_parallelism_with_a_capacity_drops_what_does_not_fit(problem):
    program = Program(ExpertParallel(), {"expert": D}, capacity=2.0, gradients=False)
    found, measured = program.run(problem, EVEN, np.zeros((L, D, 0), np.int32))
    counts = device_counts(problem)
    assert (counts.sum(0) == problem.counts[0]).all()
    # Eight tokens of two choices a device: 16 choices, an even share is 2, twice that is 4 a pair of devices.
    flow = np.stack([counts[:, 2 * d : 2 * d + 2].sum(1) for d in range(D)], axis=1)
    away = flow * (1 - np.eye(D, dtype=int))
    lost = np.maximum(away - 4, 0).sum()
    assert lost > 0 and measured["dropped"][0] == lost
    assert measured["crossed"][0] == pytest.approx(away.sum() / flow.sum())
    assert not np.allclose(found["y"], problem.expected["y"], atol=1e-3)


def test_fsdp_of_the_experts(problem):
    program = Program(FullySharded(), {"expert": D})
    ahead = program.ahead(jnp.asarray(problem.counts), jnp.asarray(sharding.homes(EVEN, D)))
    found, measured = program.run(problem, EVEN, ahead)
    close(found, problem.expected)
    # Two leaves: cut and sent, gathered; backward the sums of the pieces, sent home. No token travels.
    text = program.compiled.as_text()
    kinds = ("all-to-all", "all-gather", "reduce-scatter")
    assert [count_collectives(text, kind, "sparse_all_gather") for kind in kinds] == [4, 2, 2]
    assert count_collectives(text, "all-to-all") == 4
    assert measured["crossed"].tolist() == [0, 0]
    assert measured["moved_bytes"].tolist() == [(D - 1) * E * EXPERT_BYTES] * 2


def test_shadowing_copies_to_all_or_none(problem):
    cost = CostModel(flops=1e9, bandwidth=1e12, node_bandwidth=1e12, latency=0.0)
    program = Program(Replicated(most=4, cost=cost), {"expert": D}, gradients=False)
    found, measured = program.run(problem, EVEN, np.zeros((L, D, 0), np.int32))
    close(found, {"y": problem.expected["y"]})
    copies = measured["moved_bytes"] / EXPERT_BYTES
    assert (copies > 0).all() and (copies % (D - 1) == 0).all()


def test_nothing_is_copied_after_the_gate_where_it_costs_more_than_it_saves(problem):
    counts, owner = jnp.asarray(device_counts(problem)), jnp.asarray(sharding.homes(EVEN, D)[0])
    work = Work(expert_bytes=10**9, token_bytes=32, token_flops=128)
    none = jnp.full((D, 0), -1, jnp.int32)
    for policy in (FSSDP(memory=0, calibration=2), Replicated(most=4)):
        late = jax.jit(lambda *x, policy=policy: policy.late(*x, Topology(1, D), work, True))
        assert (late(counts, none, owner) == -1).all()


def test_rows_move_between_devices():
    mesh = make_mesh({"expert": D})
    source = np.random.default_rng(2).permutation(L * E).astype(np.int32)
    leaf = jnp.arange(L * E * 3.0).reshape(L * E, 3)
    spec = PartitionSpec("expert")
    move = functools.partial(permute_rows, axes=("expert",))
    move = jax.shard_map(move, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(move)(leaf, source), leaf[source])
    np.testing.assert_array_equal(permute_rows(leaf, jnp.asarray(source), ()), leaf[source])


def test_experts_that_do_not_divide_are_an_error():
    with pytest.raises(
        UserError, match="placement: 12 experts do not divide over the 8 devices of the expert axes"
    ):
        check_divides(12, 8, "placement")
