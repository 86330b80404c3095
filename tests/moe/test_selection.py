"""Which tokens experts take, and where they lie while they are computed."""

import functools

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.moe import routing as routers
from research.moe import selection
from research.moe.selection import drop_gates, slot_count, slot_share, take_behind, token_of_slot

# One program a shape instead of one an operation.
route = jax.jit(routers.route, static_argnames=("k", "norm"))
take = jax.jit(selection.take, static_argnums=(1, 2, 3))
selection_dispatch = jax.jit(selection.selection_dispatch, static_argnums=2)

BATCH, LENGTH, EXPERTS, K = 2, 24, 4, 2


def make_routing(seed=0, mask=None):
    """Uneven choices: experts of lower numbers are preferred."""
    logits = np.random.default_rng(seed).standard_normal((BATCH * LENGTH, EXPERTS))
    logits = (logits - 0.7 * np.arange(EXPERTS)).astype(np.float32)
    mask = np.ones(BATCH * LENGTH, bool) if mask is None else mask
    return route(logits, K, norm="unit_straight_through", mask=mask)


def choices(routing):
    chosen = np.zeros((BATCH * LENGTH, EXPERTS), bool)
    np.put_along_axis(chosen, np.asarray(routing.index), True, axis=1)
    return (chosen & np.asarray(routing.mask)[:, None]).reshape(BATCH, LENGTH, EXPERTS)


def one_by_one(chosen, share):
    """The running rule as a loop: token t is taken while its expert holds fewer than ceil(share (t + 1))."""
    taken = np.zeros_like(chosen)
    for t in range(chosen.shape[1]):
        room = taken.sum(axis=1) < np.ceil(np.float32(share) * np.float32(t + 1))
        taken[:, t] = chosen[:, t] & room
    return taken


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25])
def test_the_running_rule_is_the_loop_and_never_overflows(factor):
    share = slot_share(EXPERTS, K, factor)
    assert share == factor / 2  # k / n = 2 / 4
    mask = np.arange(BATCH * LENGTH) % 7 != 3
    routing = make_routing(mask=mask)
    taken = np.asarray(take(routing, BATCH, share, False))
    expected = one_by_one(choices(routing), share)
    np.testing.assert_array_equal(taken, expected)
    assert (taken != choices(routing)).any()
    assert taken.sum(axis=1).max() <= slot_count(LENGTH, share)


def test_by_hand():
    # One expert of two is always chosen, share 1/2: it may hold 1, 1, 2, 2 of the first 1, 2, 3, 4 tokens.
    routing = route(np.array([[1.0, 0.0]] * 4, np.float32), 1, norm="unit")
    taken = take(routing, 1, slot_share(2, 1, 1.0), False)
    assert taken[0].tolist() == [[True, False], [False, False], [True, False], [False, False]]
    # Ranked: the two of four with the largest softmax, tokens 1 and 3; expert 1 has room for its only one, 2.
    routing = route(np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 0.1], [2.0, 0.0]], np.float32), 1, norm="unit")
    taken = take(routing, 1, 0.5, True)
    assert taken[0].tolist() == [[False, False], [True, False], [False, True], [True, False]]
    dispatch = selection_dispatch(routing, taken, 2)
    assert token_of_slot(dispatch).tolist() == [[1, 3], [2, 4]]  # 4: empty
    assert dispatch.slot_of_pair.tolist() == [[4], [0], [2], [1]]  # 4: token 0 was left out
    assert dispatch.counts.tolist() == [3, 1] and float(dispatch.dropped) == 1
    assert jax.jit(drop_gates)(routing, taken).gate.tolist() == [[0], [1], [1], [1]]


def test_no_factor_takes_all_choices():
    routing = make_routing()
    for ranked in (False, True):
        assert slot_share(EXPERTS, K, None) == slot_share(EXPERTS, K, 2.0) == 1.0
        np.testing.assert_array_equal(take(routing, BATCH, 1.0, ranked), choices(routing))


def test_slots_hold_each_sequences_tokens_in_order():
    routing = make_routing()
    share = slot_share(EXPERTS, K, 1.0)
    slots = slot_count(LENGTH, share)
    taken = np.asarray(take(routing, BATCH, share, False))
    dispatch = selection_dispatch(routing, taken, slots)
    tokens = np.asarray(token_of_slot(dispatch)).reshape(EXPERTS, BATCH, slots)
    for expert in range(EXPERTS):
        for row in range(BATCH):
            expected = row * LENGTH + np.flatnonzero(taken[row, :, expert])
            found = tokens[expert, row]
            assert found[: len(expected)].tolist() == expected.tolist()
            assert (found[len(expected) :] == BATCH * LENGTH).all()
    # There and back: every token as often as it was taken.
    x = np.random.default_rng(1).standard_normal((BATCH * LENGTH, 3)).astype(np.float32)
    whole = np.ones_like(routing.gate)
    back = jax.jit(lambda dispatch, x: dispatch.combine(dispatch.scatter(x), whole))(dispatch, x)
    times = taken.sum(axis=2).reshape(-1, 1)
    np.testing.assert_allclose(back, x * times, rtol=1e-6)
    assert float(dispatch.dropped) == BATCH * LENGTH * K - times.sum()


@functools.partial(jax.jit, static_argnums=4)
def behind(chosen, held, positions, tree, share):
    return take_behind(chosen, held, positions, tree, share)


@pytest.mark.parametrize("factor", [None, 0.8])
def test_behind_a_prefix_a_path_of_the_tree_is_taken_as_a_sequence_would_be(factor):
    share = slot_share(EXPERTS, K, factor)
    chosen = choices(make_routing(3))
    prefix, path = 9, [0, 1, 3, 4]
    whole = one_by_one(chosen, share)
    # Nodes 0 - 1 - 3 - 4 are the sequence's next tokens; 2 and 5 are other children of 0 and 3.
    parent = [-1, 0, 0, 1, 3, 3]
    tree = np.eye(6, dtype=bool)
    for node, above in enumerate(parent):
        if above >= 0:
            tree[node] |= tree[above]
    depth = tree.sum(axis=1) - 1
    nodes = np.random.default_rng(0).random((BATCH, 6, EXPERTS)) < 0.5
    nodes[:, path] = chosen[:, prefix : prefix + 4]
    held = whole[:, :prefix].sum(axis=1)
    positions = np.broadcast_to(prefix + depth, (BATCH, 6))
    taken, before = behind(nodes, held, positions, tree[None], share)
    np.testing.assert_array_equal(np.asarray(taken)[:, path], whole[:, prefix : prefix + 4])
    for node, t in zip(path, range(prefix, prefix + 4), strict=True):
        np.testing.assert_array_equal(before[:, node], whole[:, :t].sum(axis=1))
    # The branch at node 5 has the first three tokens of the path above it.
    branch = np.concatenate([chosen[:, : prefix + 3], nodes[:, 5:]], axis=1)
    np.testing.assert_array_equal(np.asarray(taken)[:, 5], one_by_one(branch, share)[:, -1])


def test_bad_input():
    with pytest.raises(UserError, match=r"capacity_factor=0\.0: must be positive"):
        slot_share(EXPERTS, K, 0.0)
