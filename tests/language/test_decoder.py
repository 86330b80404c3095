"""The decoder: caches, padding, packing, layouts and meshes never change what it computes.

Logits are of order 1 after two layers of sums of at most 24 terms; programs that order those sums differently
agree to about 100 * 2 ** -24 = 6e-6, hence `TOLERANCE`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.cache import RingCache
from research.nn.fuse import fuse_projections
from research.nn.masks import Causal, Prefix, Window
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block, scan_params
from research.nn.weights import LowRank, Sum, materialize
from research.training.partitioning import batch_sharding, make_mesh, parameter_shardings
from tests.programs import call, drawn

VOCAB, WIDTH, LENGTH = 32, 16, 12
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
close = functools.partial(np.testing.assert_allclose, **TOLERANCE)
TOKENS = jax.random.randint(jax.random.key(3), (3, LENGTH), 1, VOCAB)


def make(rules=(Causal(),), *, norm=RMSNorm(), post_norms=False, num_layers=2, attention=None, **fields):  # noqa: B008
    layer = dict(num_heads=4, head_dim=4, num_kv_heads=2, rotary=Rotary(), **(attention or {}))
    blocks = tuple(Block(Attention(**layer, rule=rule), GatedMLP(24), norm, post_norms) for rule in rules)
    sizes = dict(vocab_size=VOCAB, width=WIDTH, max_length=64, num_layers=num_layers)
    return DecoderLM(blocks=blocks, **sizes, **fields)


MODELS = {
    "llama": make(),
    "mistral": make((Window(4),), tied_head=False),
    "qwen3": make(attention=dict(query_norm=RMSNorm(), key_norm=RMSNorm(), use_bias=True)),
    "gemma": make(
        (Window(4), Causal()),
        norm=RMSNorm(unit_offset=True),
        post_norms=True,
        attention=dict(softcap=5.0, scale=0.4),
        embedding_multiplier=4.0,
        logit_softcap=3.0,
    ),
}


@functools.cache
def params_of(model):
    params = drawn(model, TOKENS, seed=1)
    return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)  # attention that is far from uniform


@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached(name):
    """Prompts of 1, 4 and 7 tokens, extended by 3 with unequal counts, by a tree, and by one after a roll-back."""
    model = MODELS[name]
    params = params_of(model)
    whole = call(model, params, TOKENS)
    lengths = jnp.asarray([1, 4, 7])
    cache = model.init_cache(3, 24, margin=4)
    if name in ("mistral", "gemma"):
        assert isinstance(cache.layers[0], RingCache) and cache.layers[0].key.shape[2] == 8
    padded = jnp.where(jnp.arange(8) < lengths[:, None], TOKENS[:, :8], 0)
    logits, hidden, fresh = call(model, params, padded, lengths, method="prefill")
    assert logits.dtype == jnp.float32 and hidden.shape == (3, 8, WIDTH)
    rows = jnp.arange(3)
    close(logits, whole[rows, lengths - 1])
    cache = cache.commit(fresh, None, lengths)

    def chunk(start, size):
        return jax.vmap(lambda row, s: jax.lax.dynamic_slice(row, (s,), (size,)))(TOKENS, start)

    logits, _, fresh = call(model, params, chunk(cache.length, 3), cache, method="extend")
    for node in range(3):
        close(logits[:, node], whole[rows, lengths + node])
    cache = cache.commit(fresh, None, jnp.asarray([3, 1, 2]))
    assert cache.length.tolist() == [4, 5, 9]

    # A tree: the root, a wrong child, the right child and its child. Depths 0, 1, 1, 2.
    right = chunk(cache.length, 3)
    nodes = jnp.stack([right[:, 0], (right[:, 1] + 1) % VOCAB, right[:, 1], right[:, 2]], axis=1)
    tree = jnp.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
    logits, _, fresh = call(model, params, nodes, cache, tree, jnp.asarray([0, 1, 1, 2]), method="extend")
    for depth, node in enumerate((0, 2, 3)):
        close(logits[:, node], whole[rows, cache.length + depth])
    cache = cache.commit(fresh, jnp.broadcast_to(jnp.asarray([0, 2, 3]), (3, 3)), jnp.asarray([3, 3, 3]))

    # Back within the margin of 4, each row by another distance, and on from a selection with repeats.
    cache = cache.rollback(jnp.asarray([3, 8, 8])).select(jnp.asarray([2, 0, 0, 1]))
    chosen = jnp.asarray([2, 0, 0, 1])
    assert cache.length.tolist() == [8, 3, 3, 8]
    token = jnp.take_along_axis(TOKENS[chosen], cache.length[:, None], 1)
    logits, _, _ = call(model, params, token, cache, method="extend")
    close(logits[:, 0], whole[chosen, cache.length])


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_and_padded_rows_are_separate_documents(name):
    model = MODELS[name]
    params = params_of(model)
    first, second = TOKENS[:1, :5], TOKENS[1:2, :4]
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], 1)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    logits = call(model, params, packed, positions, segments)
    alone = [call(model, params, tokens) for tokens in (first, second)]
    close(logits[:, :5], alone[0])
    close(logits[:, 5:9], alone[1])
    # The same document with its padding on the left.
    left = jnp.concatenate([jnp.zeros((1, 7), jnp.int32), first], 1)
    positions = jnp.maximum(jnp.arange(LENGTH)[None] - 7, 0)
    close(
        call(model, params, left, positions, (jnp.arange(LENGTH)[None] >= 7).astype(jnp.int32))[:, 7:],
        alone[0],
    )


def test_the_head_and_the_caps():
    untied, gemma = MODELS["mistral"], MODELS["gemma"]
    assert params_of(untied)["head"]["kernel"].shape == (WIDTH, VOCAB) and "head" not in params_of(gemma)
    assert float(jnp.abs(call(gemma, params_of(gemma), TOKENS)).max()) < 3.0
    # Tied: logits are hidden states times the table, before and without the multiplier of 4.
    model = MODELS["llama"].clone(embedding_multiplier=4.0)
    params = params_of(model)
    hidden, _ = call(model, params, TOKENS, method="features")
    close(call(model, params, TOKENS), hidden @ params["embedding"]["table"].T)
    assert call(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), TOKENS).dtype == jnp.float32


def test_a_prefix_is_read_in_both_directions():
    model, params = make((Prefix(),)), params_of(MODELS["llama"])
    prefix = jnp.asarray([4, 4, 0])
    changed = TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % VOCAB)
    differ = (call(model, params, TOKENS, prefix=prefix) != call(model, params, changed, prefix=prefix)).any(
        -1
    )
    assert differ[:2, 0].all() and not differ[2, :3].any()
    close(call(model, params, TOKENS, prefix=jnp.zeros(3, jnp.int32)), call(MODELS["llama"], params, TOKENS))


def test_scanned_rematerialised_and_batched_forms_are_the_same_model():
    model = make((Window(4), Causal()), num_layers=4)
    params = params_of(model)
    logits = call(model, params, TOKENS)
    stacked = scan_params(params, 2)
    for other, tree in (
        (model.clone(scan_layers=True), stacked),
        (model.clone(scan_layers=True, remat="full"), stacked),
        (model.clone(token_layout="batched"), params),
        (model, fuse_projections(params)),
    ):
        close(call(other, tree, TOKENS), logits)
    with pytest.raises(UserError, match="decoding runs unrolled layers: convert with `unscan_layers` first"):
        call(model.clone(scan_layers=True), stacked, TOKENS[:, :1], model.init_cache(3, 24), method="extend")


@pytest.mark.parametrize("kind", ["low rank", "sum"])
def test_structured_kernels_in_place_of_every_kernel(kind):
    model = MODELS["mistral"]
    key = jax.random.key(5)

    def structured(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        low = LowRank(
            *(0.3 * jax.random.normal(key, shape) for shape in ((leaf.shape[0], 3), (3, leaf.shape[1])))
        )
        return low if kind == "low rank" else Sum((leaf, low))

    params = jax.tree_util.tree_map_with_path(structured, params_of(model))
    plain = jax.tree.map(materialize, params, is_leaf=lambda x: isinstance(x, LowRank | Sum))
    # x A B + x W against x (A B + W): the kernels are larger here, so scores reach 30 and their rounding is amplified.
    np.testing.assert_allclose(call(model, params, TOKENS), call(model, plain, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8), dict(tensor=4, data=2)], ids=str
)
def test_eight_devices_equal_one(sizes):
    model = MODELS["qwen3"]
    params = params_of(model)
    tokens = jax.random.randint(jax.random.key(4), (8, LENGTH), 0, VOCAB)
    mesh = make_mesh(sizes, jax.devices()[:8])
    shardings = parameter_shardings(params, mesh)
    spread = jax.device_put(params, shardings)
    up = spread["layer_0"]["mlp"]["up"]["kernel"]
    parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert up.addressable_shards[0].data.size * parts == up.size
    close(call(model, spread, jax.device_put(tokens, batch_sharding(mesh))), call(model, params, tokens))


def test_gradients_are_causal_and_map_over_models():
    model = MODELS["llama"]
    params = params_of(model)

    distinct = jnp.arange(1, LENGTH + 1)  # so that a row of the table is one position
    tokens = distinct[None]

    def score(rows):
        table = params["embedding"]["table"].at[distinct].add(rows)
        hidden = model.apply(
            {"params": {**params, "embedding": {"table": table}}}, tokens, method="features"
        )[0]
        return jnp.sum(hidden[0, 5] ** 3)

    gradient = jax.jit(jax.grad(score))(jnp.zeros((LENGTH, WIDTH)))
    assert (gradient[:6] != 0).any(-1).all() and (gradient[6:] == 0).all()
    two = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    mapped = jax.jit(jax.vmap(lambda p: model.apply({"params": p}, TOKENS)))(two)
    close(mapped[1], call(model, jax.tree.map(lambda x: 0.5 * x, params), TOKENS))
