"""Which family expresses a model, what is refused and why, and what is written."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.data.tokenizer import Tokenizer
from research.elastic.slicing import ElasticSpec, slice_model, slice_params
from research.errors import UserError
from research.interop.export import expressible, save
from research.interop.families import FAMILIES, read_config
from research.interop.huggingface import load
from research.interop.members import layers_of, write_config
from research.language.decoder import DecoderLM
from research.nn.masks import Full, Prefix, Window
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.rotary import Llama3Scaling, Rotary, YarnScaling
from research.nn.transformer import scan_params
from research.nn.weights import LowRank

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"rope_theta": 500.0, "max_position_embeddings": 100, "tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "relu2", "rms_norm_eps": 1e-5}),
        ("mistral", {"head_dim": 6}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "rope_scaling": None}),
        ("qwen2", {"head_dim": 6}),
        ("qwen3", {"attention_bias": True, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("gemma2", {"num_hidden_layers": 3, "query_pre_attn_scalar": 144}),
        ("gemma3_text", {"num_hidden_layers": 7, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3_text", {"sliding_window_pattern": 1, "final_logit_softcapping": 9.0}),
    ],
)
def test_written_config_is_read_back(model_of, model_type, options):
    model = model_of(model_type, **options)
    assert expressible(model) == model_type
    entries = json.loads(json.dumps(write_config(FAMILIES[model_type], model, {"mlp": 12})))
    assert read_config(entries, "config.json") == (FAMILIES[model_type], model)
    if model.num_layers % len(model.blocks) == 0:
        assert expressible(model.clone(scan_layers=True)) == model_type


def test_a_plain_window_is_mistral_and_none_is_llama(model_of):
    assert expressible(model_of("mistral", sliding_window=None)) == "llama"
    assert expressible(change(model_of("llama"), rule=Window(3))) == "mistral"


def change(model, mlp=None, norm=None, layer=None, **attention):
    """The model with other parts, in every layer or in one."""
    blocks = layers_of(model)
    for i, block in enumerate(blocks):
        if layer in (None, i):
            parts = {"attention": block.attention.clone(**attention), "mlp": mlp or block.mlp}
            blocks[i] = block.clone(**parts, norm=norm or block.norm)
    return model.clone(blocks=tuple(blocks))


class Sparse:
    """An attention kernel that isn't one of the exact ones."""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda m: change(m, mlp=MLP(12)), "the FFN is MLP, not GatedMLP"),
        (lambda m: change(m, norm=LayerNorm()), "the norm is LayerNorm, not RMSNorm"),
        (lambda m: m.clone(final_norm=RMSNorm(1e-3)), "the norm epsilon differs: 0.001, 1e-06"),
        (lambda m: change(m, rotary=None), "the rotary embedding is absent, not Rotary"),
        (lambda m: change(m, rule=Prefix()), "the mask rule is Prefix, not Causal or Window"),
        (lambda m: change(m, rule=Full()), "the mask rule is Full"),
        (lambda m: change(m, rule=Window(3, sinks=1)), "a size per head or sinks"),
        (lambda m: change(m, rule=Window((1, 2, 3, 4))), "a size per head or sinks"),
        (
            lambda m: change(change(m, rule=Window(3)), layer=1, rule=Window(4)),
            "the window size differs: 3, 4",
        ),
        (lambda m: change(m, kernel=Sparse()), "the attention kernel is Sparse"),
        (lambda m: change(m, layer=1, num_kv_heads=4), "the attention kv_heads differs: 2, 4"),
        (lambda m: change(m, layer=1, mlp=GatedMLP(12, "relu")), "the FFN activation differs: silu, relu"),
        (lambda m: change(m, layer=1, rotary=Rotary(9.0)), "rotary embedding of unwindowed layers differs"),
        (lambda m: change(m, query_norm=RMSNorm()), "only one of query_norm and key_norm"),
        (lambda m: change(m, softcap=5.0), "the nearest: llama has no soft cap of the scores$"),
        (lambda m: m.clone(logit_softcap=5.0), "the nearest: llama has no soft cap of the logits$"),
        (lambda m: m.clone(embedding_multiplier=2.0), "the nearest: llama multiplies embeddings by 1$"),
        (lambda m: change(m, scale=0.3), "the nearest: llama scales scores by the inverse root of head_dim$"),
        (
            lambda m: change(m, output_bias=True),
            "llama has biases on all four attention projections or on none",
        ),
        (lambda m: change(m, layer=1, rule=Window(3)), "the nearest: llama has no windowed layers$"),
    ],
)
def test_not_expressible(model_of, changed, message):
    with pytest.raises(UserError) as error:
        expressible(changed(model_of("llama")))
    assert re.search(message, str(error.value)), error.value
    assert str(error.value).startswith("no family of transformers expresses this model")


