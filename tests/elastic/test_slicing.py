"""Slices: really smaller arrays that compute what masking the full model would, and modules that fit them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.elastic.slicing import (
    ElasticSpec,
    mlp_widths,
    nested_widths,
    slice_mlp,
    slice_model,
    slice_params,
)
from research.errors import UserError
from research.moe.layer import MoE
from research.nn.attention import Attention, Context
from research.nn.fuse import fuse_projections
from research.nn.masks import Causal, Window
from research.nn.mlp import ACTIVATIONS, MLP, GatedMLP
from research.nn.transformer import scan_params
from research.nn.weights import LowRank, materialize
from tests.programs import call, drawn


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def fresh_shapes(model):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return shapes(jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cls", [MLP, GatedMLP])
def test_masked_equals_sliced(cls, activation):
    """Units from 5 on set to 0 after the activation, in float64, against the FFN of 5 units.

    Sums of at most 8 terms of order 1 in float32: 1e-6.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 6))
    names = {"up": (6, 8), "down": (8, 6)} | ({"gate": (6, 8)} if cls is GatedMLP else {})
    params = {n: {"kernel": rng.normal(size=s) / 3, "bias": rng.normal(size=s[1])} for n, s in names.items()}

    def linear(name, y):
        return y @ params[name]["kernel"] + params[name]["bias"]

    def act(y):
        return np.asarray(jax.jit(ACTIVATIONS[activation])(y.astype(np.float32)), np.float64)

    hidden = act(linear("gate", x)) * linear("up", x) if cls is GatedMLP else act(linear("up", x))
    expected = linear("down", np.where(np.arange(8) < 5, hidden, 0.0))
    sliced = slice_mlp(jax.tree.map(lambda a: a.astype(np.float32), params), 5)
    y = call(cls(5, activation, use_bias=True), sliced, x.astype(np.float32))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)


def test_which_arrays_are_cut():
    bias = {"kernel": np.arange(12.0).reshape(3, 4), "bias": np.arange(4.0)}
    down = {"kernel": np.arange(12.0).reshape(4, 3), "bias": np.arange(3.0)}
    cut = slice_mlp({"up": bias, "gate": bias, "down": down}, 2)
    assert cut["up"]["kernel"].tolist() == cut["gate"]["kernel"].tolist() == [[0, 1], [4, 5], [8, 9]]
    assert cut["up"]["bias"].tolist() == [0, 1]
    assert cut["down"]["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut["down"]["bias"].tolist() == [0, 1, 2]  # shared by all widths


def test_empty_skip_list_and_full_widths_are_the_identity(nested):
    for pattern in (1, 3):
        model = nested.decoder(num_layers=6, pattern=pattern)
        params = nested.init(nested.language(num_layers=6, pattern=pattern))
        spec = ElasticSpec(tuple(range(6)), mlp_widths(model))
        assert slice_model(model, spec) == model
        same = slice_params(params, spec)
        assert jax.tree.structure(same) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, same, params)


