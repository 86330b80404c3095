"""MoA's search: influence against brute force, spans and losses by hand, the solver against exhaustive search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.masks import Causal, Window
from research.sparse.moa.influence import Tapped, influence
from research.sparse.moa.rules import DENSE, Grid, Rule, candidates, densities, losses
from research.sparse.moa.solve import Program, pareto_front


def brute_force(scores, gradient):
    """E of every entry: it is masked, the row renormalised, and <g, A' - A> taken. Rows of several entries."""
    expected = np.zeros_like(scores)
    for i, row in enumerate(scores):
        full = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        for j in np.nonzero(full)[0]:
            cut = np.where(np.arange(len(row)) == j, 0.0, full)
            if cut.sum() > 0:
                expected[i, j] = gradient[i] @ (cut / cut.sum() - full)
    return expected


def example(length=7, scale=1.0):
    rng = np.random.default_rng(0)
    scores = np.where(np.tri(length) > 0, scale * rng.normal(size=(length, length)), -1e30)
    return scores, rng.normal(size=(length, length))


def test_influence_is_the_first_order_change_of_the_loss():
    scores, gradient = example()
    compiled = jax.jit(influence)
    with jax.enable_x64(True):
        found = np.asarray(compiled(jnp.asarray(scores), jnp.asarray(gradient)))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(found[1:], brute_force(scores, gradient)[1:], rtol=0, atol=1e-12)
    assert found[0, 0] == -gradient[0, 0]
    # sum_j E_ij (1 - A_ij) = sum_j A_ij (sum_n g_n A_n - g_j) = 0.
    np.testing.assert_allclose((found * (1 - weights)).sum(-1), 0.0, atol=1e-12)
    # A of 1 - 1e-9 is 1 in float32. Scores of up to 60 are rounded to 4e-6, and so is the relative error of exp.
    scores, gradient = example(scale=20.0)
    single = np.asarray(compiled(jnp.asarray(scores, jnp.float32), jnp.asarray(gradient, jnp.float32)))
    np.testing.assert_allclose(single[1:], brute_force(scores, gradient)[1:], rtol=2e-5, atol=1e-7)


