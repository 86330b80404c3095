"""Sparse families: what `config.json` says of experts, where their tensors are, what no family expresses."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.elastic.slicing import ElasticSpec, slice_model, slice_params
from research.errors import UserError
from research.interop.experts import JETMOE_EPSILON
from research.interop.export import expressible, save
from research.interop.families import FAMILIES, read_config
from research.interop.huggingface import load
from research.interop.members import layers_of, write_config
from research.interop.names import stored
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.nn.attention import Context
from research.nn.masks import Window
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary

WIDTHS = {"experts": 6, "shared": 10, "mlp": 12}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
OPTIONS = {
    "mixtral": {"num_local_experts": 3, "intermediate_size": 6},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 10},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 6},
    "jetmoe": {"num_local_experts": 3, "kv_channels": 4, "intermediate_size": 6},
}


@pytest.fixture(scope="session")
def sparse_of(model_of):
    """`model_of` with a few experts: `sparse_of("mixtral", ...)`."""
    return lambda model_type, **options: model_of(model_type, **{**OPTIONS[model_type], **options})


def ffns(model):
    return [block.mlp for block in layers_of(model)]


def test_what_absent_entries_stand_for(model_of):
    """The defaults of transformers' configuration classes."""
    for model_type, number, k, width in (
        ("mixtral", 8, 2, 12),
        ("qwen2_moe", 60, 4, 1408),
        ("qwen3_moe", 128, 8, 768),
        ("olmoe", 64, 8, 12),
        ("jetmoe", 8, 2, 12),
    ):
        mlp = model_of(model_type).blocks[0].mlp
        assert (mlp.num_experts, mlp.k, mlp.hidden_dim) == (number, k, width)
        assert mlp.norm == ("topk_softmax" if model_type in ("mixtral", "jetmoe") else "softmax_topk")
    mixtral, qwen2, jetmoe = (model_of(name) for name in ("mixtral", "qwen2_moe", "jetmoe"))
    assert (mixtral.blocks[0].attention.rotary, mixtral.final_norm) == (Rotary(1e6), RMSNorm(1e-5))
    assert qwen2.blocks[0].mlp.shared == GatedMLP(5632) and qwen2.blocks[0].mlp.gate_shared
    assert qwen2.blocks[0].attention.use_bias and not qwen2.blocks[0].attention.output_bias
    attention = jetmoe.blocks[0].attention
    assert (attention.num_experts, attention.num_heads, attention.kv_heads, attention.head_dim) == (
        8,
        4,
        2,
        128,
    )
    assert jetmoe.tied_head and jetmoe.blocks[0].mlp.output_bias
    olmoe = model_of("olmoe").blocks[0].attention
    assert olmoe.query_norm == olmoe.key_norm == RMSNorm(1e-5, axes=2)


def test_entries_of_both_versions(sparse_of):
    """transformers 5 calls Qwen 3's number of experts otherwise than 4."""
    old, new = {"num_experts": 5}, {"num_experts": None, "num_local_experts": 5}
    assert [sparse_of("qwen3_moe", **form).blocks[0].mlp.num_experts for form in (old, new)] == [5, 5]


def test_which_layers_have_experts(sparse_of):
    def sparse(**options):
        return [isinstance(mlp, MoE) for mlp in ffns(sparse_of("qwen3_moe", num_hidden_layers=5, **options))]

    assert sparse() == [True] * 5
    assert sparse(decoder_sparse_step=2) == [False, True, False, True, False]  # every second, counted from 1
    assert sparse(mlp_only_layers=[0, 3]) == [False, True, True, False, True]
    assert sparse_of("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2).blocks[0].mlp == GatedMLP(12)


def test_which_layers_have_windows(sparse_of):
    """In Qwen 2 MoE even ones below `max_window_layers`, in Qwen 3 MoE all; if `use_sliding_window`."""

    def windowed(model_type, **options):
        model = sparse_of(model_type, num_hidden_layers=5, sliding_window=7, **options)
        return [block.attention.rule == Window(7) for block in layers_of(model)]

    assert windowed("qwen2_moe", max_window_layers=3) == windowed("qwen3_moe") == [False] * 5
    options = dict(use_sliding_window=True, max_window_layers=3)
    assert windowed("qwen2_moe", **options) == [True, False, True, False, False]
    assert windowed("qwen3_moe", **options) == [True] * 5


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", {"rope_theta": 500.0, "tie_word_embeddings": True, "hidden_act": "gelu"}),
        ("mixtral", {"sliding_window": 5, "head_dim": 6, "rms_norm_eps": 1e-3}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1, "norm_topk_prob": True}),
        ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [1]}),
        ("qwen3_moe", {"attention_bias": True, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "use_sliding_window": True}),
        ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
        ("jetmoe", {"rms_norm_eps": 1e-3, "activation_function": "relu", "tie_word_embeddings": False}),
    ],
)
def test_written_config_is_read_back(sparse_of, model_type, options):
    model = sparse_of(model_type, **options)
    assert expressible(model) == model_type
    entries = json.loads(json.dumps(write_config(FAMILIES[model_type], model, WIDTHS)))
    assert read_config(entries, "config.json") == (FAMILIES[model_type], model)


