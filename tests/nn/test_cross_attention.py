"""Cross-attention: values by hand, real places only, memory computed once, and a block that keeps its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.attention import Attention
from research.nn.cache import DenseCache
from research.nn.cross_attention import CrossAttention, CrossBlock, CrossContext, MemoryCache
from research.nn.fuse import fuse_projections
from research.nn.mlp import MLP
from research.nn.rotary import Rotary
from tests.programs import call, drawn

WIDTH, SOURCE, TARGET = 6, 5, 3


def context(states, real=None, count=TARGET, **fields):
    batch, places = states.shape[:2]
    real = jnp.ones((batch, places), bool) if real is None else jnp.asarray(real)
    positions = jnp.broadcast_to(jnp.arange(count), (batch, count))
    return CrossContext(positions, source=real, states=states, **fields)


def inputs(batch=2):
    x = jax.random.normal(jax.random.key(0), (batch, TARGET, WIDTH))
    return x, jax.random.normal(jax.random.key(1), (batch, SOURCE, WIDTH))


def test_a_head_of_one_by_hand():
    one = {"kernel": jnp.eye(1)}
    params = {"query": one, "output": one, "memory": {"key": one, "value": {"kernel": 10 * jnp.eye(1)}}}
    x, states = jnp.asarray([[[0.0], [1.0]]]), jnp.asarray([[[1.0], [2.0], [9.0]]])
    real = [[True, True, False]]
    y, (key, value) = call(CrossAttention(1, 1), params, x, context(states, real, 2))
    # Query 0: scores 0, 0: the mean of 10 and 20. Query 1: scores 1, 2: (10 e + 20 e^2) / (e + e^2).
    e = np.exp(1.0)
    np.testing.assert_allclose(y[0, :, 0], [15.0, (10 + 20 * e) / (1 + e)], rtol=1e-6)
    np.testing.assert_array_equal(key[0, 0, :, 0], [1, 2, 9])
    np.testing.assert_array_equal(value[0, 0, :, 0], [10, 20, 90])


@pytest.mark.parametrize("fields", [dict(), dict(rotary=Rotary()), dict(num_kv_heads=1)], ids=str)
def test_padding_of_the_source_changes_nothing(fields):
    layer = CrossAttention(2, 4, **fields)
    x, states = inputs()
    params = drawn(layer, x, context(states), seed=2)
    wrong = jnp.pad(states, ((0, 0), (0, 2), (0, 0)), constant_values=7.0)
    real = jnp.arange(SOURCE + 2) < jnp.asarray([[SOURCE], [SOURCE]])
    short, _ = call(layer, params, x, context(states))
    padded, _ = call(layer, params, x, context(wrong, real))
    np.testing.assert_allclose(padded, short, atol=1e-6)


def test_memory_is_what_the_states_give():
    layer = CrossAttention(2, 4, num_kv_heads=1, rotary=Rotary())
    x, states = inputs()
    params = drawn(layer, x, context(states), seed=2)
    assert set(params) == {"query", "output", "memory"}
    expected, memory = call(layer, params, x, context(states))
    again, same = call(layer, params, x, context(states).replace(states=None), memory)
    np.testing.assert_array_equal(again, expected)
    jax.tree.map(np.testing.assert_array_equal, same, memory)
    flat, _ = call(layer, params, x.reshape(-1, WIDTH), context(states))  # the layout of a stack on CPU
    np.testing.assert_allclose(flat.reshape(x.shape), expected, atol=1e-6)


def test_an_empty_source_adds_nothing():
    layer = CrossAttention(2, 4)
    x, states = inputs()
    params = drawn(layer, x, context(states), seed=2)
    y, _ = call(layer, params, x, context(states, jnp.zeros((2, SOURCE), bool)))
    np.testing.assert_array_equal(y, jnp.zeros_like(x))


def test_rotary_depends_on_the_distance_alone():
    """Queries and keys that are one vector everywhere: the score of place s at t is a function of t - s."""
    layer = CrossAttention(1, 4, rotary=Rotary())
    x, states = jnp.ones((1, 4, WIDTH)), jnp.ones((1, 4, WIDTH))
    params = drawn(layer, x, context(states, count=4), seed=2)
    _, (key, _) = call(layer, params, x, context(states, count=4))
    # Relative phases of neighbouring keys are equal.
    scores = jnp.einsum("sd,td->st", key[0, 0], key[0, 0])
    np.testing.assert_allclose(jnp.diag(scores, 1), jnp.full(3, scores[0, 1]), rtol=1e-5)
    assert abs(float(scores[0, 1] - scores[0, 3])) > 1e-3


def test_heads_must_divide():
    x, states = inputs()
    with pytest.raises(UserError, match="num_heads=3 is not a multiple of num_kv_heads=2"):
        CrossAttention(3, 4, num_kv_heads=2).init(jax.random.key(0), x, context(states))


def test_the_block_is_the_sum_of_its_branches():
    """With the output of one branch set to zero, nothing but the others remains: x + self + cross + mlp."""
    block = CrossBlock(
        attention=Attention(2, 4), cross_attention=CrossAttention(2, 4), mlp=MLP(8, use_bias=False)
    )
    x, states = inputs()
    params = drawn(block, x, context(states), seed=3)

    def run(*kept):
        outputs = {"attention": "output", "cross_attention": "output", "mlp": "down"}
        silent = {
            branch: {**params[branch], last: {"kernel": jnp.zeros_like(params[branch][last]["kernel"])}}
            for branch, last in outputs.items()
            if branch not in kept
        }
        return call(block, params | silent, x, context(states))[0]

    np.testing.assert_array_equal(run(), x)
    assert not np.allclose(run("cross_attention"), x)
    # Another source shows in the cross-attention alone.
    other = call(block, params, x, context(states + 1.0))[0]
    assert not np.allclose(other, run("attention", "cross_attention", "mlp"))


def test_fused_projections_leave_cross_attention_alone():
    block = CrossBlock(attention=Attention(2, 4), cross_attention=CrossAttention(2, 4), mlp=MLP(8))
    x, states = inputs()
    params = drawn(block, x, context(states), seed=3)
    fused = fuse_projections(params)
    assert "qkv" in fused["attention"] and set(fused["cross_attention"]) == {"query", "output", "memory"}
    assert set(fused["cross_attention"]["memory"]) == {"key", "value"}
    expected, actual = (call(block, p, x, context(states))[0] for p in (params, fused))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_memory_cache_writes_its_own_rows_only():
    rows = jax.random.normal(jax.random.key(4), (2, 2, 3, 4))
    memory = (jnp.ones((2, 2, SOURCE, 4)), 2 * jnp.ones((2, 2, SOURCE, 4)))
    cache = MemoryCache(DenseCache.empty(2, 8, 2, 4, jnp.float32), memory)
    length = jnp.asarray([0, 1])
    written = cache.append((rows, rows), length, jnp.asarray([3, 2]))
    key, _, _, valid = written.own.read(length + jnp.asarray([3, 2]))
    np.testing.assert_array_equal(key[1, :, 1:3], rows[1, :, :2])
    assert valid.sum(1).tolist() == [3, 3]
    jax.tree.map(np.testing.assert_array_equal, written.memory, memory)
    swapped = written.replace(memory=jax.tree.map(lambda m: m.at[1].add(1.0), memory)).select(
        jnp.asarray([1, 1])
    )
    np.testing.assert_array_equal(swapped.memory[0], 2 * jnp.ones((2, 2, SOURCE, 4)))
    np.testing.assert_array_equal(swapped.own.key[0], written.own.key[1])


def test_each_token_may_have_its_own_view_of_the_source():
    """A row of the source for every token: each token's output is that of a call in which all have its row."""
    x, states = (jax.random.normal(jax.random.key(i), (2, n, 8)) for i, n in enumerate((3, 4)))
    seen = np.array(
        [[[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]], [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]], bool
    )
    layer = CrossAttention(4, 2, num_kv_heads=2)
    params = drawn(layer, x, context(states, seen, 3))
    got, _ = call(layer, params, x, context(states, seen, 3))
    for token in range(3):
        want, _ = call(layer, params, x, context(states, seen[:, token], 3))
        np.testing.assert_allclose(got[:, token], want[:, token], rtol=1e-6, atol=1e-6)
    assert not np.asarray(got[0, 1]).any()