def test_a_tap_gathers_the_influence_by_blocks_and_leaves_the_gradient_alone():
    rng = np.random.default_rng(1)
    query, cotangent = (jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32) for _ in range(2))
    key, value = (jnp.asarray(rng.normal(size=(2, 2, 6, 3)), jnp.float32) for _ in range(2))
    numbers = dict(segments=None, prefix=None, scale=0.5, softcap=None)

    def loss(tap, query):
        out = Tapped(tap, 2)(query, key, value, Causal(), **numbers)
        return jnp.sum(out * cotangent)

    def plain(query):
        scores = jnp.einsum("bhid,bhjd->bhij", query, jnp.repeat(key, 2, 1)) * 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(6) > 0, scores, -1e30))
        return jnp.sum(jnp.einsum("bhij,bhjd->bhid", weights, jnp.repeat(value, 2, 1)) * cotangent), scores

    tapped = jax.jit(jax.grad(loss, (0, 1)))(jnp.zeros((4, 3, 3)), query)
    gradient, scores = jax.jit(jax.grad(plain, has_aux=True))(query)
    np.testing.assert_allclose(tapped[1], gradient, atol=1e-5)
    expected = np.zeros((4, 3, 3))
    for row, head in np.ndindex(2, 4):
        g = np.asarray(cotangent[row, head] @ value[row, head // 2].T, np.float64)
        entries = np.where(np.tri(6) > 0, np.asarray(scores[row, head], np.float64), -1e30)
        cost = np.abs(brute_force(entries, g))
        cost[0, 0] = abs(g[0, 0])  # by definition
        expected[head] += cost.reshape(3, 2, 3, 2).sum((1, 3))
    np.testing.assert_allclose(tapped[0], expected, rtol=1e-4)


def test_spans():
    grid = Grid(sinks=4, block=4)
    assert [grid.span(Rule(-16, 0.5), n) for n in (64, 128, 256)] == [
        16,
        48,
        112,
    ]  # b N more for twice the length
    assert [grid.span(Rule(24, 0.0), n) for n in (64, 128, 256)] == [24, 24, 24]
    assert grid.span(Rule(0, 1 / 8), 16) == 8  # sinks and a block at least, not 2
    assert grid.span(Rule(40, 0.0), 32) == 32  # no more than there is
    assert [grid.span(DENSE, n) for n in (16, 64)] == [16, 64]
    assert densities([Rule(24, 0.0), DENSE], 64, grid).tolist() == [0.375, 1.0]
    for wrong in (lambda: Grid(sinks=6, block=4), lambda: grid.blocks(30), lambda: grid.blocks(8)):
        with pytest.raises(UserError):
            wrong()


def test_candidates():
    grid = Grid(sinks=4, block=4)
    found = candidates((16, 32), (64,), 8, (0.0, 0.5, 1.0), grid)
    # a + b 16 > 0 and a + b N <= N at 32 and at 64; Rule(0, 0) and Rule(8, 0) at 8 tokens each would be twins.
    fixed, half = [Rule(a, 0.0) for a in (8, 16, 24, 32)], [Rule(a, 0.5) for a in (0, 8, 16)]
    assert found == [*fixed[:3], half[0], fixed[3], *half[1:], Rule(-8, 1.0), DENSE]


def test_losses_are_those_of_the_masks():
    """With blocks of one token the loss is the influence of just the entries that the head's mask hides."""
    grid, rng = Grid(sinks=2, block=1), np.random.default_rng(0)
    entries = rng.random((3, 8, 8)) * np.tri(8)
    rules = [Rule(3, 0.0), Rule(0, 0.5), Rule(-1, 0.75), DENSE]
    found = losses(entries, rules, 8, grid)
    places = jnp.arange(8)[None]
    for r, rule in enumerate(rules):
        seen = np.asarray(Window(grid.span(rule, 8) - 2, sinks=2).allowed(places, places, None))[0, 0]
        np.testing.assert_allclose(found[:, r], (entries * ~seen).sum((1, 2)), atol=1e-12)
    assert (found[:, 3] == 0).all()


def test_the_solver_finds_what_exhaustive_search_finds():
    rng = np.random.default_rng(0)
    heads, rules, layer = 5, 4, np.array([0, 0, 0, 1, 1])
    density = np.array([[0.2, 0.4, 0.6, 1.0], [0.15, 0.4, 0.7, 1.0]])
    loss = np.sort(rng.random((2, heads, rules)))[..., ::-1] * np.array([1.0, 1e4])[:, None, None]
    program = Program(loss, density, layer, rho=0.6)
    feasible = [
        chosen
        for chosen in map(np.array, itertools.product(range(rules), repeat=heads))
        if all(len(set(chosen[layer == each])) <= 2 for each in (0, 1))
        and (program.densities(chosen) <= 0.6 + 1e-9).all()
        and (program.densities(chosen) >= 0.54 - 1e-9).all()
    ]
    values = np.array([program.losses(chosen) for chosen in feasible])
    assert len(feasible) > 20
    for k in (0, 1):
        np.testing.assert_allclose(program.losses(program.minimise(k))[k], values[:, k].min(), rtol=1e-6)
    front = [program.losses(chosen) for chosen in pareto_front(program, points=5)]
    best = [v for v in values if not ((values <= v).all(1) & (values < v).any(1)).any()]
    # The grid finds some of the true front, both ends of it, and nothing else.
    assert all(any(np.allclose(v, b, rtol=1e-6) for b in best) for v in front)
    np.testing.assert_allclose([front[0][0], front[-1][1]], values.min(axis=0), rtol=1e-6)
    # A greater density never costs: without a lower bound the smaller one's plans are among its own.
    series = [Program(loss, density, layer, rho, lower=0.0) for rho in (0.4, 0.5, 0.6, 1.0)]
    losses_of = [each.losses(each.minimise(0))[0] for each in series]
    assert (np.diff(losses_of) <= 1e-9).all()
    assert program.minimise(0, {1: 0.0}) is None
    with pytest.raises(
        UserError, match="no choice of rules for 5 heads has a mean density from 0.0009 to 0.001"
    ):
        pareto_front(Program(loss, density, layer, rho=0.001))
