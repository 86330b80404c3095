"""Names of tensors, and fused projections taken apart."""

import numpy as np

from research.interop.families import FAMILIES
from research.interop.names import flatten, layer_count, stored, unfuse
from research.training.paths import nested


def name_of(path, family):
    (name,) = stored(path, (4, 4), FAMILIES[family]).names
    return name


def test_names_of_the_two_norm_schemes():
    assert name_of("layer_3/attention/query/kernel", "llama") == "model.layers.3.self_attn.q_proj.weight"
    assert name_of("layer_0/attention/output/bias", "llama") == "model.layers.0.self_attn.o_proj.bias"
    assert name_of("layer_0/mlp_norm/scale", "llama") == "model.layers.0.post_attention_layernorm.weight"
    assert name_of("layer_0/mlp_norm/scale", "gemma2") == "model.layers.0.pre_feedforward_layernorm.weight"
    post = name_of("layer_0/attention_post_norm/scale", "gemma2")
    assert post == "model.layers.0.post_attention_layernorm.weight"


def test_layer_count():
    names = ["model.layers.0.x", "model.layers.11.x", "model.norm.weight", "vision.layers.40.x"]
    assert layer_count(names) == 12
    assert layer_count(["model.norm.weight"]) == 0


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


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    leaves = dict(flatten(tree))
    assert leaves == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nested(leaves) == tree
