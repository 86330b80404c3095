"""How well a scene is classified: overall accuracy, average accuracy, Cohen's kappa, and the map itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data.scene_patches import ScenePatches
from research.training.evaluators import Evaluate
from research.training.task import Batch, Classification, Metrics, classification_metrics

PyTree = Any


@dataclass(frozen=True)
class SceneClassification(Classification):
    """Classification whose evaluation also has `confusion`, a vector [classes * classes]: the share of pixels of
    class i that are called j, at i * classes + j. `accuracy` is the overall accuracy."""

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        logits, _, measured = self._logits(params, batch, None)
        classes, weights = logits.shape[-1], batch["weights"]
        truth = jax.nn.one_hot(batch["labels"], classes) * weights[:, None]
        called = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
        confusion = jnp.einsum("ni,nj->ij", truth, called).reshape(-1)
        metrics = classification_metrics(logits, batch) | {"confusion": (confusion, jnp.sum(weights))}
        return metrics | measured


def agreement(confusion: np.ndarray) -> dict[str, float]:
    """confusion [classes, classes], rows are the truth -> `average_accuracy`, the mean over the classes that occur of
    the share of their pixels called right, and `kappa`, (p - e) / (1 - e) of the accuracy p and that of chance e.

    There is no kappa where chance is always right: with one class.
    """
    shares = np.asarray(confusion, np.float64) / np.sum(confusion)
    truth, called, right = shares.sum(axis=1), shares.sum(axis=0), np.diag(shares)
    there = truth > 0
    found = {"average_accuracy": float(np.mean(right[there] / truth[there]))}
    chance = float(truth @ called)
    if chance < 1.0:
        found["kappa"] = (float(right.sum()) - chance) / (1.0 - chance)
    return found


@dataclass(frozen=True)
class EvaluateScene(Evaluate):
    """`Evaluate` of a `SceneClassification` over `ScenePatches`, with `average_accuracy`, `kappa` and a map."""

    data: ScenePatches

    def derive(self, means: dict[str, Any]) -> dict[str, float]:
        classes = self.data.num_classes
        return agreement(np.reshape(means["confusion"], (classes, classes)))

    def draw(self, model: Any, params: PyTree, folder: Path) -> list[Path]:
        """Writes `<name>_map.png` into `folder`: the truth, what the model says, and where it is wrong."""
        path = folder / f"{self.name}_map.png"
        draw_map(self.data, predict(model, params, self.data, self.batch_size), path)
        return [path]


def predict(model: Any, params: PyTree, data: ScenePatches, batch_size: int) -> np.ndarray:
    """int[H, W]: the class, from 1 on, of every pixel of the scene."""
    whole = ScenePatches(
        data.scene, data.split, data.num_classes, "all", data.size, data.components, shuffle=False
    )
    call = jax.jit(lambda params, images: jnp.argmax(model.apply({"params": params}, images), axis=-1))
    called = [call(params, batch["images"]) for batch in whole.batches(0, batch_size, epochs=1)]
    return np.concatenate(called)[: len(whole)].reshape(whole.prepared.parts.shape) + 1


def draw_map(data: ScenePatches, predicted: np.ndarray, path: Path) -> None:
    """The truth and the prediction int[H, W] of a scene side by side, and which pixels of the part are wrong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scene, parts = data.prepared.scene, data.prepared.parts
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    colours = class_colours(scene.num_classes)
    for panel, labels, title in zip(panels, (scene.labels, predicted), ("truth", "predicted"), strict=False):
        panel.imshow(colours[labels], interpolation="nearest")
        panel.set_title(title)
    # 0 elsewhere, 1 trained on, 2 measured and right, 3 measured and wrong.
    measured = data.chosen & (scene.labels > 0)
    state = np.where(parts == 1, 1, 0)
    state[measured] = np.where(predicted == scene.labels, 2, 3)[measured]
    shades = np.array([[1, 1, 1], [0.65, 0.65, 0.65], [0.75, 0.88, 0.98], [0.8, 0.1, 0.1]])
    panels[2].imshow(shades[state], interpolation="nearest")
    wrong = float(np.mean(state[measured] == 3))
    panels[2].set_title(f"{data.part}: {wrong:.1%} wrong (red); grey: trained on", fontsize="medium")
    for panel in panels:
        panel.set(xticks=[], yticks=[])
    figure.suptitle(scene.name)
    figure.savefig(path)


def class_colours(classes: int) -> np.ndarray:
    """f64[classes + 1, 3]: white for 0, then a colour for every class."""
    from matplotlib import colormaps

    if classes > 20:
        colours = colormaps["gist_ncar"](np.linspace(0.05, 0.95, classes))[:, :3]
    else:
        colours = colormaps["tab10" if classes <= 10 else "tab20"].colors[:classes]
    return np.array([(1.0, 1.0, 1.0), *colours])
