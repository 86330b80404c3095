"""MatFormer's exact properties, for both training modes, on a decoder and on a ViT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build
from research.config_capture import capture
from research.elastic.matformer import MatFormer, extract, mix_n_match, nest, parse_widths
from research.elastic.slicing import ElasticSpec, slice_params
from research.errors import UserError
from research.nn.transformer import scan_params
from research.training.optimizers import adamw, constant
from research.training.partitioning import make_mesh
from research.training.stages import Stage
from research.training.state import initial_state
from research.training.step import make_step
from tests.programs import call

KEY = jax.random.key(11)


@pytest.fixture(params=["decoder", "vit"])
def case(request, nested):
    """(task, batch) of each kind of model."""
    if request.param == "decoder":
        return nested.language(), nested.batch
    return nested.classification(), nested.images


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def loss_of(task, params, batch, key):
    metrics = task.loss(params, batch, key)
    return metrics["loss"][0], metrics


@functools.partial(jax.jit, static_argnums=0)
def gradient(task, params, batch):
    """Of the summed loss, with respect to all parameters."""
    return jax.grad(lambda p: loss_of(task, p, batch, KEY)[0])(params)


@functools.partial(jax.jit, static_argnums=0)
def measured(task, params, batch, key):
    """The metrics of the loss."""
    return task.loss(params, batch, key)


def mean(metric):
    return float(metric[0]) / float(metric[1])


def key_that_draws(index, count):
    """A key of the loss whose draw is `index` (the first half of its split draws)."""
    draw = lambda key: jax.random.randint(jax.random.split(key)[0], (), 0, count)  # noqa: E731
    drawn = jax.jit(jax.vmap(lambda seed: draw(jax.random.key(seed))))(np.arange(100))
    return jax.random.key(drawn.tolist().index(index))


def test_granularities_are_prefixes_and_the_full_one_is_the_model(case, nested):
    task, _ = case
    params = nested.init(task)
    mat = MatFormer(task)
    variants = mat.variants(params)
    assert list(variants) == ["S", "M", "L", "XL"]
    assert variants["XL"] is params  # width F: the very same arrays, hence the same logits bit for bit
    for variant, width in zip(variants.values(), (2, 4, 8, 16), strict=True):
        mlp, full = variant["layer_1"]["mlp"], params["layer_1"]["mlp"]
        up, down = (np.asarray(full[name]["kernel"]) for name in ("up", "down"))
        np.testing.assert_array_equal(mlp["up"]["kernel"], up[:, :width])
        np.testing.assert_array_equal(mlp["down"]["kernel"], down[:width])
        assert variant["layer_1"]["attention"] is params["layer_1"]["attention"]
    layers = task.model.num_layers
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for name, width in (("S", 2), ("L", 8)):
        small = sum(leaf.size for leaf in jax.tree.leaves(variants[name]))
        # A unit has 8 numbers in up and 8 in down, and 8 in gate (decoder) or a bias (ViT).
        assert count - small == layers * (16 - width) * (24 if "gate" in params["layer_0"]["mlp"] else 17)


def test_joint_loss_is_the_sum_and_its_monitors_are_the_terms(case, nested):
    task, batch = case
    params = nested.init(task)
    mat = MatFormer(task, divisors=(4, 1), loss_weights=(0.5, 2.0))
    joint, metrics = jax.jit(jax.grad(lambda p: loss_of(mat, p, batch, KEY), has_aux=True))(params)
    single = jax.jit(jax.grad(lambda p: loss_of(task, p, batch, KEY), has_aux=True))
    parts, plain = zip(*(single(mat.granularity(params, i)) for i in range(2)), strict=True)
    means = [mean(m["loss"]) for m in plain]
    assert mean(metrics["loss"]) == pytest.approx(0.5 * means[0] + 2.0 * means[1], rel=1e-6)
    assert [mean(metrics[f"loss_{n}"]) for n in mat.names] == pytest.approx(means, rel=1e-6)
    assert mat.names == ("1/4", "1/1")
    np.testing.assert_allclose(metrics["accuracy"], plain[1]["accuracy"])  # that of the full model

    # 0.5 and 2 times the gradients of the two models, the small one's filled up with zeros (up to rounding of
    # sums of float32 numbers of order 1): the monitors of the terms add nothing.
    def sum_of_both(small, full, g):
        padded = np.pad(small, [(0, to - have) for have, to in zip(small.shape, full.shape, strict=True)])
        np.testing.assert_allclose(g, 0.5 * padded + 2.0 * full, rtol=1e-4, atol=1e-5)

    jax.tree.map(sum_of_both, *parts, joint)


def test_units_beyond_the_drawn_width_get_a_gradient_of_exactly_zero(case, nested):
    task, batch = case
    params = nested.init(task)
    mat = MatFormer(task, divisors=(4, 1), training="sampled")
    sampled = jax.jit(jax.grad(lambda p, k: loss_of(mat, p, batch, k), has_aux=True))
    for index, width in enumerate((4, 16)):
        key = key_that_draws(index, 2)
        drawn, metrics = jax.device_get(sampled(params, key))
        part = lambda p, i=index: loss_of(task, mat.granularity(p, i), batch, KEY)[0]  # noqa: E731
        alone = jax.device_get(jax.jit(jax.grad(part))(params))
        # The same operations on the same arrays; only their order inside sums may differ.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), drawn, alone)
        for g in (drawn, alone):
            for layer in (g[f"layer_{i}"]["mlp"] for i in range(task.model.num_layers)):
                beyond = [layer["up"]["kernel"][:, width:], layer["down"]["kernel"][width:]]
                assert all((part == 0).all() for part in beyond)
                assert (layer["up"]["kernel"][:, :width] != 0).any(0).all()
        weights = [float(metrics[f"loss_{name}"][1]) for name in mat.names]
        assert [w > 0 for w in weights] == [i == index for i in range(2)]
        np.testing.assert_array_equal(metrics[f"loss_{mat.names[index]}"], metrics["loss"])


def test_joint_training_of_the_small_model_alone_leaves_the_other_units_alone(nested):
    task, batch = nested.language(), nested.batch
    params = nested.init(task)
    mat = MatFormer(task, divisors=(4, 1), loss_weights=(1.0, 0.0))
    found = jax.device_get(gradient(mat, params, batch))
    for i in range(3):
        mlp = found[f"layer_{i}"]["mlp"]
        assert (mlp["gate"]["kernel"][:, 4:] == 0).all() and (mlp["down"]["kernel"][4:] == 0).all()
        assert (mlp["down"]["kernel"][:4] != 0).any()


def test_every_granularity_is_drawn_and_scaled_by_the_cotangent(nested):
    task, batch = nested.language(), nested.batch
    params = nested.init(task)
    mat = MatFormer(task, divisors=(2, 1), training="sampled")

    def loss(p, key):
        return mat.loss(p, batch, key)["loss_1/2"][1]

    draw = lambda p, key: jax.vmap(loss, in_axes=(None, 0))(p, jax.random.split(key, 64))  # noqa: E731
    seen = np.asarray(jax.jit(draw)(params, KEY))
    # 64 fair draws: 32 +- 4 of each; 16 is four deviations away.
    assert 16 < int((seen > 0).sum()) < 48
    once = gradient(mat, params, batch)
    thrice = jax.jit(jax.grad(lambda p: 3.0 * mat.loss(p, batch, KEY)["loss"][0]))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(3.0 * np.asarray(a), b, rtol=1e-6, atol=1e-7), once, thrice
    )


def test_one_granularity_is_a_plain_step_bit_for_bit(case, nested):
    task, batch = case
    stage = Stage("main", steps=3, batch_size=4, optimizer=adamw(constant(1e-2)))
    mesh = make_mesh({}, jax.devices()[:1])

    def three_steps(task):
        params = nested.init(task)
        rule = stage.optimizer.transformation(3, params, "stage")
        options = dict(first_step=0, clip=1.0, ema=0.9)
        step = jax.jit(make_step(task, stage, rule, stage.mask(params), mesh, **options))
        state = jax.jit(lambda params: initial_state(params, rule.init(params), 0, ema=True))(params)
        for _ in range(3):
            state, metrics = step(state, batch)
        return state, metrics["loss"]

    plain = three_steps(task)
    start = nested.init(task)
    assert not np.array_equal(
        plain[0].params["layer_0"]["mlp"]["up"]["kernel"], start["layer_0"]["mlp"]["up"]["kernel"]
    )
    for training in ("joint", "sampled"):
        equal(three_steps(MatFormer(task, divisors=(1,), training=training)), plain)


@pytest.mark.parametrize("widths", ["S", "M", "XL", "S,M,XL", "S,-,16", "-,-,2"])
def test_extraction_gives_the_submodel_as_a_model_of_its_own(nested, widths):
    mat = MatFormer(nested.language())
    params = nested.init(mat)
    spec = parse_widths(widths, mat)
    model, cut = extract(mat.model, params, spec)
    tokens = nested.batch["tokens"]
    fresh = jax.eval_shape(lambda: model.init(KEY, tokens)["params"])
    assert jax.tree.structure(fresh) == jax.tree.structure(cut)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, cut)
    assert build(capture(model)) == model
    if widths in ("S", "M", "XL"):
        # The full module given the narrower arrays multiplies the very same numbers: the same bits.
        np.testing.assert_array_equal(
            call(model, cut, tokens), call(mat.model, mat.variants(params)[widths], tokens)
        )
    if widths == "XL":
        assert model == mat.model
        equal(cut, params)


def test_scanned_trees_nest_like_unrolled_ones(nested):
    params = nested.init(nested.language())
    equal(nest(scan_params(params, 1), 4), scan_params(nest(params, 4), 1))
    task = nested.language(scan_layers=True)
    metrics = measured(MatFormer(task, (8, 1)), scan_params(params, 1), nested.batch, KEY)
    unrolled = measured(MatFormer(nested.language(), (8, 1)), params, nested.batch, KEY)
    for name in ("loss", "loss_1/8", "loss_1/1"):
        np.testing.assert_allclose(metrics[name], unrolled[name], rtol=1e-6)


def test_mix_n_match_grows_one_layer_at_a_time():
    mixes = mix_n_match(3, (2, 4, 8))
    assert mixes == [(2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)]
    assert mix_n_match(2, (5,)) == [(5, 5)]
    mixes = mix_n_match(5, (2, 4, 8, 16))
    assert len(mixes) == 3 * 5 + 1  # (g - 1) L + 1
    assert all(list(mix) == sorted(mix) for mix in mixes)
    assert all(sum(a) < sum(b) for a, b in zip(mixes, mixes[1:], strict=False))


def test_parameter_counts_of_mix_n_match_are_the_closed_form(nested):
    mat = MatFormer(nested.language())
    params = nested.init(mat)
    for widths in mix_n_match(3, (2, 4, 8, 16)):
        spec = ElasticSpec((0, 1, 2), widths)
        cut = jax.eval_shape(lambda params, spec=spec: slice_params(params, spec), params)
        # 3 D m_l a layer, and what is shared: embedding 32 x 8, 3 layers of 4 x 8 x 8 + 2 norms, final norm.
        shared = 32 * 8 + 3 * (4 * 64 + 16) + 8
        assert sum(leaf.size for leaf in jax.tree.leaves(cut)) == shared + sum(3 * 8 * m for m in widths)


@pytest.mark.parametrize(
    ("text", "keep", "widths"),
    [
        ("M", (0, 1, 2), (4, 4, 4)),
        ("4", (0, 1, 2), (4, 4, 4)),
        ("S, M ,XL", (0, 1, 2), (2, 4, 16)),
        ("8,-,16", (0, 2), (8, 16)),
    ],
)
def test_widths_in_words(nested, text, keep, widths):
    assert parse_widths(text, MatFormer(nested.language())) == ElasticSpec(keep, widths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13", "width '13' of layer 0 is not a granularity: S (2), M (4), L (8), XL (16); nearest: 16"),
        ("S,9,S", "width '9' of layer 1 is not a granularity: S (2), M (4), L (8), XL (16); nearest: 8"),
        ("XXL", "width 'XXL' of layer 0 is not a granularity: S (2), M (4), L (8), XL (16); nearest: XL"),
        ("²", "width '²' of layer 0 is not a granularity: S (2), M (4), L (8), XL (16)"),
        ("S,M", "--widths names 2 layers, the model has 3; '-' skips a layer"),
        ("-", "--widths skips every layer"),
    ],
)
def test_wrong_widths_name_the_nearest(nested, text, message):
    with pytest.raises(UserError) as error:
        parse_widths(text, MatFormer(nested.language()))
    assert str(error.value) == message


def test_wrong_settings_are_told(nested):
    task = nested.language()
    for divisors in ((), (1, 2), (4, 2), (2, 2, 1)):
        with pytest.raises(UserError, match="MatFormer.divisors must fall and end with 1"):
            MatFormer(task, divisors)
    with pytest.raises(UserError, match="loss_weights needs 4 values, one per divisor, got 2"):
        MatFormer(task, loss_weights=(1.0, 1.0))
    with pytest.raises(UserError, match="loss_weights weigh the terms of a joint loss"):
        MatFormer(task, training="sampled", loss_weights=(1.0,) * 4)
    with pytest.raises(UserError, match="hidden_dim 16 does not divide by 32"):
        MatFormer(task, (32, 1))


def test_dropout_uses_one_key_for_all_granularities(nested):
    """Two equal granularities see the same dropout: with the same key, the loss is twice one of them."""
    task = nested.language()
    block = task.model.blocks[0].clone(dropout=0.5)
    task = dataclasses.replace(task, model=task.model.clone(blocks=(block,)))
    params = nested.init(task)
    # Units from 8 on do nothing, so that L and XL are the same model.
    for i in range(3):
        mlp = params[f"layer_{i}"]["mlp"]
        mlp["down"] = {"kernel": np.array(mlp["down"]["kernel"])}
        mlp["down"]["kernel"][8:] = 0.0
    metrics = measured(MatFormer(task, divisors=(2, 1)), params, nested.batch, KEY)
    assert mean(metrics["loss_1/2"]) == pytest.approx(mean(metrics["loss_1/1"]), rel=1e-6)
    assert mean(metrics["loss"]) == pytest.approx(2 * mean(metrics["loss_1/1"]), rel=1e-6)
    other = measured(MatFormer(task, divisors=(2, 1)), params, nested.batch, jax.random.key(12))
    assert mean(other["loss"]) != pytest.approx(mean(metrics["loss"]), rel=1e-4)
