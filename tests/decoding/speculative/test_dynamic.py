"""Dynamic trees: a table by hand, and random tables against a plain Python search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.speculative.dynamic import build_dynamic_tree, dynamic_draft
from research.decoding.tree import static_tree

#   place        0     1     2     3     4     5     6
PARENT = jnp.asarray([-1, -1, 0, 0, 1, 2, 4])
# Probabilities of the paths: 0.6, 0.4 | 0.6 * 0.5 = 0.3, 0.6 * 0.2 = 0.12, 0.4 * 0.9 = 0.36 | 0.3 * 0.5 = 0.15,
# 0.36 * 1 = 0.36.
SCORES = jnp.log(jnp.asarray([0.6, 0.4, 0.3, 0.12, 0.36, 0.15, 0.36]))


def test_best_candidates_by_hand():
    """The best five are 0 (.6), 1 (.4), 4 (.36), 6 (.36, as good as its parent 4), 2 (.3)."""
    tree, chosen = build_dynamic_tree(SCORES[None], PARENT, 5, levels=4, width=2)
    assert chosen.tolist() == [[0, 1, 2, 4, 6]]
    # In the order of the table: nodes 1 and 2 below the root, 3 (place 2) below place 0 = node 1, 4 (place 4)
    # below place 1 = node 2, 5 (place 6) below place 4 = node 4.
    expected = static_tree([-1, 0, 0, 1, 2, 4])
    for name in ("parent", "depth", "rank", "mask", "real"):
        assert np.array_equal(getattr(tree, name)[0], getattr(expected, name)), name
    assert (tree.size, tree.levels, tree.width) == (6, 4, 2)


def test_of_equal_scores_the_parent_is_kept():
    """A sure thing: places 0 and 1 both have probability 1, and one of them has room."""
    scores, parent = jnp.zeros((1, 2)), jnp.asarray([-1, 0])
    tree, chosen = build_dynamic_tree(scores, parent, 1, levels=3, width=1)
    assert chosen.tolist() == [[0]] and tree.parent.tolist() == [[-1, 0]]


def test_too_few_candidates_leave_padding_that_is_not_real():
    scores = jnp.where(jnp.asarray([1, 0, 1, 0, 0, 1, 0], bool), SCORES, -jnp.inf)
    tree, chosen = build_dynamic_tree(scores[None], PARENT, 5, levels=4, width=2)
    assert tree.real.tolist() == [[True, True, True, True, False, False]]
    assert chosen[0, :3].tolist() == [0, 2, 5]  # a chain: 0, its child 2, its child 5
    assert tree.parent.tolist() == [[-1, 0, 1, 2, 0, 0]]
    assert tree.depth.tolist() == [[0, 1, 2, 3, 1, 1]]
    assert bool(jnp.all((chosen >= 0) & (chosen < 7)))


def test_no_candidate_at_all():
    tree, _ = build_dynamic_tree(jnp.full((1, 7), -jnp.inf), PARENT, 3, levels=4, width=2)
    assert tree.real.tolist() == [[True, False, False, False]]
    assert tree.parent.tolist() == [[-1, 0, 0, 0]]


def test_rows_have_their_own_tree_and_tokens():
    tokens = jnp.asarray([[10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 26]])
    parents = jnp.stack([PARENT, jnp.asarray([-1, 0, 1, 2, 3, 4, 5])])  # the second row: a chain of seven
    scores = jnp.stack([SCORES, -jnp.arange(7.0)])
    draft = dynamic_draft(jnp.asarray([1, 2]), tokens, scores, parents, 3, levels=4, width=2)
    # Row 0 keeps places 0, 1 and 4 (.36, before the equal 6); row 1 the first three of its chain.
    assert draft.tokens.tolist() == [[1, 10, 11, 14], [2, 20, 21, 22]]
    assert draft.tree.parent.tolist() == [[-1, 0, 0, 2], [-1, 0, 1, 2]]
    assert draft.q is None


@pytest.mark.parametrize("budget", [1, 6, 13])
def test_equals_a_plain_search(budget):
    """Random tables of 2 + 4 + 8 candidates, two children each, some without: a loop over the sorted
    candidates gives the same nodes, ancestors included."""
    parent = np.asarray([-1, -1, 0, 0, 1, 1, *np.repeat(np.arange(2, 6), 2)])
    rng = np.random.default_rng(0)
    scores = np.log(rng.uniform(0.05, 1.0, (32, 14)))
    for place in range(2, 14):
        scores[:, place] += scores[:, parent[place]]
    scores[rng.uniform(size=scores.shape) < 0.1] = -np.inf
    for place in range(2, 14):  # nothing hangs below what is not there
        scores[np.isneginf(scores[:, parent[place]]), place] = -np.inf
    build = jax.jit(functools.partial(build_dynamic_tree, budget=budget, levels=4, width=14))
    tree, chosen = build(jnp.asarray(scores, jnp.float32), jnp.asarray(parent))
    for row in range(len(scores)):
        best = [
            place for place in np.argsort(-scores[row], kind="stable")[:budget] if scores[row, place] > -9e9
        ]
        kept = sorted(best)
        real = np.asarray(tree.real[row, 1:])
        assert np.asarray(chosen[row])[real].tolist() == kept
        above = [0 if parent[place] < 0 else kept.index(parent[place]) + 1 for place in kept]
        assert np.asarray(tree.parent[row, 1:])[real].tolist() == above
        assert all(int(tree.parent[row, node]) < node for node in range(budget + 1))


@pytest.mark.parametrize("budget", [0, 8])
def test_more_nodes_than_candidates_is_refused(budget):
    with pytest.raises(ValueError, match=f"a tree of {budget} of 7 candidates"):
        build_dynamic_tree(SCORES[None], PARENT, budget, levels=4, width=2)
