"""Evaluation: exact means over uneven batches, one compilation for each shape of a variant."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.training.evaluators import Evaluate, Evaluation, means
from research.training.partitioning import make_mesh


class Counting:
    """Measures the records themselves; the variants are slices of one vector, two of them alike."""

    def evaluate(self, params, batch):
        weights = batch["weights"]
        scale = jnp.sum(params["w"])
        return {"loss": (jnp.sum(weights * batch["x"]) * scale, jnp.sum(weights))}

    def variants(self, params):
        return {"small": {"w": params["w"][:1]}, "big": params, "other": {"w": params["w"][1:2]}}


class Numbers:
    """Record i is the number i with weight 1 + i mod 3."""

    def __init__(self, size: int, weight: float = 1.0):
        self.size, self.weight = size, weight

    def __len__(self):
        return self.size

    def element_spec(self):
        return {name: jax.ShapeDtypeStruct((), np.float32) for name in ("x", "weights")}

    def batches(self, start, batch_size, *, rows=None, epochs=None):
        assert (start, epochs) == (0, 1)
        for first in range(0, self.size, batch_size):
            numbers = np.arange(first, first + batch_size)
            real = numbers < self.size
            yield {
                "x": np.where(real, numbers, 1e9).astype(np.float32),
                "weights": np.where(real, (1 + numbers % 3) * self.weight, 0).astype(np.float32),
            }


PARAMS = {"w": jnp.asarray([1.0, 2.0])}


def evaluation():
    return Evaluation(Counting(), make_mesh({}, jax.devices()[:1]))


def test_means_are_exact_over_a_padded_pass():
    result = evaluation().run(Evaluate("numbers", Numbers(7), batch_size=4), PARAMS)
    # sum i (1 + i mod 3) for i < 7: 0 + 2 + 6 + 3 + 8 + 15 + 6 = 40; weights 1+2+3+1+2+3+1 = 13.
    assert list(result) == ["small", "big", "other"]
    assert [result[name]["loss"] for name in result] == [40 / 13, 3 * 40 / 13, 2 * 40 / 13]
    assert [result[name]["parameters"] for name in result] == [1, 2, 1]


def test_batches_limits_the_pass():
    result = evaluation().run(Evaluate("numbers", Numbers(7), batch_size=2, batches=2), PARAMS)
    # The first four: 0 + 2 + 6 + 3 = 11 over 1 + 2 + 3 + 1 = 7.
    assert result["small"]["loss"] == 11 / 7


def test_each_shape_is_compiled_once(caplog):
    runner, evaluator = evaluation(), Evaluate("numbers", Numbers(7), batch_size=4)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        runner.run(evaluator, PARAMS)
        runner.run(evaluator, PARAMS)
    compiled = [
        r.getMessage()
        for r in caplog.records
        if "Finished XLA compilation of jit(evaluate)" in r.getMessage()
    ]
    assert len(compiled) == 2  # small and other are one shape, big another


def test_a_pass_without_weight_is_an_error():
    with pytest.raises(UserError, match="evaluator 'numbers': the loss has no weight"):
        evaluation().run(Evaluate("numbers", Numbers(4, weight=0.0), batch_size=4), PARAMS)
    with pytest.raises(UserError, match="evaluator 'numbers': its data has no records"):
        evaluation().run(Evaluate("numbers", Numbers(0), batch_size=4), PARAMS)


def test_schedule():
    evaluator = Evaluate("numbers", Numbers(4), every=3)
    assert [step for step in range(9) if evaluator.due(step, 8)] == [3, 6, 8]
    assert [step for step in range(9) if Evaluate("numbers", Numbers(4)).due(step, 8)] == [8]


class Vectors(Counting):
    """Beside the loss, a vector: its sum over the records, and twice that."""

    def evaluate(self, params, batch):
        total = jnp.sum(batch["weights"] * batch["x"])
        return super().evaluate(params, batch) | {
            "load": (jnp.stack([total, 2 * total]), jnp.sum(batch["weights"]))
        }

    def variants(self, params):
        return {"": params}


def test_vectors_are_averaged_entry_by_entry():
    result = Evaluation(Vectors(), make_mesh({}, jax.devices()[:1])).run(
        Evaluate("numbers", Numbers(7), batch_size=4), PARAMS
    )
    assert result[""]["load"] == pytest.approx([40 / 13, 80 / 13], rel=1e-6)  # sums as above


def test_the_first_layer_with_nan_is_named():
    pair = (np.float32(3), np.float32(12))
    totals = {
        "loss": (np.float32(1), np.float32(1)),
        "layer_10/mlp/router_non_finite": pair,
        "layer_2/mlp/router_non_finite": pair,
        "layer_1/mlp/router_non_finite": (np.float32(0), np.float32(12)),
    }
    with pytest.raises(UserError, match="here: 3 of the 12 router logits of layer_2/mlp are NaN or infinite"):
        means(totals, "here")
