"""Trees: hand-drawn shapes, and dynamic ones equal to static ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.tree import chain, dynamic_tree, static_tree

#   0
#   ├── 1 ── 3 ── 5
#   │   └── 4
#   └── 2
PARENTS = [-1, 0, 0, 1, 1, 3]


def test_hand_drawn_tree():
    tree = static_tree(PARENTS)
    assert tree.depth.tolist() == [0, 1, 1, 2, 2, 3]
    assert tree.rank.tolist() == [0, 0, 1, 0, 1, 0]
    assert (tree.size, tree.levels, tree.width) == (6, 4, 2)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]
    assert tree.mask.astype(int).tolist() == expected


def test_chain_is_causal():
    tree = chain(4)
    assert tree.parent.tolist() == [-1, 0, 1, 2]
    assert np.array_equal(tree.mask, np.tril(np.ones((4, 4), bool)))
    assert (tree.levels, tree.width) == (4, 1)
    assert (chain(1).levels, chain(1).width) == (1, 1)


@pytest.mark.parametrize("parents", [PARENTS, [-1, 0, 1, 2, 3, 4], [-1, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 2, 2]])
def test_dynamic_equals_static(parents):
    static = static_tree(parents)
    make = jax.jit(lambda p, r: dynamic_tree(p, r, levels=6, width=5))
    dynamic = make(jnp.asarray([parents, PARENTS], jnp.int32), jnp.ones((2, 6), bool))
    for name in ("parent", "depth", "rank", "mask"):
        assert np.array_equal(getattr(dynamic, name)[0], getattr(static, name)), name
        assert np.array_equal(getattr(dynamic, name)[1], getattr(static_tree(PARENTS), name)), name


@pytest.mark.parametrize("parents", [[], [0], [-1, 1], [-1, 0, -1], [-1, 2, 0]])
def test_malformed_parents(parents):
    with pytest.raises(ValueError, match="parent"):
        static_tree(parents)
