"""Rows that join an `extend` between its layers: real rows never notice them, and they are what they should be.

Programs that order sums differently agree to `TOLERANCE` (see test_decoder.py); where shapes are the same,
results must be the same bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.cache import RingCache
from research.nn.masks import Causal, Window
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from tests.programs import drawn, scaled

VOCAB, WIDTH, LAYERS = 32, 16, 3
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
exactly = np.testing.assert_array_equal
LENGTHS = jnp.asarray([1, 5, 9])
PROMPTS = jax.random.randint(jax.random.key(3), (3, 12), 1, VOCAB)
NODES = jax.random.randint(jax.random.key(4), (3, 4), 1, VOCAB)
# Real nodes 0..3: the root, two children, and a child of the first.
PARENT = [-1, 0, 0, 1]


def make(rules=(Causal(),), *, norm=RMSNorm(), post_norms=False, attention=None, **fields):  # noqa: B008
    layer = dict(num_heads=4, head_dim=4, num_kv_heads=2, rotary=Rotary(), **(attention or {}))
    blocks = tuple(Block(Attention(**layer, rule=rule), GatedMLP(24), norm, post_norms) for rule in rules)
    return DecoderLM(blocks=blocks, vocab_size=VOCAB, width=WIDTH, max_length=64, num_layers=LAYERS, **fields)


MODELS = {
    "dense": make(),
    "windowed": make((Window(4),), tied_head=False),
    "mixed": make(
        (Window(4), Causal()),
        norm=RMSNorm(unit_offset=True),
        post_norms=True,
        attention=dict(softcap=5.0, scale=0.4),
        embedding_multiplier=4.0,
        logit_softcap=3.0,
    ),
}
# Before which layers groups of rows join: beside the embedding, inside, after the last; two groups, also at
# one place.
BOUNDARIES = [(0,), (1,), (LAYERS,), (0, 2), (1, LAYERS), (2, 2)]
CASES = [("mixed", layers) for layers in BOUNDARIES] + [("dense", (1,)), ("windowed", (0, 2))]


class Rows(struct.PyTreeNode):
    """Groups of given states [groups, B, M, width]; or, with anchors int32[M], copies of tokens' states."""

    layers: tuple[int, ...] = struct.field(pytree_node=False)
    states: jax.Array | None = None
    anchors: jax.Array | None = None

    @property
    def sizes(self):
        return ((len(self.anchors) if self.states is None else self.states.shape[2]),) * len(self.layers)

    @property
    def size(self):
        return sum(self.sizes)

    def rows(self, group, x):
        return x[:, self.anchors] if self.states is None else self.states[group]


@functools.cache
def prepared(name):
    """-> model, parameters, a cache with prompts of 1, 5 and 9 tokens."""
    model = MODELS[name]
    params = drawn(model, PROMPTS, seed=1)
    params = scaled(params, 2.0)  # attention far from uniform

    @jax.jit
    def read(params):
        _, _, fresh = model.apply({"params": params}, PROMPTS, LENGTHS, method="prefill")
        return model.init_cache(3, 24, margin=4).commit(fresh, None, LENGTHS)

    return model, params, read(params)


def extend(name, *args):
    """tokens, mask, depth and virtual rows -> logits, hidden states, fresh rows."""
    return _extend(*prepared(name), *args)


@functools.partial(jax.jit, static_argnums=0)
def _extend(model, params, cache, tokens, tree, depth, virtual=None):
    return model.apply({"params": params}, tokens, cache, tree, depth, virtual, method="extend")


def shape(parents):
    """-> mask bool[N, N] and depth int32[N]."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents[1:], 1):
        mask[node] |= mask[parent]
    return jnp.asarray(mask), jnp.asarray(mask.sum(1) - 1)


def chains(groups):
    """A virtual node under every real one, and the next group's under it: parents of all nodes."""
    return PARENT + [node + 4 * group for group in range(groups) for node in range(4)]


def states(seed, groups, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), (groups, 3, 4, WIDTH))


@pytest.mark.parametrize("name, layers", CASES)
def test_real_rows_do_not_notice_virtual_ones(name, layers):
    if name != "dense":
        assert isinstance(prepared(name)[2].layers[0], RingCache)
    mask, depth = shape(chains(len(layers)))
    results = [
        extend(name, NODES, mask, depth, Rows(layers, states(seed, len(layers), scale)))
        for seed, scale in ((0, 0.0), (1, 1.0), (2, 1e4))
    ]
    logits, hidden, fresh = results[0]
    assert logits.shape == (3, 4 * (1 + len(layers)), VOCAB) and hidden.shape[1] == logits.shape[1]
    assert len(fresh) == LAYERS and fresh[0][0].shape == (3, 2, 4, 4)  # the rows of the tokens alone
    for other in results[1:]:  # whatever is in the virtual rows, bit for bit
        exactly(other[0][:, :4], logits[:, :4])
        exactly(other[1][:, :4], hidden[:, :4])
        jax.tree.map(exactly, other[2], fresh)
        assert not np.array_equal(other[0][:, 4:], logits[:, 4:])
    plain, plain_hidden, plain_fresh = extend(name, NODES, *shape(PARENT))
    close(logits[:, :4], plain)
    jax.tree.map(close, fresh, plain_fresh)
    if layers == (LAYERS,):  # all layers ran at the shapes of a call without virtual rows
        exactly(hidden[:, :4], plain_hidden)
        jax.tree.map(exactly, fresh, plain_fresh)