def test_where_tensors_are():
    """One a projection and expert; JetMoE's stacked, gate before up and keys before values."""
    mixtral, qwen, jetmoe = (FAMILIES[name] for name in ("mixtral", "qwen2_moe", "jetmoe"))
    up = stored("layer_3/mlp/experts/up/kernel", (2, 16, 6), mixtral)
    sparse = "model.layers.3.block_sparse_moe"
    assert up.names == (f"{sparse}.experts.0.w3.weight", f"{sparse}.experts.1.w3.weight")
    assert up.tensor_shape((2, 16, 6)) == (6, 16)
    arrays = [np.arange(6.0).reshape(3, 2), np.arange(6.0, 12.0).reshape(3, 2)]  # [out, in]
    down = stored("layer_0/mlp/experts/down/kernel", (2, 2, 3), mixtral)
    np.testing.assert_array_equal(down.assemble(arrays)[1], [[6, 8, 10], [7, 9, 11]])
    for path, name in (
        ("router/kernel", "gate.weight"),
        ("shared/down/kernel", "shared_expert.down_proj.weight"),
        ("shared_gate/kernel", "shared_expert_gate.weight"),
        ("gate/kernel", "gate_proj.weight"),
    ):
        assert stored(f"layer_1/mlp/{path}", (4, 4), qwen).names == (f"model.layers.1.mlp.{name}",)
    value = stored("layer_0/attention/value/kernel", (16, 8), jetmoe)
    assert value.names == ("model.layers.0.self_attention.kv_proj.weight",)
    assert value.tensor_shape((16, 8)) == (16, 16)  # keys and values of 8
    both = np.arange(256.0).reshape(16, 16)
    np.testing.assert_array_equal(value.assemble([both]), both[8:].T)
    gate = stored("layer_0/mlp/experts/gate/kernel", (3, 16, 6), jetmoe)
    assert gate.tensor_shape((3, 16, 6)) == (3, 12, 16)
    stack = np.arange(3.0 * 12 * 16).reshape(3, 12, 16)
    np.testing.assert_array_equal(gate.assemble([stack])[2], stack[2, :6].T)
    assert stored("layer_0/mlp/bias", (16,), jetmoe).names == ("model.layers.0.mlp.bias",)
    assert stored("layer_0/attention/bias", (16,), jetmoe).names == (
        "model.layers.0.self_attention.experts.bias",
    )


@pytest.fixture(params=OPTIONS)
def pair(request, sparse_of, random_params):
    """A model of every family and its parameters."""
    model = sparse_of(request.param)
    return request.param, model, random_params(model)


def test_round_trip(pair, tmp_path):
    """Saved and loaded: the same model, and the same bits."""
    name, model, params = pair
    report = save(model, {"params": params}, tmp_path / "out")
    assert (report.family, report.ffn_widths, report.padded_to) == (name, (6, 6), None)
    assert report.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    again, variables, _ = load(tmp_path / "out")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    gates = params["layer_1"]["mlp"]["experts"]["gate"]["kernel"]
    if name == "jetmoe":
        stack = tensors["model.layers.1.mlp.input_linear.weight"]
        np.testing.assert_array_equal(stack[:, :6], gates.swapaxes(1, 2))
    else:
        part = "block_sparse_moe.experts.2.w1" if name == "mixtral" else "mlp.experts.2.gate_proj"
        np.testing.assert_array_equal(tensors[f"model.layers.1.{part}.weight"], gates[2].T)


