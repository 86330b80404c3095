"""Drafted trees: what a proposer asks the model to score in one call.

Node 0 is the root, the newest token that is certain and not yet in the cache; plain decoding is the tree of
that one node. Parents come before their children. A static tree holds numpy constants [N]; a dynamic one,
chosen anew in every call, holds arrays with a row for every sequence, [B, N].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


class Tree(struct.PyTreeNode):
    """The shape of a draft of N nodes.

    parent int32[..., N], -1 for the root; depth int32[..., N], 0 for the root; rank int32[..., N], the place
    of a node among its siblings; mask bool[..., N, N], mask[v, u] where u is v or an ancestor of v; real
    bool[..., N], False on nodes that are computed but never accepted: padding, and virtual nodes that only
    carry hidden states. `levels` is one more than the greatest depth, `width` the greatest number of
    siblings.
    """

    parent: Array
    depth: Array
    rank: Array
    mask: Array
    real: Array
    levels: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        """N."""
        return self.parent.shape[-1]


def static_tree(parents: Sequence[int], real: Sequence[bool] | None = None) -> Tree:
    """The tree whose node v has parent parents[v]; parents[0] is -1.

    Raises:
        ValueError: a node that does not come after its parent, or a second root.
    """
    parent = np.asarray(parents, np.int32)
    if parent.ndim != 1 or not len(parent) or parent[0] != -1:
        raise ValueError(f"parents must begin with -1, the root: {list(parents)}")
    for node, above in enumerate(parent[1:], 1):
        if not 0 <= above < node:
            raise ValueError(f"node {node} has parent {above}: a parent is a node before it")
    mask = np.eye(len(parent), dtype=bool)
    rank = np.zeros(len(parent), np.int32)
    for node in range(1, len(parent)):
        mask[node] |= mask[parent[node]]
        rank[node] = np.sum(parent[:node] == parent[node])
    depth = mask.sum(1, dtype=np.int32) - 1
    flags = np.ones(len(parent), bool) if real is None else np.asarray(real, bool)
    return Tree(parent, depth, rank, mask, flags, int(depth.max()) + 1, int(rank.max()) + 1)


def chain(length: int) -> Tree:
    """The root and `length` - 1 tokens below it, one after the other."""
    return static_tree(range(-1, length - 1))


def dynamic_tree(parent: jax.Array, real: jax.Array, *, levels: int, width: int) -> Tree:
    """A tree for every row, from traced parents int32[B, N] (-1 for the root) and flags bool[B, N].

    No node may be deeper than `levels` - 1 or have more than `width` children. Padding nodes hang anywhere
    and are not real.
    """
    count = parent.shape[-1]
    step = (parent[..., None] == jnp.arange(count)) | jnp.eye(count, dtype=bool)
    mask = step
    for _ in range(
        (levels - 2).bit_length() if levels > 2 else 0
    ):  # after k squarings paths of 2^k steps are seen
        mask = jnp.einsum("...vu,...uw->...vw", mask.astype(jnp.float32), mask.astype(jnp.float32)) > 0
    depth = jnp.sum(mask, -1, dtype=jnp.int32) - 1
    siblings = (parent[..., :, None] == parent[..., None, :]) & jnp.tril(jnp.ones((count, count), bool), -1)
    rank = jnp.sum(siblings, -1, dtype=jnp.int32)
    return Tree(parent, depth, rank, mask, real, levels, width)