def test_every_expert_is_cut():
    """Experts of 5 units give what experts of 8 do whose down kernels have zeros from row 5 on: sums of the same
    numbers and of zeros. Router, bias and the shared FFN stay."""
    layer = MoE(3, 2, 8, use_bias=True, shared=GatedMLP(4), output_bias=True)
    x = np.random.default_rng(0).standard_normal((1, 4, 6)).astype(np.float32)
    places = Context(np.arange(4)[None])
    params = drawn(layer, x, places)
    cut = slice_mlp(params, 5)
    assert shapes(cut["experts"])["up"] == {"kernel": (3, 6, 5), "bias": (3, 5)}
    assert shapes(cut["experts"])["down"] == {"kernel": (3, 5, 6), "bias": (3, 6)}
    kept = {name: leaf for name, leaf in params.items() if name != "experts"}
    jax.tree.map(np.testing.assert_array_equal, {name: cut[name] for name in kept}, kept)
    masked = np.array(params["experts"]["down"]["kernel"])
    masked[:, 5:] = 0.0
    masked = {
        **params,
        "experts": {**params["experts"], "down": {**cut["experts"]["down"], "kernel": masked}},
    }
    outputs = [
        call(module, tree, x, places) for module, tree in ((layer, masked), (layer.clone(hidden_dim=5), cut))
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        ElasticSpec((0, 1, 2), (4, 8, 16)),
        ElasticSpec((0, 2), (16, 3)),
        ElasticSpec((1,), (7,)),
        ElasticSpec((0, 1, 2), (5, 5, 5)),
    ],
    ids=str,
)
def test_sliced_parameters_fit_the_sliced_model(nested, spec):
    model, params = nested.decoder(), nested.init(nested.language())
    small, cut = slice_model(model, spec), slice_params(params, spec)
    assert shapes(cut) == fresh_shapes(small)
    assert mlp_widths(small) == spec.widths and small.num_layers == len(spec.widths)
    # Closed form: embedding 32 x 8, final norm 8; a layer has 4 projections of 8 x 8, two norms of 8, 3 * 8 * m.
    assert sum(leaf.size for leaf in jax.tree.leaves(cut)) == 264 + sum(272 + 24 * m for m in spec.widths)
    assert np.isfinite(call(small, cut, nested.batch["tokens"])).all()


def test_a_pattern_stays_a_pattern_where_the_widths_repeat(nested):
    model = nested.decoder(num_layers=6, pattern=3)
    assert len(slice_model(model, ElasticSpec(tuple(range(6)), (4, 4, 16) * 2)).blocks) == 3
    assert len(slice_model(model, ElasticSpec(tuple(range(6)), (4, 4, 16, 4, 4, 8))).blocks) == 6


def test_skipped_layers_are_renumbered_and_keep_their_attention(nested):
    """Local, local, global twice; without layers 1 and 3: local, global, local, global."""
    model = nested.decoder(num_layers=6, pattern=3)
    params = nested.init(nested.language(num_layers=6, pattern=3))
    spec = ElasticSpec((0, 2, 4, 5), (4, 16, 8, 8))
    small, cut = slice_model(model, spec), slice_params(params, spec)
    assert [b.attention.rule for b in small.blocks] == [Window(2), Causal(), Window(2), Causal()]
    assert sorted(name for name in cut if name.startswith("layer_")) == [f"layer_{i}" for i in range(4)]
    for new, old in enumerate(spec.keep_layers):
        query = cut[f"layer_{new}"]["attention"]["query"]["kernel"]
        np.testing.assert_array_equal(query, params[f"layer_{old}"]["attention"]["query"]["kernel"])
    # Skipping is the same as adding nothing: zero outputs of the skipped layers in the full model.
    zero = {name: dict(layer) for name, layer in params.items()}
    for i in range(6):
        layer = zero[f"layer_{i}"]
        if i in spec.keep_layers:
            width = spec.widths[spec.keep_layers.index(i)]
            down = layer["mlp"]["down"]["kernel"]
            layer["mlp"] = {
                **layer["mlp"],
                "down": {"kernel": np.asarray(down) * (np.arange(16) < width)[:, None]},
            }
        else:
            layer["attention"] = {**layer["attention"], "output": {"kernel": np.zeros((8, 8), np.float32)}}
            layer["mlp"] = {**layer["mlp"], "down": {"kernel": np.zeros((16, 8), np.float32)}}
    tokens = nested.batch["tokens"]
    # Sums of 16 units, half of them zero, against sums of the others alone.
    np.testing.assert_allclose(call(small, cut, tokens), call(model, zero, tokens), rtol=1e-5, atol=2e-6)


