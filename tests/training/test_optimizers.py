"""Schedules at their corners, decay on matrices only, rates by pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.training.optimizers import adamw, constant, cosine, linear, lion, muon, sgd, wsd

PARAMS = {
    "embedding": {"table": jnp.full((6, 4), 0.5)},
    "layers": {
        "mlp": {"up": {"kernel": jnp.full((2, 4, 8), 0.5)}},
        "mlp_norm": {"scale": jnp.full((2, 4), 0.5)},
    },
    "head": {"kernel": jnp.full((4, 6), 0.5), "bias": jnp.full((6,), 0.5)},
    "class_token": jnp.full((1, 1, 4), 0.5),
}


def values(schedule, steps):
    rate = schedule.over(steps)
    return [float(rate(i)) for i in range(steps)]


def test_schedules():
    # Warm-up over 4: 1/4, 2/4, 3/4, 4/4 of the peak, then the rest.
    np.testing.assert_allclose(values(constant(8.0, warmup=4), 6), [2, 4, 6, 8, 8, 8], rtol=1e-6)
    np.testing.assert_allclose(values(linear(8.0), 4), [8, 6, 4, 2], rtol=1e-6)
    np.testing.assert_allclose(values(linear(8.0, warmup=1, floor=0.5), 5), [8, 8, 7, 6, 5], rtol=1e-6)
    # Half a cosine over 4: (1 + cos(0, 45, 90, 135 degrees)) / 2.
    half = np.sqrt(0.5)
    np.testing.assert_allclose(values(cosine(8.0), 4), [8, 4 * (1 + half), 4, 4 * (1 - half)], rtol=1e-5)
    # Decay over 0.4 of 5 steps = 2: stable for 3, then 8, 4 on the way to 0 after the end.
    np.testing.assert_allclose(values(wsd(8.0, decay=0.4), 5), [8, 8, 8, 8, 4], rtol=1e-6)


def test_schedule_mistakes():
    line = "10 warm-up steps do not fit in a stage of 10 steps: change the stage's steps or its optimizer.schedule"
    with pytest.raises(UserError, match=line):
        cosine(1.0, warmup=10).over(10)
    with pytest.raises(UserError, match="wsd.decay: 1.5 is not a fraction"):
        wsd(1.0, decay=1.5)


def updated(optimizer):
    rule = optimizer.transformation(10, PARAMS, "stage 'x'")
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(rule.update)(zeros, rule.init(PARAMS), PARAMS)
    return updates


@pytest.mark.parametrize("make", [adamw, lion])
def test_decay_acts_on_matrices_only(make):
    updates = updated(make(constant(0.1), weight_decay=0.5))
    # The gradient is 0, so the update is -rate * decay * parameter = -0.1 * 0.5 * 0.5.
    for matrix in (
        updates["embedding"]["table"],
        updates["head"]["kernel"],
        updates["layers"]["mlp"]["up"]["kernel"],
    ):
        np.testing.assert_allclose(matrix, -0.025, rtol=1e-6)
    for vector in (updates["head"]["bias"], updates["layers"]["mlp_norm"]["scale"], updates["class_token"]):
        assert not np.any(vector)


def test_rates_scale_updates_and_must_match():
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    optimizer = sgd(constant(0.5), rates=(("head/bias", 4.0), ("head", 0.5)))
    rule = optimizer.transformation(10, PARAMS, "stage 'x'")
    updates, _ = rule.update(gradient, rule.init(PARAMS), PARAMS)
    assert np.all(updates["head"]["bias"] == -2.0)
    assert np.all(updates["head"]["kernel"] == -0.25)
    assert np.all(updates["embedding"]["table"] == -0.5)
    with pytest.raises(
        UserError, match=r"stage 'x'.optimizer.rates: 'haed' matches none .* did you mean 'head'"
    ):
        sgd(constant(0.5), rates=(("haed", 2.0),)).transformation(10, PARAMS, "stage 'x'")


def test_muon_orthogonalises_each_hidden_matrix_and_leaves_the_rest_to_adam():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    gradient = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), PARAMS)
    optimizer = muon(constant(1.0), weight_decay=0.0)
    rule = optimizer.transformation(10, PARAMS, "stage 'x'")
    updates, _ = jax.jit(rule.update)(gradient, rule.init(PARAMS), PARAMS)
    # 0.2 * sqrt(max(4, 8)) times a matrix whose 4 singular values are near 1 (Newton-Schulz: 0.7 to 1.2), for
    # each of the two layers by itself.
    for layer in updates["layers"]["mlp"]["up"]["kernel"]:
        singular = np.linalg.svd(np.asarray(layer), compute_uv=False) / (0.2 * np.sqrt(8))
        assert np.all((singular > 0.6) & (singular < 1.3)), singular
    # Adam's first update is the sign of the gradient (with Nesterov: larger, but the same for all elements).
    for path in (("embedding", "table"), ("head", "kernel"), ("head", "bias")):
        update, slope = updates[path[0]][path[1]], gradient[path[0]][path[1]]
        assert np.array_equal(np.sign(update), -np.sign(slope))
        np.testing.assert_allclose(np.abs(update), np.abs(update).flat[0], rtol=1e-3)
