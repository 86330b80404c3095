"""One step: gradients are those of the sum of sums over the sum of weights, however the batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.training.optimizers import constant, sgd
from research.training.partitioning import make_mesh
from research.training.stages import Stage, merge, split
from research.training.state import initial_state
from research.training.step import make_step, objective_gradient


class Products:
    """loss: sum of weight * w . x, over the weights. `second`: sum of (w . x), over the records."""

    def loss(self, params, batch, key):
        product = batch["x"] @ params["w"]
        return {
            "loss": (jnp.sum(batch["weights"] * product), jnp.sum(batch["weights"])),
            "second": (jnp.sum(product), jnp.float32(product.shape[0])),
        }


# x of 4 records and uneven weights; all integers, so that every sum below is exact.
BATCH = {
    "x": jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]),
    "weights": jnp.asarray([1.0, 0.0, 2.0, 5.0]),
}
PARAMS = {"w": jnp.asarray([1.0, -1.0]), "frozen": jnp.asarray([3.0])}


def stage(**fields):
    return Stage("main", steps=1, batch_size=4, optimizer=sgd(constant(1.0)), frozen=("frozen",), **fields)


def gradient(**fields):
    made = stage(**fields)
    trainable, frozen = split(PARAMS, made.mask(PARAMS))
    mesh = make_mesh({}, jax.devices()[:1])
    return jax.jit(
        lambda: objective_gradient(Products(), made, trainable, frozen, BATCH, jax.random.key(0), mesh)
    )()


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_gradient_is_exact_for_uneven_weights(accumulate):
    result, metrics = gradient(accumulate=accumulate)
    # sum of weight * x = 1*[1,2] + 2*[5,6] + 5*[7,8] = [46, 54]; sum of weights = 8.
    assert result["w"].tolist() == [46 / 8, 54 / 8]
    assert result["frozen"] is None
    # w . x = -1 for every record: sums -8 over 8, and -4 over 4.
    assert jax.tree.map(float, metrics) == {"loss": (-8.0, 8.0), "second": (-4.0, 4.0)}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_each_term_of_the_objective_has_its_own_denominator(accumulate):
    result, _ = gradient(accumulate=accumulate, loss_weights={"loss": 1.0, "second": 0.5})
    # [46, 54] / 8 + 0.5 * [16, 20] / 4 = [5.75 + 2, 6.75 + 2.5]; 8 / 4 = 2 is exact in floating point.
    assert result["w"].tolist() == [7.75, 9.25]


def make(clip=None, **fields):
    made = stage(**fields)
    mask = made.mask(PARAMS)
    rule = made.optimizer.transformation(1, split(PARAMS, mask)[0], "stage")
    state = initial_state(PARAMS, rule.init(split(PARAMS, mask)[0]), 0, ema=False)
    mesh = make_mesh({}, jax.devices()[:1])
    return jax.jit(make_step(Products(), made, rule, mask, mesh, first_step=0, clip=clip, ema=None)), state


def test_step_updates_and_reports():
    step, state = make(loss_weights={"loss": 1.0, "second": 0.5})
    after, metrics = step(state, BATCH)
    # Rate 1: w - gradient = [1 - 7.75, -1 - 9.25].
    assert after.params["w"].tolist() == [-6.75, -10.25]
    assert after.params["frozen"].tolist() == [3.0]
    assert int(after.step) == 1 and after.key.tolist() == state.key.tolist()
    values = {name: float(total) / float(weight) for name, (total, weight) in metrics.items()}
    assert values["objective"] == -1.0 + 0.5 * -1.0
    assert values["learning_rate"] == 1.0
    assert values["gradient_norm"] == pytest.approx((7.75**2 + 9.25**2) ** 0.5, rel=1e-6)


def test_clip_scales_to_the_norm_and_leaves_smaller_gradients_alone():
    # The gradient [5.75, 6.75] has norm 8.867.
    norm = (5.75**2 + 6.75**2) ** 0.5
    after, _ = make(clip=1.0)[0](make()[1], BATCH)
    np.testing.assert_allclose(after.params["w"], [1 - 5.75 / norm, -1 - 6.75 / norm], rtol=1e-6)
    after, _ = make(clip=9.0)[0](make()[1], BATCH)
    assert after.params["w"].tolist() == [1 - 5.75, -1 - 6.75]


def test_integer_leaves_are_never_trained():
    params = {"codes": jnp.arange(4, dtype=jnp.int8), "w": jnp.ones(2)}
    made = Stage("main", steps=1, batch_size=4, optimizer=sgd(constant(1.0)))
    assert made.mask(params) == {"codes": False, "w": True}
    trainable, frozen = split(params, made.mask(params))
    assert optax.tree.size(trainable) == 2
    assert merge(trainable, frozen) == params


def test_microbatches_draw_different_keys():
    class Noise:
        def loss(self, params, batch, key):
            noise = jax.random.normal(key)
            zero = jnp.sum(params["w"]) * 0.0
            return {"loss": (zero + noise, jnp.float32(1)), "square": (noise**2, jnp.float32(1))}

    made = stage(accumulate=2)
    trainable, frozen = split(PARAMS, made.mask(PARAMS))
    mesh = make_mesh({}, jax.devices()[:1])
    key = jax.random.key(1)
    _, metrics = objective_gradient(Noise(), made, trainable, frozen, BATCH, key, mesh)
    a, b = (float(jax.random.normal(jax.random.fold_in(key, i))) for i in range(2))
    assert float(metrics["loss"][0]) == pytest.approx(a + b, rel=1e-6)
    assert float(metrics["square"][0]) == pytest.approx(a * a + b * b, rel=1e-6)
