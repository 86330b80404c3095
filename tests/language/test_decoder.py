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
TOKENS = np.random.default_rng(3).integers(1, VOCAB, (3, LENGTH), np.int32)


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
    # Attention that is far from uniform.
    return jax.tree.map(lambda x: jnp.asarray(2.0 * np.asarray(x)) if x.ndim > 1 else x, params)


@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached(name):
    """Prompts of 1, 4 and 7 tokens, extended by 3 with unequal counts, by a tree, and by one after a roll-back."""
    model = MODELS[name]
    params = params_of(model)
    whole = np.asarray(call(model, params, TOKENS))
    rows, chosen = np.arange(3), np.asarray([2, 0, 0, 1])
    first = np.asarray([1, 4, 7])
    second = first + [3, 1, 2]
    third = second + 3
    back = np.minimum(third, [3, 8, 8])
    tree = np.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)

    def chunk(start, size):
        return np.stack([row[s : s + size] for row, s in zip(TOKENS, start, strict=True)])

    # A tree: the root, a wrong child, the right child and its child. Depths 0, 1, 1, 2.
    right = chunk(second, 3)
    nodes = np.stack([right[:, 0], (right[:, 1] + 1) % VOCAB, right[:, 1], right[:, 2]], axis=1)

    @jax.jit
    def run(params):
        def extend(*args):
            logits, _, fresh = model.apply({"params": params}, *args, method="extend")
            return logits, fresh

        cache = model.init_cache(3, 24, margin=4)
        if name in ("mistral", "gemma"):
            assert isinstance(cache.layers[0], RingCache) and cache.layers[0].key.shape[2] == 8
        padded = np.where(np.arange(8) < first[:, None], TOKENS[:, :8], 0)
        prompt, hidden, fresh = model.apply({"params": params}, padded, first, method="prefill")
        cache = cache.commit(fresh, None, first)
        line, fresh = extend(chunk(first, 3), cache)
        cache = extended = cache.commit(fresh, None, second - first)
        branches, fresh = extend(nodes, cache, tree, np.asarray([0, 1, 1, 2]))
        cache = cache.commit(fresh, np.broadcast_to(np.asarray([0, 2, 3]), (3, 3)), np.full(3, 3))
        # Back within the margin of 4, each row by another distance, and on from a selection with repeats.
        cache = cache.rollback(np.asarray([3, 8, 8])).select(chosen)
        last, _ = extend(TOKENS[chosen, back[chosen]][:, None], cache)
        return prompt, hidden, line, extended.length, branches, cache.length, last

    prompt, hidden, line, extended, branches, selected, last = map(np.asarray, run(params))
    assert prompt.dtype == np.float32 and hidden.shape == (3, 8, WIDTH)
    close(prompt, whole[rows, first - 1])
    for node in range(3):
        close(line[:, node], whole[rows, first + node])
    assert extended.tolist() == [4, 5, 9] == second.tolist()
    for depth, node in enumerate((0, 2, 3)):
        close(branches[:, node], whole[rows, second + depth])
    assert selected.tolist() == [8, 3, 3, 8] == back[chosen].tolist()
    close(last[:, 0], whole[chosen, back[chosen]])


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_and_padded_rows_are_separate_documents(name):
    model = MODELS[name]
    params = params_of(model)
    first, second = TOKENS[:1, :5], TOKENS[1:2, :4]
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], 1)
    segments = np.asarray([[1] * 5 + [2] * 4 + [0] * 3])
    positions = np.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    logits = np.asarray(call(model, params, packed, positions, segments))
    rows = np.zeros_like(TOKENS)  # each alone; a causal model does not see what stands behind
    rows[0, :5], rows[1, :4] = first, second
    alone = np.asarray(call(model, params, rows))
    close(logits[0, :5], alone[0, :5])
    close(logits[0, 5:9], alone[1, :4])
    # The same document with its padding on the left.
    left = np.concatenate([np.zeros((1, 7), np.int32), first], 1)
    positions = np.maximum(np.arange(LENGTH)[None] - 7, 0)
    segments = (np.arange(LENGTH)[None] >= 7).astype(int)
    close(np.asarray(call(model, params, left, positions, segments))[0, 7:], alone[0, :5])


