"""Names of tensors."""

from research.interop.families import FAMILIES
from research.interop.names import flatten, layer_count, stored
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


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    leaves = dict(flatten(tree))
    assert leaves == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nested(leaves) == tree