def test_gemma_refusals_name_what_is_missing(model_of):
    gemma = model_of("gemma2")
    with pytest.raises(UserError, match="gemma2 scales scores by the inverse root of a whole number"):
        expressible(change(gemma, scale=0.3))
    with pytest.raises(UserError, match=r"gemma2 has norms after both branches \(post_norms\)"):
        expressible(gemma.clone(blocks=tuple(block.clone(post_norms=False) for block in gemma.blocks)))
    local = model_of("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(UserError, match="gemma3_text doesn't scale the positions of windowed layers"):
        expressible(change(local, layer=0, rotary=Rotary(1e4, Llama3Scaling())))
    with pytest.raises(UserError, match="gemma3_text has no truncate=False in YaRN"):
        expressible(change(local, layer=1, rotary=Rotary(1e4, YarnScaling(2.0, 8, truncate=False))))


class Longer(DecoderLM):
    """A subclass may compute anything."""


def test_other_models_are_refused(model_of):
    model = model_of("llama")
    names = ("blocks", "num_layers", "vocab_size", "width", "max_length")
    fields = {name: getattr(model, name) for name in names}
    assert expressible(DecoderLM(**fields)) == "llama"
    with pytest.raises(UserError, match="it is a Longer, not a plain DecoderLM"):
        expressible(Longer(**fields))


def test_unequal_widths_are_padded_or_refused(model_of, random_params, tmp_path):
    """Two widths, 4 and 12 of 12: the file holds the cut matrices, then zeros."""
    model = model_of("llama", mlp_bias=True)
    params = random_params(model)
    spec = ElasticSpec((0, 1), (4, 12))
    cut_model, cut = slice_model(model, spec), slice_params(params, spec)
    assert expressible(cut_model) == "llama"
    with pytest.raises(UserError, match="4, 12 differ between layers.*Gemma 3n .*AltUp, LAuReL"):
        expressible(cut_model, unequal="refuse")
    with pytest.raises(UserError, match="4, 12 differ between layers"):
        save(cut_model, {"params": cut}, tmp_path / "out", unequal="refuse")
    report = save(cut_model, {"params": cut}, tmp_path / "out")
    assert "FFN widths 4, 12 are zero-padded to 12" in str(report)
    assert report.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("gate", "up"):
        mlp = params["layer_0"]["mlp"][part]
        weight, bias = (tensors[f"model.layers.0.mlp.{part}_proj.{leaf}"] for leaf in ("weight", "bias"))
        np.testing.assert_array_equal(weight[:4], mlp["kernel"][:, :4].T)
        np.testing.assert_array_equal(bias[:4], mlp["bias"][:4])
        assert not weight[4:].any() and not bias[4:].any()
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(down[:, :4], params["layer_0"]["mlp"]["down"]["kernel"][:4].T)
    assert not down[:, 4:].any()
    np.testing.assert_array_equal(tensors[UP.format(1)], params["layer_1"]["mlp"]["up"]["kernel"].T)
    # A tree that was cut without its model says the same.
    save(model, {"params": cut}, tmp_path / "tree")
    assert (tmp_path / "tree" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_padded_ffn_is_exact(model_of, random_params, tmp_path):
    """With whole numbers and relu every sum is exact in float32, so padding must not change a single bit."""
    model = model_of("llama", hidden_act="relu")
    spec = ElasticSpec((0, 1), (5, 12))
    params = jax.tree.map(lambda leaf: np.round(4 * leaf), slice_params(random_params(model), spec))
    save(slice_model(model, spec), {"params": params}, tmp_path / "out")
    padded = load(tmp_path / "out")[1]["params"]
    x = np.random.default_rng(0).integers(-9, 9, (7, 16)).astype(np.float32)
    before = GatedMLP(5, "relu").apply({"params": params["layer_0"]["mlp"]}, x)
    after = GatedMLP(12, "relu").apply({"params": padded["layer_0"]["mlp"]}, x)
    assert np.abs(before).max() > 1000
    np.testing.assert_array_equal(before, after)


def test_structured_and_scanned_kernels_are_made_plain(model_of, random_params, tmp_path):
    model = model_of("llama")
    params = random_params(model)
    down, up = np.ones((16, 3), np.float32), np.full((3, 12), 2.0, np.float32)
    for layer in ("layer_0", "layer_1"):
        params[layer]["mlp"]["up"] = {"kernel": LowRank(jnp.asarray(down), jnp.asarray(up))}
    save(model, {"params": params}, tmp_path / "plain")
    save(model.clone(scan_layers=True), {"params": scan_params(params, 1)}, tmp_path / "scanned")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    np.testing.assert_array_equal(tensors[UP.format(1)], np.full((12, 16), 6.0))  # 3 terms of 1 * 2
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "scanned" / "model.safetensors"
    ).read_bytes()


def test_parameters_that_do_not_fit(model_of, random_params, tmp_path):
    model = model_of("llama")
    params = random_params(model)
    without = {**params, "layer_1": {k: v for k, v in params["layer_1"].items() if k != "mlp_norm"}}
    misshapen = {**params, "head": {"kernel": np.zeros((16, 18), np.float32)}}
    narrow = {**params, "layer_0": {**params["layer_0"], "mlp": {**params["layer_0"]["mlp"]}}}
    narrow["layer_0"]["mlp"]["gate"] = {"kernel": params["layer_0"]["mlp"]["gate"]["kernel"][:, :4]}
    for tree, message in (
        (without, "missing layer_1/mlp_norm/scale"),
        ({**params, "extra": {"scale": np.ones(3)}}, "unexpected extra/scale"),
        (misshapen, r"head/kernel is \[16, 18\], not \[16, 19\]"),
        (narrow, r"layer_0/mlp/gate/kernel is \[16, 4\], not \[16, 12\]"),
    ):
        with pytest.raises(UserError, match=message):
            save(model, {"params": tree}, tmp_path / "out")
    with pytest.raises(UserError, match='must hold "params" alone.*batch_stats'):
        save(model, {"params": params, "batch_stats": {}}, tmp_path / "out")
    with pytest.raises(UserError, match="dtype 'int8' is not supported; one of float32, float16, bfloat16"):
        save(model, {"params": params}, tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="the tokenizer has 4096 tokens, the vocabulary of the model 19"):
        save(model, {"params": params}, tmp_path / "out", tokenizer=Tokenizer.load())
    with pytest.raises(UserError, match="unequal 'drop' is not supported; one of pad, refuse"):
        save(model, {"params": params}, tmp_path / "out", unequal="drop")
    params["head"]["kernel"] = np.full((16, 19), 1e5, np.float32)
    with pytest.raises(UserError, match="lm_head.weight has 304 values too large for float16"):  # 16 * 19
        save(model, {"params": params}, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []
