"""Virtual rows: tables and masks by hand; many anchors at once against one text at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.speculative.virtual import (
    Chains,
    Inserted,
    draw_anchors,
    lay_out,
    multi_anchor_mask,
    run_anchored,
)
from research.errors import UserError
from research.nn.cache import RingCache
from research.nn.transformer import scan_params

from .virtual_cases import VOCAB, WIDTH, close, extend, make_batch, target


def test_tables_by_hand():
    # The root, its two best guesses and one below the first, with 2, 1, 0 and 1 virtual nodes; the root alone.
    layout = lay_out([Chains(((0,), (1,), (0, 0)), (2, 1, 0, 1)), Chains((), (1,))], top=2)
    tree = layout.tree
    # Step 0 under nodes 0, 1 and 3 is 4, 5 and 6; step 1 under the root is 7, below 4.
    assert tree.parent.tolist() == [[-1, 0, 0, 1, 0, 1, 3, 4], [-1, 0, 0, 0, 0, 0, 0, 0]]
    assert tree.depth[0].tolist() == [0, 1, 1, 2, 1, 2, 3, 2]
    assert tree.real.tolist() == [[True] * 4 + [False] * 4, [True] + [False] * 7]
    assert (tree.size, tree.levels, layout.virtual) == (8, 3, 4)  # the deepest candidate is at depth 2
    assert np.flatnonzero(tree.mask[0, 6]).tolist() == [0, 1, 3, 6]
    assert not tree.mask[:, :4, 4:].any()  # no real node sees a virtual one
    assert layout.index.tolist() == [[0, 1, 2], [0, 0, 0]]  # two guesses a head
    assert layout.step.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert layout.row[0, :, :, 0].tolist() == [[4, 7], [5, 0], [0, 0], [6, 0]]
    assert layout.row[1, 0, :, 0].tolist() == [4, 0]
    assert layout.count.tolist() == [[2, 1, 0, 1], [1, 0, 0, 0]]
    rows = layout.at(jnp.asarray([1, 0, 0]))
    assert rows.tree.parent.tolist() == [tree.parent[s].tolist() for s in (1, 0, 0)]
    guesses = jnp.asarray([[[10, 11], [20, 21]]] * 3)
    assert rows.tokens(jnp.asarray([7, 8, 9]), guesses)[1].tolist() == [8, 10, 11, 20, 0, 0, 0, 0]


def test_copies_are_chains_beside_each_other():
    layout = lay_out([Chains(((0,),), (2, 1))], top=1, copies=2)
    # Nodes 0, 1; step 0: copy 0 under 0 and 1 is 2 and 3, copy 1 is 4 and 5; step 1, under the root: 6 and 7.
    assert layout.tree.parent[0].tolist() == [-1, 0, 0, 1, 0, 1, 2, 4]
    assert layout.copy[0].tolist() == [0, 0, 1, 1, 0, 1]
    assert layout.row[0].tolist() == [[[2, 4], [6, 7]], [[3, 5], [0, 0]]]
    assert np.flatnonzero(layout.tree.mask[0, 7]).tolist() == [0, 4, 7]


@pytest.mark.parametrize(
    "paths, counts, message",
    [
        (((0,),), (1,), "a tree of 2 nodes"),
        (((0,),), (1, -1), "none negative"),
        (((0, 0), (0,)), (1, 1, 1), "by depth"),
        (((1,),), (1, 1), r"not \(0,\)"),
    ],
)
def test_wrong_chains_are_refused(paths, counts, message):
    with pytest.raises(UserError, match=message):
        Chains(paths, counts)


def test_the_mask_by_hand():
    """Documents of two tokens each; anchors 1 and 2, two virtual rows each: rows 4, 6 and 5, 7."""
    mask = multi_anchor_mask(jnp.asarray([[1, 1, 2, 2]]), jnp.asarray([[1, 2]]), np.tri(2, dtype=bool))
    expected = [
        "1000 0000",
        "1100 0000",
        "0010 0000",
        "0011 0000",
        "1100 1000",
        "0010 0100",
        "1100 1010",
        "0010 0101",
    ]
    assert [
        "".join(str(int(x)) for x in row[:4]) + " " + "".join(str(int(x)) for x in row[4:]) for row in mask[0]
    ] == expected


def test_drawn_anchors():
    eligible = jnp.asarray([[0, 1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0]], bool)
    seen = set()
    for seed in range(8):
        anchors, drawn = draw_anchors(eligible, 3, jax.random.key(seed))
        assert (jnp.diff(anchors, axis=1) > 0).all()  # different places, in order
        assert drawn[0].all() and drawn[1].sum() == 1 and 4 in anchors[1]
        assert drawn.tolist() == np.take_along_axis(np.asarray(eligible), np.asarray(anchors), 1).tolist()
        seen |= set(anchors[0].tolist())
    assert seen == {1, 3, 4, 6, 7}
    first, second = (draw_anchors(eligible, 3, None)[0] for _ in range(2))
    assert first.tolist() == second.tolist()
    anchors, drawn = draw_anchors(eligible, None, jax.random.key(0))
    assert anchors.tolist() == [list(range(8))] * 2 and drawn.tolist() == eligible.tolist()


@pytest.mark.parametrize("scanned", [False, True])
def test_many_anchors_at_once_are_one_text_at_a_time(scanned):
    """Two virtual rows behind places 1 .. 8 of a text, and behind places of two packed documents, against a
    cache that holds the document up to that place and nothing else."""
    found, batch = target(), make_batch()
    anchors = jnp.asarray([[1, 4, 5, 8], [1, 3, 5, 7]])
    states = jax.random.normal(jax.random.key(2), (2, WIDTH))
    if scanned:
        found = found.replace(params=scan_params(found.params, 2), model=found.model.clone(scan_layers=True))

    @jax.jit
    def run(found, batch, anchors, rows):
        return run_anchored(found, batch, anchors, rows, np.tri(2, dtype=bool), (1, 2))

    rows = Inserted(jnp.repeat(states, 4, axis=0)[None])
    tokens, virtual = run(found, batch, anchors, rows)
    assert tokens.shape == (2, 9, VOCAB) and virtual.shape == (2, 2, 4, VOCAB)

    found = target()
    apply = jax.jit(lambda params, *args: found.model.apply({"params": params}, *args))
    close(tokens, apply(found.params, batch["tokens"], batch["positions"], batch["segments"]))
    # Documents up to an anchor: (row, begin, anchor); the last token is not yet in the cache.
    cases = [(0, 0, 1), (0, 0, 4), (0, 0, 5), (0, 0, 8), (1, 0, 1), (1, 0, 3), (1, 4, 5), (1, 4, 7)]
    prompts = np.zeros((8, 9), np.int32)
    for i, (row, begin, anchor) in enumerate(cases):
        prompts[i, : anchor - begin] = batch["tokens"][row, begin:anchor]
    lengths = jnp.asarray([anchor - begin for _, begin, anchor in cases])
    newest = jnp.asarray([[batch["tokens"][row, anchor]] for row, _, anchor in cases])

    @jax.jit
    def read(params, prompts, lengths):
        _, _, fresh = found.model.apply({"params": params}, prompts, lengths, method="prefill")
        return found.model.init_cache(8, 16, margin=4).commit(fresh, None, lengths)

    cache = read(found.params, jnp.asarray(prompts), lengths)
    assert isinstance(cache.layers[0], RingCache)
    alone = extend(cache, newest, virtual=Inserted(states[None]))[0]
    close(virtual, alone[:, 1:].reshape(2, 4, 2, VOCAB).swapaxes(1, 2))
