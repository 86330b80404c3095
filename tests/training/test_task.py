"""Tasks: losses and metrics computed by hand."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nn.reports import report_loss, report_measurement
from research.training.task import (
    _LARGE,
    Classification,
    LanguageModelling,
    Task,
    add_reported,
    cast_floats,
    cross_entropy,
)

LN2 = math.log(2)


class Fixed(nn.Module):
    """Logits [log 1, log 3] for every token; records the dtype that its parameter arrives in."""

    dtypes: tuple = ()

    @nn.compact
    def __call__(self, tokens, positions=None, segments=None):
        logits = self.param("logits", lambda key: jnp.log(jnp.asarray([1.0, 3.0])))
        if jax.tree.leaves(self.dtypes):
            assert logits.dtype == self.dtypes[0]
        return jnp.broadcast_to(logits.astype(jnp.float32), (*tokens.shape, 2))


def batch():
    # Two rows of two tokens; p(0) = 1/4 and p(1) = 3/4 everywhere.
    return {
        "tokens": jnp.zeros((2, 2), jnp.int32),
        "targets": jnp.asarray([[0, 1], [1, 0]]),
        "positions": jnp.asarray([[0, 1], [0, 1]]),
        "segments": jnp.ones((2, 2), jnp.int32),
        "target_bytes": jnp.asarray([[3, 5], [7, 0]]),
        "weights": jnp.asarray([[1.0, 1.0], [0.0, 1.0]]),
    }


def test_language_metrics():
    task = LanguageModelling(Fixed())
    assert isinstance(task, Task)
    params = task.init(jax.random.key(0))
    metrics = task.evaluate(params, batch())
    # Weighted targets 0, 1, 0: nats ln 4 + ln 4/3 + ln 4 over 3 tokens, one of them right; bytes 3 + 5 + 0
    # (the 7 bytes are behind a target of weight 0).
    nats = 2 * math.log(4) + math.log(4 / 3)
    np.testing.assert_allclose(metrics["loss"], (nats, 3), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (1, 3), rtol=0)
    np.testing.assert_allclose(metrics["bits_per_byte"], (nats / LN2, 8), rtol=1e-6)
    assert all(x.dtype == jnp.float32 for pair in metrics.values() for x in pair)
    loss = task.loss(params, batch(), jax.random.key(0))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loss, metrics))


def test_z_loss_is_added_in_training_only():
    task = LanguageModelling(Fixed(), z_loss=0.1)
    params = task.init(jax.random.key(0))
    metrics = task.loss(params, batch(), jax.random.key(0))
    # logsumexp = ln (1 + 3) at each of three weighted tokens.
    nats = 2 * math.log(4) + math.log(4 / 3)
    np.testing.assert_allclose(metrics["loss"][0], nats + 0.1 * 3 * math.log(4) ** 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy"][0], nats, rtol=1e-6)
    np.testing.assert_allclose(task.evaluate(params, batch())["loss"][0], nats, rtol=1e-6)


def test_bfloat16_compute_keeps_float32_gradients_and_losses():
    task = LanguageModelling(Fixed(dtypes=(jnp.bfloat16,)), compute_dtype="bfloat16")
    params = {"logits": jnp.log(jnp.asarray([1.0, 3.0]))}

    def loss(params):
        total, weight = task.loss(params, batch(), jax.random.key(0))["loss"]
        return total / weight

    value, gradient = jax.value_and_grad(loss)(params)
    assert value.dtype == gradient["logits"].dtype == jnp.float32
    # ln 3 = 1.098612 is 1.1015625 in bfloat16 (8 bits of mantissa: steps of 2**-7 between 1 and 2).
    lse = math.log(1 + math.exp(1.1015625))
    np.testing.assert_allclose(value, (3 * lse - 1.1015625) / 3, rtol=1e-6)
    codes = {"codes": jnp.arange(3, dtype=jnp.int8), "scale": jnp.ones(1)}
    cast = cast_floats(codes, "bfloat16")
    assert (cast["codes"].dtype, cast["scale"].dtype) == (jnp.int8, jnp.bfloat16)


class FixedImages(nn.Module):
    @nn.compact
    def __call__(self, images):
        logits = self.param("logits", lambda key: jnp.log(jnp.asarray([1.0, 3.0])))
        return jnp.broadcast_to(logits, (images.shape[0], 2)) + 0.0 * jnp.sum(images)


def test_classification_metrics_and_smoothing():
    images = {
        "images": jnp.zeros((3, 2, 2, 1)),
        "labels": jnp.asarray([1, 0, 1]),
        "weights": jnp.asarray([1.0, 1.0, 0.0]),
    }
    task = Classification(FixedImages(), image_shape=(2, 2, 1), label_smoothing=0.2)
    params = task.init(jax.random.key(0))
    plain = math.log(4 / 3) + math.log(4)
    metrics = task.evaluate(params, images)
    np.testing.assert_allclose(metrics["loss"], (plain, 2), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (1, 2), rtol=0)
    # Smoothed: 0.8 of the nats plus 0.2 of the mean nats over both classes, for two images.
    smooth = 0.8 * plain + 0.2 * 2 * (math.log(4 / 3) + math.log(4)) / 2
    metrics = task.loss(params, images, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], (smooth, 2), rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy"], (plain, 2), rtol=1e-6)


def test_unknown_compute_dtype():
    with pytest.raises(UserError, match="compute_dtype: 'bfloat' is not one of .* did you mean bfloat16?"):
        LanguageModelling(Fixed(), compute_dtype="bfloat")


class Dropped(nn.Module):
    """Logits that dropout zeroes where it draws so."""

    @nn.compact
    def __call__(self, tokens, positions=None, segments=None):
        logits = self.param("logits", lambda key: jnp.log(jnp.asarray([1.0, 3.0])))
        dropout = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))
        return dropout(jnp.broadcast_to(logits, (*tokens.shape, 2)))


def test_dropout_is_active_in_training_only_and_follows_the_key():
    task = LanguageModelling(Dropped())
    params = task.init(jax.random.key(0))
    plain = LanguageModelling(Fixed())
    assert float(task.evaluate(params, batch())["loss"][0]) == float(
        plain.evaluate(params, batch())["loss"][0]
    )
    losses = [float(task.loss(params, batch(), jax.random.key(i))["loss"][0]) for i in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


class Reporting(nn.Module):
    """`Fixed`, with two loss terms and a measurement."""

    @nn.compact
    def __call__(self, tokens, positions=None, segments=None):
        report_loss(self, "balance", jnp.float32(0.5))
        report_loss(self, "router_z", jnp.float32(0.25))
        report_measurement(self, "load", jnp.asarray([1.0, 3.0]), jnp.float32(4.0))
        return Fixed(name="fixed")(tokens)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_losses_of_layers_join_in_training_only_and_measurements_always(z_loss):
    task, plain = LanguageModelling(Reporting(), z_loss=z_loss), LanguageModelling(Fixed(), z_loss=z_loss)
    params = task.init(jax.random.key(0))
    own, _ = plain.loss(params["fixed"], batch(), jax.random.key(0))["loss"]
    nats = plain.evaluate(params["fixed"], batch())["loss"][0]
    loss = task.loss(params, batch(), jax.random.key(0))
    # Three weighted targets: the sum grows by 3 (0.5 + 0.25), so the mean by 0.75.
    np.testing.assert_allclose(loss["loss"], (own + 2.25, 3), rtol=1e-6)
    np.testing.assert_allclose(loss["cross_entropy"], (nats, 3), rtol=1e-6)
    np.testing.assert_allclose(loss["balance"], (1.5, 3), rtol=1e-6)
    evaluation = task.evaluate(params, batch())
    np.testing.assert_allclose(evaluation["loss"], (nats, 3), rtol=1e-6)
    assert "balance" not in evaluation
    for metrics in (loss, evaluation):
        np.testing.assert_array_equal(metrics["load"][0], [1.0, 3.0])


def test_a_layer_may_not_take_the_name_of_a_metric():
    with pytest.raises(UserError, match="reports a loss 'accuracy'"):
        add_reported({"loss": (1.0, 1.0), "accuracy": (1.0, 1.0)}, {"accuracy": jnp.float32(1)})


def test_routers_stay_in_float32():
    params = {"mlp": {"router": {"kernel": jnp.ones(1)}, "experts": {"up": {"kernel": jnp.ones(1)}}}}
    cast = cast_floats(params, "bfloat16")["mlp"]
    assert cast["router"]["kernel"].dtype == jnp.float32
    assert cast["experts"]["up"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_kernel_for_a_cpu_computes_a_large_cross_entropy(dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(_LARGE // 128, 128)), dtype)
    labels = jnp.asarray(rng.integers(0, 128, len(logits)))

    def make():
        def loss(logits):
            nats, partition, correct = cross_entropy(logits, labels[: len(logits)])
            return jnp.sum(nats) + 0.1 * jnp.sum(jnp.square(partition)), jnp.sum(correct)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    assert "lathe_cross_entropy_backward" in make().lower(logits).as_text()
    assert "lathe" not in make().lower(logits[1:]).as_text()
    (value, right), gradient = make()(logits)
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    assert "lathe" not in make().lower(logits).as_text()
    (plain_value, plain_right), plain_gradient = make()(logits)
    assert right == plain_right and value.dtype == jnp.float32 and gradient.dtype == dtype
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    # Of numbers up to 2; bfloat16 keeps eight bits of them, and may round two neighbours differently.
    close = 1e-6 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(gradient.astype("f"), plain_gradient.astype("f"), rtol=close, atol=1e-6)
