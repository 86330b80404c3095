"""MorpMamba against its formulas, its parameter counts, and its variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.accounting import count_parameters
from research.nn.reports import apply_reporting
from research.ssm.mamba2 import Mamba2
from research.vision.hyperspectral.morpmamba import MorphologicalTokens, MorpMamba, SelectiveState

SIZES = dict(num_classes=3, width=8, num_heads=2, hidden_dim=6, filter_size=3)
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 5))


def shapes(model, *image):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))["params"]


def filled(model, *image):
    """Parameters of order 1 / sqrt(inputs), without compiling their initialisation."""
    random = np.random.default_rng(0)
    draw = lambda leaf: random.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.shape[0])  # noqa: E731
    return jax.tree.map(draw, shapes(model, *image))


def test_parameters_of_the_released_model_part_by_part():
    params = shapes(MorpMamba(num_classes=15), 4, 4, 15)
    assert count_parameters(params) == 67_013
    counts = {name: count_parameters(part) for name, part in params.items()}
    assert counts.pop("tokens") == 2_934  # 2 * 15 * 25 + 2 * 4 * 25 + (30 * 64 + 64)
    assert counts.pop("state") == 24_832  # 128 * 128 + 128 + 64 * 128 + 128
    assert counts.pop("hidden") == 16_512 and counts.pop("head") == 1_935
    assert {name.rpartition("_")[2] for name in counts} == {"gate", "query", "key", "value"}
    assert len(counts) == 5 and set(counts.values()) == {64 * 64 + 64}  # gates 8,320, attention 12,480
    filters = {name: value.shape for name, value in params["tokens"].items() if name != "projection"}
    assert filters == {
        **dict.fromkeys(("spatial_erosion", "spatial_dilation"), (5, 5, 15)),
        **dict.fromkeys(("spectral_erosion", "spectral_dilation"), (5, 5, 4)),
    }


def box(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x [B, H, W, C], kernel [3, 3, C]: the depthwise convolution, place by place."""
    wide, out = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros_like(x)
    for r, c in np.ndindex(x.shape[1:3]):
        out[:, r, c] = (wide[:, r : r + 3, c : c + 3] * kernel).sum((1, 2))
    return out


def by_the_formulas(p: dict, x: np.ndarray) -> np.ndarray:
    """The released model in numpy, float64."""

    def linear(x, name, params=p):
        return x @ params[name]["kernel"] + params[name]["bias"]

    t, turned = p["tokens"], x.transpose(0, 3, 1, 2)
    spatial = [-box(x, t["spatial_erosion"]), box(x, t["spatial_dilation"])]
    spectral = [-box(turned, t["spectral_erosion"]), box(turned, t["spectral_dilation"])]
    spectral = [y.transpose(0, 2, 3, 1) for y in spectral]
    spatial, spectral = (linear(np.concatenate(pair, -1), "projection", t) for pair in (spatial, spectral))
    middle = spatial[:, 2].copy()  # [B, W, D]
    for name, tokens in (("spatial_gate", spatial), ("spectral_gate", spectral)):
        gate = 1 / (1 + np.exp(-linear(middle, name)))
        for row in range(4):
            tokens[:, row] *= gate[:, row, None]  # that of column `row`
    heads = [
        linear(tokens.reshape(2, 16, 8), name).reshape(2, 16, 2, 4)
        for tokens, name in ((spatial, "query"), (spectral, "key"), (spectral, "value"))
    ]
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", *heads[:2]) / 2)  # sqrt(4)
    mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), heads[2]).reshape(2, 16, 8)
    state = np.zeros((2, 128))
    for token in range(16):
        state = linear(state, "transition", p["state"]) + linear(mixed[:, token], "update", p["state"])
    return linear(np.maximum(linear(state, "hidden"), 0), "head")


def test_the_reference_is_the_released_model():
    model = MorpMamba(**SIZES)
    params = filled(model, 4, 4, 5)
    logits, losses, _ = jax.jit(lambda p, x: apply_reporting(model, {"params": p}, x))(params, X)
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = by_the_formulas(wide, np.asarray(X, np.float64))
    # The state is 16 products deep, with sums of 128 terms.
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(losses["penalty"], 0.01 * np.square(wide["hidden"]["kernel"]).sum(), rtol=1e-5)


def test_box_filters_start_as_sums_and_their_negatives():
    model = MorphologicalTokens(4, "box", 3, True)
    kernel = jnp.zeros((10, 4)).at[0, 0].set(1.0).at[5, 1].set(1.0)  # erosion and dilation of channel 0
    params = shapes(model, 4, 4, 5)
    params = {name: jnp.ones(leaf.shape) for name, leaf in params.items() if name != "projection"}
    params["projection"] = {"kernel": kernel, "bias": jnp.zeros(4)}
    grey = MorphologicalTokens(4, "grey", 3, True)

    @jax.jit
    def run(params, x):
        made, flat = (m.init(jax.random.key(0), x)["params"] for m in (model, grey))
        return made, flat, model.apply({"params": params}, x)

    made, flat, (spatial, spectral) = run(params, X)
    for name in ("spatial_erosion", "spatial_dilation", "spectral_erosion", "spectral_dilation"):
        np.testing.assert_array_equal(made[name], jnp.ones_like(made[name]))
        np.testing.assert_array_equal(flat[name], jnp.zeros_like(flat[name]))
    sums = box(np.asarray(X, np.float64), np.ones((3, 3, 5)))[..., 0]
    over_bands = box(np.asarray(X, np.float64).transpose(0, 3, 1, 2), np.ones((3, 3, 4)))[:, 0]
    for tokens, wanted in ((spatial, sums), (spectral, over_bands)):
        np.testing.assert_array_equal(tokens[..., 0], -tokens[..., 1])
        np.testing.assert_allclose(tokens[..., 1], wanted, rtol=0, atol=1e-5)  # 9 terms of order 1


def test_morphology_and_selective_state_train():
    """Windows need not be square; every parameter gets a gradient; a token in the middle gates all."""
    state = SelectiveState(Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=8))
    model = MorpMamba(**SIZES, morphology="grey", gate="centre", state=state, dropout=0.0)
    x = X[:, :3]
    params = filled(model, 3, 4, 5)
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, x)))))(params)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_variants_and_what_is_refused():
    with pytest.raises(
        UserError, match="lays the 4 columns of the middle row on 3 rows: windows must be square"
    ):
        shapes(MorpMamba(**SIZES), 3, 4, 5)
    with pytest.raises(UserError, match="width=8 is not a multiple of num_heads=3"):
        MorpMamba(num_classes=3, width=8, num_heads=3)
    plain = shapes(MorpMamba(**SIZES, morphology="none"), 4, 4, 5)["tokens"]
    assert list(plain) == ["projection"] and plain["projection"]["kernel"].shape == (5, 8)
    spatial = shapes(MorpMamba(**SIZES, spectral=False), 4, 4, 5)["tokens"]
    assert set(spatial) == {"projection", "spatial_erosion", "spatial_dilation"}
