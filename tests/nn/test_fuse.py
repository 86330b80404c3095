"""Fused projections hold the same numbers and give the same attention."""

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.attention import Attention, Context
from research.nn.fuse import fuse_projections, unfuse
from research.nn.quantized import quantize
from research.nn.weights import LowRank


def test_kernels_and_biases_are_joined_in_order():
    def linear(value, features):
        return {"kernel": jnp.full((2, features), value), "bias": jnp.full((features,), -value)}

    attention = {
        "query": linear(1.0, 4),
        "key": linear(2.0, 2),
        "value": linear(3.0, 2),
        "output": linear(4.0, 2),
    }
    mlp = {"gate": linear(5.0, 3), "up": linear(6.0, 3), "down": linear(7.0, 2)}
    fused = fuse_projections({"layer_0": {"attention": attention, "mlp": mlp}, "table": jnp.ones(3)})
    layer = fused["layer_0"]
    assert set(layer["attention"]) == {"qkv", "output"} and set(layer["mlp"]) == {"gate_up", "down"}
    assert layer["attention"]["qkv"]["kernel"].tolist() == [[1.0] * 4 + [2.0] * 2 + [3.0] * 2] * 2
    assert layer["attention"]["qkv"]["bias"].tolist() == [-1.0] * 4 + [-2.0] * 2 + [-3.0] * 2
    assert layer["mlp"]["gate_up"]["kernel"].tolist() == [[5.0] * 3 + [6.0] * 3] * 2
    assert set(attention) == {"query", "key", "value", "output"}  # the argument is left as it was


def test_structured_kernels_are_left_alone():
    low = {"kernel": LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))}
    mlp = {"gate": low, "up": {"kernel": jnp.ones((2, 3))}, "down": {"kernel": jnp.ones((3, 2))}}
    assert fuse_projections({"mlp": mlp})["mlp"].keys() == mlp.keys()


def test_kernels_quantized_alike_are_joined():
    values = np.arange(48.0, dtype="f").reshape(2, 8, 3) - 20
    gate, up, other = quantize(values[0], 4, 4), quantize(values[1], 4, 4), quantize(values[1], 8, 4)
    mlp = {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": other}}
    joined = fuse_projections({"mlp": mlp})["mlp"]["gate_up"]["kernel"]
    parts = [kernel.materialize() for kernel in (gate, up)]
    np.testing.assert_array_equal(joined.materialize(), np.concatenate(parts, -1), strict=True)
    assert joined.stored_bits() == gate.stored_bits() + up.stored_bits()
    mixed = mlp | {"up": {"kernel": other}}  # of other bits
    assert fuse_projections({"mlp": mixed})["mlp"].keys() == mixed.keys()


def test_grouped_attention_is_the_same():
    module = Attention(num_heads=4, head_dim=4, num_kv_heads=2, use_bias=True)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    context = Context(jnp.broadcast_to(jnp.arange(5), (2, 5)))
    params = module.init(jax.random.key(1), x, context)["params"]
    run = jax.jit(lambda p: module.apply({"params": p}, x, context)[0])
    # The products are the same sums of 8 terms; libraries may order them by the width of the matrix.
    np.testing.assert_allclose(run(fuse_projections(params)), run(params), atol=1e-6)


def test_connectors_are_left_alone():
    reader = {name: {"kernel": jnp.ones((3, 2))} for name in ("query", "key", "value")}
    found = fuse_projections({"connector": {"attention": reader}, "tower": {"attention": reader}})
    assert found["connector"]["attention"].keys() == reader.keys() and found["tower"]["attention"].keys() == {
        "qkv"
    }


def test_unfuse():
    """Two query heads and one key head of dimension 2: columns 0-3, 4-5, 6-7; gate and up are halves."""
    qkv, gate_up = np.arange(16.0).reshape(2, 8), np.arange(12.0).reshape(2, 6)
    tree = {
        "attention": {"qkv": {"kernel": qkv, "bias": qkv[0]}, "output": {"kernel": qkv}},
        "mlp": {"gate_up": {"kernel": gate_up}},
    }
    plain = unfuse(tree, heads=2, kv_heads=1)
    assert sorted(plain["attention"]) == ["key", "output", "query", "value"]
    np.testing.assert_array_equal(plain["attention"]["query"]["kernel"], [[0, 1, 2, 3], [8, 9, 10, 11]])
    np.testing.assert_array_equal(plain["attention"]["key"]["kernel"], [[4, 5], [12, 13]])
    np.testing.assert_array_equal(plain["attention"]["value"]["bias"], [6, 7])
    np.testing.assert_array_equal(plain["mlp"]["gate"]["kernel"], [[0, 1, 2], [6, 7, 8]])
    np.testing.assert_array_equal(plain["mlp"]["up"]["kernel"], [[3, 4, 5], [9, 10, 11]])