def test_the_head_and_the_caps():
    untied, gemma = MODELS["mistral"], MODELS["gemma"]
    assert params_of(untied)["head"]["kernel"].shape == (WIDTH, VOCAB) and "head" not in params_of(gemma)
    assert np.abs(call(gemma, params_of(gemma), TOKENS)).max() < 3.0
    # Tied: logits are hidden states times the table, before and without the multiplier of 4.
    model = MODELS["llama"].clone(embedding_multiplier=4.0)
    params = params_of(model)
    hidden, _ = call(model, params, TOKENS, method="features")
    close(call(model, params, TOKENS), np.asarray(hidden) @ np.asarray(params["embedding"]["table"]).T)
    assert (
        call(model, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params), TOKENS).dtype
        == jnp.float32
    )


def test_a_prefix_is_read_in_both_directions():
    model, params = make((Prefix(),)), params_of(MODELS["llama"])
    prefix = np.asarray([4, 4, 0])
    changed = np.where(np.arange(LENGTH) == 3, (TOKENS + 1) % VOCAB, TOKENS)
    one, other = (np.asarray(call(model, params, tokens, prefix=prefix)) for tokens in (TOKENS, changed))
    differ = (one != other).any(-1)
    assert differ[:2, 0].all() and not differ[2, :3].any()
    close(call(model, params, TOKENS, prefix=np.zeros(3, int)), call(MODELS["llama"], params, TOKENS))


def test_scanned_rematerialised_and_batched_forms_are_the_same_model():
    model = make((Window(4), Causal()), num_layers=4)
    params = params_of(model)
    logits = call(model, params, TOKENS)
    stacked, fused = jax.jit(lambda tree: (scan_params(tree, 2), fuse_projections(tree)))(params)
    for other, tree in (
        (model.clone(scan_layers=True), stacked),
        (model.clone(scan_layers=True, remat="full"), stacked),
        (model.clone(token_layout="batched"), params),
        (model, fused),
    ):
        close(call(other, tree, TOKENS), logits)
    with pytest.raises(UserError, match="decoding runs unrolled layers: convert with `unscan_layers` first"):
        call(model.clone(scan_layers=True), stacked, TOKENS[:, :1], model.init_cache(3, 24), method="extend")


@pytest.mark.parametrize("kind", ["low rank", "sum"])
def test_structured_kernels_in_place_of_every_kernel(kind):
    model = MODELS["mistral"]
    rng = np.random.default_rng(5)

    def structured(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        shapes = (leaf.shape[0], 3), (3, leaf.shape[1])
        low = LowRank(*((0.3 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes))
        return low if kind == "low rank" else Sum((leaf, low))

    params = jax.tree_util.tree_map_with_path(structured, params_of(model))
    is_weight = lambda x: isinstance(x, LowRank | Sum)  # noqa: E731
    plain = jax.jit(lambda params: jax.tree.map(materialize, params, is_leaf=is_weight))(params)
    # x A B + x W against x (A B + W): the kernels are larger here, so scores reach 30 and their rounding is amplified.
    np.testing.assert_allclose(call(model, params, TOKENS), call(model, plain, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8), dict(tensor=4, data=2)], ids=str
)
def test_eight_devices_equal_one(sizes):
    model = MODELS["qwen3"]
    params = params_of(model)
    tokens = np.random.default_rng(4).integers(0, VOCAB, (8, LENGTH), np.int32)
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

    distinct = np.arange(1, LENGTH + 1)  # so that a row of the table is one position
    tokens = distinct[None]

    def score(rows):
        table = params["embedding"]["table"].at[distinct].add(rows)
        hidden = model.apply(
            {"params": {**params, "embedding": {"table": table}}}, tokens, method="features"
        )[0]
        return jnp.sum(hidden[0, 5] ** 3)

    gradient = np.asarray(jax.jit(jax.grad(score))(np.zeros((LENGTH, WIDTH), np.float32)))
    assert (gradient[:6] != 0).any(-1).all() and (gradient[6:] == 0).all()
    half = jax.tree.map(lambda x: np.float32(0.5) * np.asarray(x), params)
    two = jax.tree.map(lambda *x: np.stack(x), params, half)
    mapped = jax.jit(jax.vmap(lambda p: model.apply({"params": p}, TOKENS)))(two)
    close(np.asarray(mapped)[1], call(model, half, TOKENS))
