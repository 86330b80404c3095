"""Trees of ranks: their tables by hand, the search against all trees, the measurement against top_k."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.speculative.trees import (
    Expansion,
    RankTree,
    build_static_tree,
    calibrate,
    chain_paths,
    expected_tokens,
    rank_hits,
)
from research.errors import UserError

PATHS = ((1,), (0,), (0, 0), (0, 1), (1, 0), (0, 1, 0))


def test_tables_by_hand():
    ranks = RankTree(PATHS)
    # Nodes 1..6, by depth and then ranks.
    assert ranks.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0))
    assert ranks.tree.parent.tolist() == [-1, 0, 0, 1, 1, 2, 4]
    assert ranks.tree.rank.tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert (ranks.size, ranks.levels, ranks.top) == (7, 4, 2)
    # Two guesses a head: head 1 at 0..1, head 2 at 2..3, head 3 at 4..5.
    assert ranks.index.tolist() == [0, 1, 2, 3, 2, 4]
    assert ranks.expansions == (
        Expansion(nodes=(0,), width=2, parent=(0, 0), rank=(0, 1)),
        Expansion(nodes=(1, 2), width=2, parent=(0, 0, 1), rank=(0, 1, 0)),
        Expansion(nodes=(4,), width=1, parent=(0,), rank=(0,)),
    )
    guesses = jnp.asarray([[[10, 11, 12], [20, 21, 22], [30, 31, 32], [40, 41, 42]]])  # more than it reads
    draft = ranks.draft(jnp.asarray([9]), guesses)
    assert draft.tokens.tolist() == [[9, 10, 11, 20, 21, 20, 30]]


def test_equal_trees_are_one_static_value():
    assert RankTree(PATHS) == RankTree(tuple(reversed(PATHS)))
    assert hash(RankTree(PATHS)) == hash(RankTree([list(path) for path in PATHS]))
    assert RankTree(chain_paths(3)).tree.parent.tolist() == [-1, 0, 1, 2]


def test_every_node_sees_its_ancestors():
    tree = RankTree(build_static_tree(np.full((4, 5), 0.3), 63)).tree
    assert tree.size == 64
    assert np.array_equal(tree.mask.sum(1), tree.depth + 1)
    assert np.array_equal(tree.depth[1:], tree.depth[tree.parent[1:]] + 1)


@pytest.mark.parametrize(
    "paths, message",
    [
        ((), "at least one path"),
        (((0,), (0,)), r"\(0,\) twice"),
        (((0,), (1, 0)), r"\(1, 0\) and not its parent \(1,\)"),
        (((0,), (2,)), r"\(2,\) and not \(1,\)"),
        (((0,), (-1,)), "ranks begin at 0"),
    ],
)
def test_what_is_no_tree_is_told(paths, message):
    with pytest.raises(UserError, match=message):
        RankTree(paths)


def all_trees(heads: int, ranks: int, budget: int):
    """Every set of `budget` paths that is a tree: closed under parents and better siblings."""
    paths = [p for depth in range(1, heads + 1) for p in itertools.product(range(ranks), repeat=depth)]
    for chosen in itertools.combinations(paths, budget):
        try:
            yield RankTree(chosen).paths
        except UserError:
            continue


@pytest.mark.parametrize("heads, ranks, budget", [(3, 2, 5), (2, 3, 4), (2, 3, 6), (3, 2, 7)])
def test_the_search_finds_the_best_of_all_trees(heads, ranks, budget):
    for seed in range(4):
        accuracy = -np.sort(
            -np.random.default_rng(seed).dirichlet(np.ones(ranks + 1), heads)[:, :ranks], axis=1
        )
        found = build_static_tree(accuracy, budget)
        best = max(expected_tokens(accuracy, paths) for paths in all_trees(heads, ranks, budget))
        assert RankTree(found).paths == found
        assert expected_tokens(accuracy, found) == pytest.approx(best, abs=1e-12)


def test_the_search_by_hand():
    accuracy = [[0.5, 0.25], [0.5, 0.375]]
    # Values: (0,) .5, (1,) .25, (0,0) .25, (0,1) .1875, (1,0) .125, (1,1) .09375.
    assert build_static_tree(accuracy, 1) == ((0,),)
    assert build_static_tree(accuracy, 4) == ((0,), (1,), (0, 0), (0, 1))
    assert expected_tokens(accuracy, build_static_tree(accuracy, 4)) == 1 + 0.5 + 0.25 + 0.25 + 0.1875
    # Nothing is worth anything: the tree is filled by depth and rank.
    assert build_static_tree([[0.0, 0.0], [0.5, 0.5]], 3) == ((0,), (1,), (0, 0))


def test_a_rank_out_of_order_counts_as_the_one_before():
    # 0.4 at rank 2 counts as 0.1: else (2,) would be wanted before (0, 0) and need (1,) first.
    assert build_static_tree([[0.5, 0.1, 0.4], [0.5, 0.1, 0.0]], 3) == ((0,), (1,), (0, 0))
    assert build_static_tree([[0.5, 0.1, 0.4], [0.5, 0.1, 0.0]], 2) == ((0,), (0, 0))


def test_a_search_that_cannot_be_is_told():
    with pytest.raises(UserError, match="1 to 6 paths, not 7"):
        build_static_tree(np.full((2, 2), 0.5), 7)
    with pytest.raises(UserError, match="shares from 0 to 1"):
        build_static_tree([[1.5]], 1)


def test_hits_are_those_of_top_k():
    logits = jax.random.randint(jax.random.key(0), (3, 7, 6), 0, 4).astype(jnp.float32)  # with many ties
    labels = jax.random.randint(jax.random.key(1), (3, 7), 0, 6)
    weights = jax.random.bernoulli(jax.random.key(2), 0.7, (3, 7)).astype(jnp.float32)
    best = jax.lax.top_k(logits, 4)[1]
    expected = jnp.sum((best == labels[..., None]) * weights[..., None], (0, 1))
    hits, weight = rank_hits((logits, labels, weights), 4)
    assert hits.tolist() == expected.tolist() and float(weight) == float(weights.sum())


class Echo:
    """Two heads that say what the batch tells them to."""

    def forced(self, params, teacher, batch):
        ones = jnp.ones_like(batch["tokens"], jnp.float32)
        return [
            (params[batch["tokens"]], batch["targets"], ones),
            (params[batch["tokens"]], batch["tokens"], ones),
        ]


def test_calibration_adds_batches_up():
    table = jnp.asarray([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])
    # Guesses after 0: 0 1 2; after 1: 1 2 0; after 2: 2 0 1. Ranks of the targets: 0 1 2 | 0 0 1.
    batches = [
        {"tokens": np.asarray([[0, 0, 1]]), "targets": np.asarray([[0, 1, 0]])},
        {"tokens": np.asarray([[2, 1, 2]]), "targets": np.asarray([[2, 1, 0]])},
    ]
    accuracy = calibrate(Echo(), table, None, batches, top=2)
    assert accuracy.tolist() == [pytest.approx([3 / 6, 2 / 6]), [1.0, 0.0]]
    with pytest.raises(UserError, match="no place"):
        calibrate(Echo(), table, None, [])
