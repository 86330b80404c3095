"""Dynamic trees: the best of the candidates that a drafter scored in this call, a tree for every row.

A drafter fills a static table of M candidates, level by level. Candidate i stands for a token below candidate
parent[i], and its score is that of its whole path (a sum of log-probabilities). The best ones are packed into
a tree, as in EAGLE-2 (arXiv 2406.16858, section 4.2) and Clover (arXiv 2405.00263).
"""

import jax
import jax.numpy as jnp

from research.decoding.tree import Tree, dynamic_tree
from research.decoding.verify import Draft


def build_dynamic_tree(
    scores: jax.Array, parent: jax.Array, budget: int, *, levels: int, width: int
) -> tuple[Tree, jax.Array]:
    """The root and the `budget` candidates with the highest scores.

    scores float32[B, M], -inf where a place of the table holds no candidate, falling or equal along every
    path; parent int32[M] or [B, M], places in the table, earlier than their children's, or -1 for the root.
    Because a parent scores no less and comes earlier (the earlier of equals is kept), it is kept with its
    child. `levels` and `width` bound the tree, as in `dynamic_tree`.

    Returns the tree of N = budget + 1 nodes, in the order of the table, and chosen int32[B, budget]: the
    place in the table of every node but the root. Where there are fewer candidates the last nodes are
    padding: not real, children of the root, `chosen` meaningless but in range.
    """
    batch, count = scores.shape
    if not 1 <= budget <= count:
        raise ValueError(f"a tree of {budget} of {count} candidates")
    best, place = jax.lax.top_k(scores, budget)
    kept = best > -jnp.inf
    place = jnp.sort(jnp.where(kept, place, count), axis=1)  # parents first, padding last
    real, chosen = place < count, jnp.minimum(place, count - 1)
    above = jnp.take_along_axis(jnp.broadcast_to(parent, (batch, count)), chosen, axis=1)
    node = jnp.argmax(above[:, :, None] == place[:, None, :], axis=-1).astype(jnp.int32) + 1
    node = jnp.where(real & (above >= 0), node, 0)
    first = jnp.full((batch, 1), -1, jnp.int32)
    flags = jnp.concatenate([jnp.ones((batch, 1), bool), real], axis=1)
    tree = dynamic_tree(jnp.concatenate([first, node], axis=1), flags, levels=levels, width=width)
    return tree, chosen


def dynamic_draft(
    root: jax.Array,
    tokens: jax.Array,
    scores: jax.Array,
    parent: jax.Array,
    budget: int,
    *,
    levels: int,
    width: int,
) -> Draft:
    """The draft of `build_dynamic_tree`: root int32[B], tokens int32[B, M] of the candidates.

    Siblings must carry different tokens.
    """
    tree, chosen = build_dynamic_tree(scores, parent, budget, levels=levels, width=width)
    return Draft(jnp.concatenate([root[:, None], jnp.take_along_axis(tokens, chosen, axis=1)], axis=1), tree)
