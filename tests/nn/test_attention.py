"""The attention layer: what its options do, with hand-set kernels where a value can be told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.attention import Attention, Context
from research.nn.attention_kernels import (
    BlockedAttention,
    DenseAttention,
    PlainCachedAttention,
    TreeAttention,
)
from research.nn.cache import Cache, DenseCache, HeadGroups, RingCache
from research.nn.masks import Causal, Full, Prefix, Window
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.weights import LowRank, materialize
from tests.programs import drawn

WIDTH, LENGTH = 6, 9


def context(batch=2, length=LENGTH, **fields):
    return Context(jnp.broadcast_to(jnp.arange(length), (batch, length)), **fields)


def make(**fields):
    module = Attention(
        **{**dict(num_heads=4, head_dim=4, num_kv_heads=2, rotary=Rotary(), rule=Window(4)), **fields}
    )
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    params = drawn(module, x, context(), seed=1)
    return module, params, x


def identity(size=1):
    return {"kernel": jnp.eye(size)}


def test_a_head_of_one_by_hand():
    ones = {name: identity() for name in ("query", "key", "value", "output")}
    x = jnp.asarray([[0.0], [1.0], [2.0]])[None]
    y, (key, value) = Attention(num_heads=1, head_dim=1).apply({"params": ones}, x, context(1, 3))
    # Query 0 sees value 0. Query 1: scores 0, 1 and values 0, 1: e / (1 + e). Query 2: scores 0, 2, 4:
    # (e^2 + 2 e^4) / (1 + e^2 + e^4).
    e = np.exp(1.0)
    np.testing.assert_allclose(y[0, :, 0], [0, e / (1 + e), (e**2 + 2 * e**4) / (1 + e**2 + e**4)], rtol=1e-6)
    np.testing.assert_array_equal(key, x[:, None])
    np.testing.assert_array_equal(value, x[:, None])


def test_scale_and_softcap_by_hand():
    ones = {name: identity() for name in ("query", "key", "value", "output")}
    x = jnp.asarray([[0.0], [2.0]])[None]

    def last(**fields):
        return float(
            Attention(num_heads=1, head_dim=1, **fields).apply({"params": ones}, x, context(1, 2))[0][0, 1, 0]
        )

    # Scores 0 and 4 scale, values 0 and 2.
    assert last(scale=0.25) == pytest.approx(2 * np.e / (1 + np.e), rel=1e-6)
    capped = 0.5 * np.tanh(4 * 0.25 / 0.5)
    assert last(scale=0.25, softcap=0.5) == pytest.approx(2 * np.exp(capped) / (1 + np.exp(capped)), rel=1e-6)


def test_query_head_h_reads_key_head_h_over_the_group():
    # Two query heads, one dimension each; with one key head both see the same values, with two their own.
    x = jnp.asarray([[1.0, 10.0]])[None]
    wide = {name: identity(2) for name in ("query", "key", "value", "output")}
    y, _ = Attention(num_heads=2, head_dim=1).apply({"params": wide}, x, context(1, 1))
    assert y[0, 0].tolist() == [1.0, 10.0]
    shared = {
        **wide,
        "key": {"kernel": jnp.asarray([[0.0], [1.0]])},
        "value": {"kernel": jnp.asarray([[0.0], [1.0]])},
    }
    y, _ = Attention(num_heads=2, head_dim=1, num_kv_heads=1).apply({"params": shared}, x, context(1, 1))
    assert y[0, 0].tolist() == [10.0, 10.0]


def test_parameters_of_a_layer():
    _, params, _ = make(use_bias=True, query_norm=RMSNorm(), key_norm=RMSNorm())
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "query": {"kernel": (6, 16), "bias": (16,)},
        "key": {"kernel": (6, 8), "bias": (8,)},
        "value": {"kernel": (6, 8), "bias": (8,)},
        "output": {"kernel": (16, 6)},
        "query_norm": {"scale": (4,)},
        "key_norm": {"scale": (4,)},
    }
    assert make(output_bias=True)[1]["output"]["bias"].shape == (6,)
    with pytest.raises(UserError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        make(num_kv_heads=3)


def test_flat_and_batched_tokens_are_the_same():
    module, params, x = make(query_norm=RMSNorm(), key_norm=RMSNorm())
    run = jax.jit(lambda x: module.apply({"params": params}, x, context())[0])
    # The same products of 6 and 16 terms of order 1, whose order of addition may differ.
    np.testing.assert_allclose(run(x.reshape(-1, WIDTH)).reshape(x.shape), run(x), atol=2e-6)


def test_qk_norm_makes_scores_blind_to_the_scale_of_the_keys():
    module, params, x = make(query_norm=RMSNorm(0.0), key_norm=RMSNorm(0.0))
    scaled = {**params, "key": {"kernel": 8.0 * params["key"]["kernel"]}}
    run = jax.jit(lambda p: module.apply({"params": p}, x, context())[0])
    np.testing.assert_allclose(run(scaled), run(params), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "cached_kernel"),
    [(DenseAttention(), PlainCachedAttention()), (BlockedAttention(4), TreeAttention("reference"))],
)
@pytest.mark.parametrize(
    "rule", [Causal(), Window(3), Window((2, 3, 4, 9), sinks=1), Window(2, sinks=1)], ids=str
)
def test_a_cache_gives_what_the_whole_row_gives(rule, kernel, cached_kernel):
    """Five tokens at once, then one, then three; unequal rows are tested with whole models."""
    module, params, x = make(rule=rule, kernel=kernel, cached_kernel=cached_kernel)
    whole, _ = jax.jit(lambda x: module.apply({"params": params}, x, context()))(x)
    cache = Cache((module.init_cache(2, 16, 3, jnp.float32),), jnp.zeros(2, jnp.int32))

    @jax.jit
    def extend(cache, x):
        count = x.shape[1]
        positions = cache.length[:, None] + jnp.arange(count)
        tree = jnp.tril(jnp.ones((1, count, count), bool))
        at = Context(positions, length=cache.length, tree=tree)
        y, fresh = module.apply({"params": params}, x, at, cache.layers[0])
        return y, cache.commit((fresh,), None, jnp.full(2, count))

    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        y, cache = extend(cache, x[:, start:stop])
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-6)


def test_which_cache_a_rule_gets():
    def cache(rule, capacity=16, margin=3):
        return make(rule=rule)[0].init_cache(2, capacity, margin, jnp.bfloat16)

    ring = cache(Window(4))
    assert isinstance(ring, RingCache) and ring.key.shape == (2, 2, 7, 4) and ring.key.dtype == jnp.bfloat16
    sunk = cache(Window(4, sinks=1))
    assert isinstance(sunk, RingCache) and sunk.key.shape[2] == 8 and sunk.sinks == 1
    # Two query heads to a key head: the wider span of each pair, 1 sink and 3 rows of margin.
    groups = cache(Window((1, 2, 3, 6), sinks=1))
    assert isinstance(groups, HeadGroups) and groups.heads == (1, 1)
    assert [part.key.shape for part in groups.parts] == [(2, 1, 6, 4), (2, 1, 10, 4)]
    assert cache(Window((1, 3, 3, 2))).key.shape == (2, 2, 6, 4)  # equal spans share a ring
    for rule, capacity in ((Causal(), 16), (Window(4, sinks=1), 8), (Window(4), 7)):
        dense = cache(rule, capacity)
        assert isinstance(dense, DenseCache) and dense.key.shape == (2, 2, capacity, 4)


def test_bidirectional_rules_do_what_they_say():
    module, params, x = make(rule=Full())
    run = jax.jit(lambda module, x, c: module.apply({"params": params}, x, c)[0], static_argnums=0)
    changed = x.at[:, -1].add(1.0)
    assert (
        (run(module, x, context()) != run(module, changed, context())).all((0, 2)).all()
    )  # all tokens see the last
    causal = module.clone(rule=Causal())
    np.testing.assert_array_equal(run(causal, x, context())[:, :-1], run(causal, changed, context())[:, :-1])
    prefix = module.clone(rule=Prefix())
    whole = context(prefix=jnp.full(2, LENGTH))
    np.testing.assert_allclose(run(prefix, x, whole), run(module, x, context()), atol=1e-6)


def test_structured_kernels_in_every_projection():
    module, params, x = make()
    key = iter(jax.random.split(jax.random.key(2), 8))

    def low(kernel):
        return LowRank(
            *(jax.random.normal(next(key), s) for s in ((kernel.shape[0], 2), (2, kernel.shape[1])))
        )

    structured = {name: {"kernel": low(value["kernel"])} for name, value in params.items()}
    plain = {name: {"kernel": materialize(value["kernel"])} for name, value in structured.items()}
    run = jax.jit(lambda p: module.apply({"params": p}, x, context())[0])
    # (x A) B against x (A B): values reach 30, so 30 * 16 * 2 ** -24 = 3e-5.
    np.testing.assert_allclose(run(structured), run(plain), rtol=1e-4, atol=1e-4)