def test_narrower_experts_are_padded(pair, tmp_path):
    """Experts of 4 and 6 units: the file holds zeros for the missing ones, whose down rows are zero too."""
    name, model, params = pair
    spec = ElasticSpec((0, 1), (4, 6))
    cut = slice_params(params, spec)
    with pytest.raises(UserError, match="FFN widths 4, 6 differ between layers"):
        save(slice_model(model, spec), {"params": cut}, tmp_path / "out", unequal="refuse")
    report = save(slice_model(model, spec), {"params": cut}, tmp_path / "out")
    assert (report.ffn_widths, report.padded_to) == ((4, 6), 6)
    again, variables, _ = load(tmp_path / "out")
    assert again == model
    zeroed = jax.tree.map(np.copy, params)
    experts = zeroed["layer_0"]["mlp"]["experts"]
    for part in ("gate", "up"):
        experts[part]["kernel"][:, :, 4:] = 0.0
    experts["down"]["kernel"][:, 4:] = 0.0
    jax.tree.map(np.testing.assert_array_equal, variables["params"], zeroed)


def test_stacked_tensors_are_read(sparse_of, random_params, tmp_path):
    """The form that transformers 5 has in memory: one tensor for the gates and ups of all experts."""
    model = sparse_of("mixtral")
    params = random_params(model)
    save(model, {"params": params}, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if "block_sparse_moe" not in name}
    for layer in range(2):
        mlp, prefix = params[f"layer_{layer}"]["mlp"], f"model.layers.{layer}.mlp"
        gate, up, down = (mlp["experts"][part]["kernel"].swapaxes(1, 2) for part in ("gate", "up", "down"))
        tensors[f"{prefix}.gate.weight"] = mlp["router"]["kernel"].T
        tensors[f"{prefix}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{prefix}.experts.down_proj"] = down
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1]["params"], params)


def change(model, mlp=None, layer=None, **attention):
    """The model with other parts, in every layer or in one."""
    blocks = layers_of(model)
    for i, block in enumerate(blocks):
        if layer in (None, i):
            parts = dict(
                mlp=mlp(block.mlp) if mlp else block.mlp, attention=block.attention.clone(**attention)
            )
            blocks[i] = block.clone(**parts)
    return model.clone(blocks=tuple(blocks))


def option(**fields):
    return lambda model, layer=None: change(model, lambda mlp: mlp.clone(**fields), layer)


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("mixtral", option(gated=False), r"MoE.gated=False, and families have gated experts"),
        ("mixtral", option(use_bias=True), "MoE.use_bias=True, and families have experts without biases"),
        ("mixtral", option(router_bias=True), "MoE.router_bias=True"),
        ("mixtral", option(ranks=(1,)), r"MoE.ranks=\(1,\), and families have the k best experts"),
        ("mixtral", option(capacity_factor=1.0), "MoE.capacity_factor=1.0.*nothing is dropped"),
        ("mixtral", option(norm="unit"), "MoE.norm='unit', and families have gates from a softmax"),
        ("mixtral", option(shared=MLP(4)), r"MoE.shared, and families have a GatedMLP behind a sigmoid"),
        ("mixtral", lambda m: option(num_experts=4)(m, 1), "the MoE num_experts differs: 3, 4"),
        (
            "mixtral",
            option(norm="softmax_topk"),
            r"the nearest: mixtral has gates that add up to 1 \(norm\)$",
        ),
        (
            "mixtral",
            option(output_bias=True),
            r"the nearest: mixtral has no bias of the FFN \(output_bias\)$",
        ),
        (
            "mixtral",
            lambda m: change(m, lambda _: GatedMLP(6), 1),
            "the nearest: mixtral has experts in every",
        ),
        ("qwen2_moe", option(shared=None, gate_shared=False), "qwen2_moe has an expert for all tokens"),
        ("olmoe", lambda m: change(m, softcap=5.0), "the nearest: olmoe has no soft cap of the scores$"),
        (
            "olmoe",
            lambda m: change(m, rule=Window(3)),
            "the nearest: olmoe has no windowed layers$|qwen3_moe has query and key norms$",
        ),
        ("jetmoe", lambda m: change(m, rule=Window(3)), "the nearest: jetmoe has no windowed layers$"),
        ("jetmoe", lambda m: change(m, capacity_factor=2.0), "attention experts have a capacity"),
        (
            "jetmoe",
            lambda m: change(m, layer=1, k=1),
            "the attention num_heads differs: 4, 2; .*k differs: 2, 1",
        ),
        ("jetmoe", lambda m: change(m, num_experts=4), "jetmoe has as many experts in attention and FFN$"),
        ("jetmoe", lambda m: change(m, lambda _: GatedMLP(6)), "jetmoe has experts in every layer$"),
        ("jetmoe", lambda m: change(m, output_bias=False), "jetmoe has a bias of the attention"),
        (
            "jetmoe",
            lambda m: m.clone(blocks=tuple(block.clone(norm=RMSNorm(1e-3)) for block in m.blocks)),
            f"jetmoe has layers with norms of epsilon {JETMOE_EPSILON}$",
        ),
    ],
)
def test_not_expressible(sparse_of, family, changed, message):
    with pytest.raises(UserError) as error:
        expressible(changed(sparse_of(family)))
    assert re.search(message, str(error.value)), error.value
    assert str(error.value).startswith("no family of transformers expresses this model")


