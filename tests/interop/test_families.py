"""`config.json` of transformers 4 and 5 to models, and what is refused."""

import re

import pytest

from research.errors import UserError
from research.interop.families import read_config
from research.nn.masks import Causal, Window
from research.nn.norm import RMSNorm
from research.nn.rotary import LinearScaling, Llama3Scaling, Rotary, YarnScaling


def layers(model):
    return [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]


def rules(model):
    return [block.attention.rule for block in layers(model)]


def test_what_absent_entries_stand_for(model_of):
    llama = model_of("llama", num_key_value_heads=None)
    attention = llama.blocks[0].attention
    assert (attention.kv_heads, attention.head_dim) == (4, 16 // 4)
    assert attention.rotary == Rotary(10_000.0)
    assert llama.blocks[0].norm == RMSNorm(1e-6) and not llama.tied_head
    assert model_of("qwen3").blocks[0].attention.head_dim == 128
    gemma = model_of("gemma2")
    attention = gemma.blocks[0].attention
    assert (attention.head_dim, attention.scale, attention.softcap) == (256, 1 / 16, 50.0)
    assert (gemma.logit_softcap, gemma.embedding_multiplier, gemma.tied_head) == (30.0, 4.0, True)
    assert gemma.blocks[0].norm == RMSNorm(1e-6, unit_offset=True) and gemma.blocks[0].post_norms


def test_which_layers_are_windowed(model_of):
    full, near = Causal(), Window(4096)
    assert rules(model_of("llama")) == [full, full]
    assert rules(model_of("mistral")) == [near, near]
    assert rules(model_of("mistral", sliding_window=None)) == [full, full]
    assert rules(model_of("qwen2", num_hidden_layers=3, max_window_layers=1)) == [full] * 3
    qwen = model_of(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1
    )
    assert rules(qwen) == [full, Window(5), Window(5)]
    gemma2 = model_of("gemma2", num_hidden_layers=5)
    assert rules(gemma2) == [near, full, near, full, near] and len(gemma2.blocks) == 2
    gemma3 = model_of("gemma3_text", num_hidden_layers=8, sliding_window_pattern=3)
    assert rules(gemma3) == [near, near, full, near, near, full, near, near] and len(gemma3.blocks) == 3
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    assert rules(model_of("gemma3_text", num_hidden_layers=3, layer_types=types)) == [full, near, near]


@pytest.mark.parametrize(
    ("old", "new", "rotary"),
    [
        ({"rope_theta": 7.0}, {"rope_type": "default", "rope_theta": 7.0}, Rotary(7.0)),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
            Rotary(7.0, LinearScaling(2.0)),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            Rotary(10_000.0, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        ),
        (
            # The original length is max_position_embeddings where it isn't given.
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "truncate": False}},
            {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "truncate": False},
            Rotary(10_000.0, YarnScaling(4.0, 64, truncate=False)),
        ),
    ],
)
def test_rotary_of_both_versions(model_of, old, new, rotary):
    assert model_of("llama", **old).blocks[0].attention.rotary == rotary
    assert model_of("llama", rope_parameters=new).blocks[0].attention.rotary == rotary


def test_yarn_attention_factor(model_of):
    """From mscale and mscale_all_dim: (0.1 * 1 * ln e + 1) / (0.1 * 0.5 * ln e + 1) = 1.1 / 1.05."""
    scaling = {"rope_type": "yarn", "factor": 2.718281828459045, "mscale": 1.0, "mscale_all_dim": 0.5}
    rotary = model_of("qwen3", rope_scaling=scaling).blocks[0].attention.rotary
    assert rotary.scaling.attention_factor == pytest.approx(1.1 / 1.05, rel=1e-12)
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    rotary = model_of("qwen3", rope_scaling=scaling).blocks[0].attention.rotary
    assert rotary.scaling == YarnScaling(64 / 16, 16)


def test_gemma3_has_two_rotary_bases(model_of):
    linear = {"rope_type": "linear", "factor": 8.0}
    types = ["sliding_attention", "full_attention"]
    old = {"rope_theta": 5e5, "rope_local_base_freq": 99.0, "rope_scaling": linear}
    new = {
        "rope_parameters": {
            "full_attention": {**linear, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
        }
    }
    for form in (old, new):
        model = model_of("gemma3_text", layer_types=types, **form)
        ropes = [block.attention.rotary for block in layers(model)]
        assert ropes == [Rotary(99.0), Rotary(5e5, LinearScaling(8.0))]
    plain = model_of("gemma3_text", layer_types=types)
    assert [block.attention.rotary for block in layers(plain)] == [Rotary(1e4), Rotary(1e6)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"model_type": "lama"},
            "model_type lama is not supported.*nearest is llama.*supported: llama, mistral, q",
        ),
        ({"model_type": "gemma3"}, "images and text.*gemma3_text"),
        ({"model_type": None}, "model_type is missing; supported: llama"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"hidden_size": "16"}, 'hidden_size is "16"; accepted: a whole number'),
        ({"hidden_size": True}, "hidden_size is true"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; accepted: a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; accepted: true or false"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3; accepted: a divisor of num_attention_heads, 4",
        ),
        ({"head_dim": 5}, "head_dim is 5; accepted: an even number"),
        ({"hidden_act": "mish"}, 'hidden_act is "mish"; accepted: gelu, gelu_new, gelu_pytorch_tanh'),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map is set.*never run"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config is set"),
        ({"layer_types": ["sliding_attention"] * 2}, "llama has full_attention only"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            '"dynamic"; accepted: default, linear, llama3, yarn',
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, '"longrope"; accepted'),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type is .*accepted"),
        ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn"; accepted: an object'),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear scaling needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one entry for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window is false"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, '"chunked_attention"; accepted'),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "a list of 2 names"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping is set"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}, "full_attention and sliding"),
        ({"model_type": "gemma2", "sliding_window": -1}, "sliding_window is -1"),
    ],
)
def test_refused(model_of, entries, message):
    with pytest.raises(UserError) as error:
        model_of(**{"model_type": "llama", **entries})
    assert str(error.value).startswith("config.json: ")
    assert re.search(message, str(error.value)), error.value


def test_missing_entry_names_the_nearest():
    with pytest.raises(UserError, match="hidden_size is missing; did you mean it by hiden_size"):
        read_config({"model_type": "llama", "num_hidden_layers": 1, "hiden_size": 3}, "config.json")