@pytest.mark.parametrize("name", MODELS)
def test_embedded_tokens_as_virtual_rows_are_tokens(name):
    """Beside the embedding, rows that hold embedded tokens give the very bits of those tokens."""
    model, params, _ = prepared(name)
    more = jax.random.randint(jax.random.key(5), (3, 4), 1, VOCAB)
    mask, depth = shape(chains(1))
    tokens = extend(name, jnp.concatenate([NODES, more], axis=1), mask, depth)
    embedded = model.apply({"params": params}, more, method="embed")
    virtual = extend(name, NODES, mask, depth, Rows((0,), embedded[None]))
    exactly(virtual[0], tokens[0])
    exactly(virtual[1], tokens[1])
    jax.tree.map(lambda a, b: exactly(a, b[:, :, :4]), virtual[2], tokens[2])


@pytest.mark.parametrize("name, layer", [*(("mixed", t) for t in range(LAYERS + 1)), ("dense", 1)])
def test_a_copy_of_a_tokens_state_speaks_like_the_token(name, layer):
    """A row that joins anywhere with the state of a node, at its place and seeing itself instead of it."""
    mask, depth = shape(PARENT)
    twins = np.asarray(mask) & ~np.eye(4, dtype=bool)
    both = np.block([[np.asarray(mask), np.zeros((4, 4), bool)], [twins, np.eye(4, dtype=bool)]])
    copies = Rows((layer,), anchors=jnp.arange(4))
    logits, _, _ = extend(name, NODES, jnp.asarray(both), jnp.concatenate([depth, depth]), copies)
    close(logits[:, 4:], logits[:, :4])
    if layer < LAYERS:  # and its place matters
        moved, _, _ = extend(name, NODES, jnp.asarray(both), jnp.concatenate([depth, depth + 1]), copies)
        exactly(moved[:, :4], logits[:, :4])
        assert float(jnp.abs(moved[:, 4:] - logits[:, 4:]).max()) > 1e-3


@pytest.mark.parametrize("name, layers", [("mixed", (0,)), ("mixed", (1, LAYERS)), ("dense", (0, 2))])
def test_permuted_siblings_give_permuted_rows(name, layers):
    """Siblings 1 and 2 change places, with what hangs under them: virtual rows of siblings do not meet."""
    order = np.asarray([0, 2, 1, 3])
    mask, depth = shape(chains(len(layers)))
    rows = Rows(layers, states(1, len(layers)))
    everywhere = np.concatenate([order + 4 * group for group in range(len(layers) + 1)])
    logits, _, fresh = extend(name, NODES, mask, depth, rows)
    permuted, _, moved = extend(
        name,
        NODES[:, order],
        mask[everywhere][:, everywhere],
        depth[everywhere],
        Rows(layers, rows.states[:, :, order]),
    )
    close(permuted, logits[:, everywhere])
    jax.tree.map(lambda a, b: close(a, b[:, :, order]), moved, fresh)
    # They do see their own chain: another state under sibling 1 changes nothing but what hangs there.
    changed = Rows(layers, rows.states.at[0, :, 1].add(1.0))
    other, _, _ = extend(name, NODES, mask, depth, changed)
    differs = np.asarray(jnp.any(other != logits, axis=(0, 2)))
    seen = np.zeros(len(differs), bool)
    seen[5] = True  # the changed row; the row of the second group under it too, if a layer lies above both
    if len(layers) == 2 and layers[1] < LAYERS:
        seen[9] = True
    exactly(differs, seen)


def test_rows_of_a_batch_have_their_own_tree():
    """Masks and depths for every row of the batch, as dynamic trees give them."""
    first, second = shape([-1, 0, 1, 2, 3, 4]), shape([-1, 0, 0, 1, 0, 2])
    masks, depths = (jnp.stack([a, b, a]) for a, b in zip(first, second, strict=True))
    rows = Rows((1,), states(1, 1)[:, :, :2])
    logits, _, _ = extend("mixed", NODES, masks, depths, rows)
    for number, (mask, depth) in enumerate((first, second, first)):
        close(logits[number], extend("mixed", NODES, mask, depth, rows)[0][number])


def test_a_chain_is_the_default():
    rows = Rows((2,), states(1, 1))
    mask, depth = shape(list(range(-1, 7)))
    for given, default in zip(
        jax.tree.leaves(extend("dense", NODES, mask, depth, rows)),
        jax.tree.leaves(extend("dense", NODES, None, None, rows)),
        strict=True,
    ):
        exactly(given, default)


def test_scanned_layers_are_refused():
    model = MODELS["dense"].clone(scan_layers=True)
    params = jax.eval_shape(model.init, jax.random.key(0), PROMPTS)["params"]
    with pytest.raises(UserError, match="unscan_layers"):
        jax.eval_shape(
            lambda p: model.apply(
                {"params": p},
                NODES,
                model.init_cache(3, 16),
                None,
                None,
                Rows((0,), states(1, 1)),
                method="extend",
            ),
            params,
        )
