"""Accuracies of a scene by hand, and through the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from research.config import build, of
from research.data.scene_patches import BlockSplit, ScenePatches
from research.data.scenes import GeneratedScene
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.vision.hyperspectral.baselines import PatchCNN, PixelMLP
from research.vision.hyperspectral.evaluation import EvaluateScene, SceneClassification, agreement


def test_agreement_by_hand():
    # 10 pixels of class 0, 8 called right; 30 of class 1, 27 right; none of class 2, which 1 pixel is called.
    found = agreement(np.array([[8, 2, 0], [2, 27, 1], [0, 0, 0]]))
    assert found["average_accuracy"] == pytest.approx((0.8 + 0.9) / 2)
    # Called: 10, 29, 1 of 40. Chance: 10/40 * 10/40 + 30/40 * 29/40 = 970/1600; accuracy 35/40 = 1400/1600.
    assert found["kappa"] == pytest.approx((1400 - 970) / (1600 - 970))
    assert agreement(np.array([[5, 0], [0, 0]])) == {"average_accuracy": 1.0}


def test_trainer_measures_and_draws(tmp_path):
    windows = dict(
        scene=of(GeneratedScene, height=30, width=30, bands=8, endmembers=3, classes=3, cells=20),
        split=of(BlockSplit, block=6, validation=0.0),
        num_classes=3,
        size=3,
        components=4,
    )
    test = of(ScenePatches, part="test", shuffle=False, **windows)
    trainer = build(
        of(
            Trainer,
            task=of(
                SceneClassification,
                model=of(PixelMLP, num_classes=3, hidden_dims=(4,)),
                image_shape=(3, 3, 4),
            ),
            data=of(ScenePatches, **windows),
            stages=(
                of(
                    Stage,
                    name="s",
                    steps=2,
                    batch_size=8,
                    optimizer=of(adamw, schedule=of(constant, peak=0.1)),
                ),
            ),
            evaluators=(of(EvaluateScene, name="test", data=test, batch_size=64),),
        )
    )
    state, metrics = trainer.train(progress=False, devices=jax.devices()[:1])
    (evaluator,) = trainer.evaluators
    data = evaluator.data
    called = np.asarray(
        trainer.task.model.apply({"params": state.params}, data.take(np.arange(len(data)))["images"])
    ).argmax(-1)
    labels = data.take(np.arange(len(data)))["labels"]
    assert metrics["test/accuracy"] == pytest.approx(np.mean(called == labels))
    assert metrics["test/kappa"] == pytest.approx(cohen_kappa_score(labels, called))
    recalls = [np.mean(called[labels == c] == c) for c in range(3)]
    assert metrics["test/average_accuracy"] == pytest.approx(np.mean(recalls))
    (path,) = evaluator.draw(trainer.task.model, state.params, tmp_path)
    assert path.name == "test_map.png" and path.stat().st_size > 1000


def test_convolution_by_hand():
    # One channel, one 3 x 3 filter of ones into one unit: sums of neighbours.
    params = {
        "convolution_0": {"kernel": jnp.ones((9, 1)), "bias": jnp.zeros(1)},
        "hidden": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "head": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
    }
    image = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    out = PatchCNN(num_classes=4, widths=(1,), hidden_dim=4).apply({"params": params}, image)
    np.testing.assert_array_equal(out, [[10.0] * 4])  # every place sees all four