def test_scanned_trees_are_sliced_to_one_width(nested):
    model = nested.decoder()
    params = nested.init(nested.language())
    spec = ElasticSpec((0, 1, 2), (4, 4, 4))
    scanned = model.clone(scan_layers=True)
    small, cut = slice_model(scanned, spec), slice_params(scan_params(params, 1), spec)
    assert small.scan_layers and shapes(cut) == fresh_shapes(small)
    expected = scan_params(slice_params(params, spec), 1)
    jax.tree.map(np.testing.assert_array_equal, cut, expected)
    for wrong in (
        ElasticSpec((0, 1, 2), (4, 4, 8)),
        ElasticSpec((0, 1), (4, 4)),
        ElasticSpec((1, 2), (4, 4)),
    ):
        with pytest.raises(UserError, match="unscan_layers it first"):
            slice_model(scanned, wrong)
        with pytest.raises(UserError, match="unscan_params the tree first"):
            slice_params(scan_params(params, 1), wrong)


def test_low_rank_kernels_are_sliced_physically(nested):
    params = nested.init(nested.language())
    low = LowRank(np.ones((8, 2), np.float32), np.arange(32, dtype=np.float32).reshape(2, 16))
    params["layer_0"]["mlp"]["up"]["kernel"] = low
    cut = slice_params(params, ElasticSpec((0, 1, 2), (4, 4, 4)))["layer_0"]["mlp"]["up"]["kernel"]
    assert (cut.down.shape, cut.up.shape) == ((8, 2), (2, 4))
    np.testing.assert_array_equal(materialize(cut), materialize(low)[:, :4])


def test_a_narrower_model_does_less(nested):
    """XLA's own count: at least the matrix products of the missing units, and at most 20 operations more each."""
    task = nested.language()
    params = nested.init(task)
    tokens = nested.batch["tokens"]

    def flops(width):
        spec = ElasticSpec((0, 1, 2), (width,) * 3)
        model, cut = slice_model(task.model, spec), slice_params(params, spec)
        compiled = jax.jit(lambda p: model.apply({"params": p}, tokens)).lower(cut).compile()
        return compiled.cost_analysis()["flops"]

    missing = 4 * 6 * 3 * (16 - 4)  # tokens x layers x units
    # A unit of a token: three products with 8 numbers, 2 operations each; plus the activation and the gate.
    assert missing * 48 <= flops(16) - flops(4) <= missing * (48 + 20)


def test_errors(nested):
    model, params = nested.decoder(), nested.init(nested.language())
    with pytest.raises(UserError, match="hidden_dim 12 does not divide by 8"):
        nested_widths(12)
    assert nested_widths(16) == (2, 4, 8, 16) and nested_widths(12, (3, 1)) == (4, 12)
    with pytest.raises(UserError, match="a submodel of 2 kept layers needs as many widths, got 1"):
        ElasticSpec((0, 1), (4,))
    for keep in ((1, 0), (0, 0), ()):
        with pytest.raises(UserError, match="kept layers must rise and not repeat"):
            ElasticSpec(keep, (4,) * len(keep))
    for width in (0, 17):
        with pytest.raises(UserError, match=f"width {width} of layer 2 is not between 1 and its 16 units"):
            slice_model(model, ElasticSpec((2,), (width,)))
        with pytest.raises(UserError, match=f"width {width} is not between 1 and the 16 hidden units"):
            slice_params(params, ElasticSpec((2,), (width,)))
    for function, argument in ((slice_model, model), (slice_params, params)):
        with pytest.raises(UserError, match="layer 3 to keep is beyond the model's last, 2"):
            function(argument, ElasticSpec((0, 3), (4, 4)))
    with pytest.raises(UserError, match="Attention has no hidden_dim to slice"):
        mlp_widths(model.clone(blocks=(model.blocks[0].clone(mlp=Attention(1, 8)),)))
    with pytest.raises(UserError, match="fused for decoding"):
        slice_params(fuse_projections(params), ElasticSpec((0,), (4,)))