def test_unequal_widths_of_dense_and_sparse_layers(sparse_of):
    model = sparse_of("qwen3_moe", mlp_only_layers=[0, 1], num_hidden_layers=4)
    assert expressible(model) == "qwen3_moe"
    with pytest.raises(UserError, match="FFN widths 4, 6 differ.*one width for its dense layers and one for"):
        expressible(slice_model(model, ElasticSpec((0, 1, 2, 3), (12, 12, 4, 6))))


def test_dispatch_and_training_options_do_not_matter(sparse_of):
    """They change neither logits nor `config.json`."""
    model = option(dispatch="dense", noise=0.1, balance_weight=0.0)(sparse_of("mixtral"))
    assert expressible(model) == "mixtral"


def test_one_attention_of_experts_is_not_jetmoe(sparse_of):
    model = sparse_of("jetmoe")
    plain = sparse_of("mixtral").blocks[0].attention
    first, second = layers_of(model)
    mixed = model.clone(blocks=(first, second.clone(attention=plain)))
    assert isinstance(first.attention, MixtureOfAttention)
    with pytest.raises(UserError, match="no family of transformers expresses this model"):
        expressible(mixed)


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        (
            "mixtral",
            {"num_experts_per_tok": 4},
            "num_experts_per_tok is 4; accepted: at most 3, the number of ex",
        ),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0; accepted: a whole number"),
        ("qwen2_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; accepted: true or false"),
        (
            "qwen2_moe",
            {"mlp_only_layers": [True]},
            r"mlp_only_layers is \[true\]; accepted: a list of layers",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; accepted: null"),
        ("olmoe", {"head_dim": 6}, "head_dim is 6; accepted: hidden_size / num_attention_heads, 4$"),
        ("jetmoe", {"kv_channels": 5}, "kv_channels is 5; accepted: an even number"),
        ("jetmoe", {"activation_function": "mish"}, 'activation_function is "mish"; accepted: gelu'),
    ],
)
def test_refused(sparse_of, family, entries, message):
    with pytest.raises(UserError) as error:
        sparse_of(family, **entries)
    assert str(error.value).startswith("config.json: ")
    assert re.search(message, str(error.value)), error.value


def test_another_number_of_experts(sparse_of, random_params, edit, tmp_path):
    model = sparse_of("mixtral")
    save(model, {"params": random_params(model)}, tmp_path / "out")
    edit(tmp_path / "out" / "config.json", num_local_experts=2_000_000_000)
    with pytest.raises(UserError, match="num_local_experts is 2000000000, but the tensors are of 3 experts"):
        load(tmp_path / "out")
    model = sparse_of("jetmoe")
    save(model, {"params": random_params(model)}, tmp_path / "jetmoe")
    edit(tmp_path / "jetmoe" / "config.json", num_local_experts=4)
    with pytest.raises(UserError, match=r"input_linear.weight is \[3, 8, 16\] and .* asks for \[4, 8, 16\]"):
        load(tmp_path / "jetmoe")


def test_logits_by_hand(sparse_of, random_params):
    """Qwen 2's layer: gates of the chosen two, not renormalised, and a shared FFN behind a sigmoid."""
    model = sparse_of("qwen2_moe", num_hidden_layers=1)
    mlp, params = model.blocks[0].mlp, random_params(model)["layer_0"]["mlp"]
    x = np.random.default_rng(1).normal(size=(4, 16))
    got = jax.jit(mlp.apply)({"params": params}, jnp.asarray(x, jnp.float32), Context(jnp.arange(4)[None]))

    def ffn(part, expert=()):
        gate, up, down = (
            np.asarray(part[name]["kernel"], np.float64)[expert] for name in ("gate", "up", "down")
        )
        hidden = x @ gate
        return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down

    logits = x @ params["router"]["kernel"]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    keep = logits > logits.min(axis=1, keepdims=True)  # 2 of 3
    want = sum((probs * keep)[:, e, None] * ffn(params["experts"], e) for e in range(3))
    want += ffn(params["shared"]) / (1 + np.exp(-x @ params["shared_gate"]["kernel"]))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
