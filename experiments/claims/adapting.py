"""What the claims about adapters share: the model that ships, rows of text, a fine-tuning that is one program, and how
results are drawn."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims.harness import Results
from research.adapters.lora import Adapter
from research.adapters.tuning import AdapterTuning
from research.data.text import TokenDataset
from research.language import BASE
from research.training.task import LanguageModelling, add_reported
from research.training.workdir import load_model

PyTree = Any
Batch = dict[str, np.ndarray]

BATCH, LENGTH = 8, 64


@functools.cache
def shipped() -> Any:
    return load_model(BASE)


@functools.cache
def dataset(source: str, split: str, seed: int = 0, length: int = LENGTH) -> TokenDataset:
    return TokenDataset(source, split, length, seed=seed, shuffle=split == "train")


def rows(source: str, split: str, count: int, seed: int = 0) -> Batch:
    """`count` rows of 64 tokens."""
    return next(dataset(source, split, seed).batches(0, count))


def updates(source: str, steps: int, seed: int) -> Batch:
    """The batches of a fine-tuning, stacked: arrays [steps, 8, 64]."""
    batches = dataset(source, "train", seed).batches(0, BATCH)
    return stacked([next(batches) for _ in range(steps)])


def stacked(batches: list[Batch]) -> Batch:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def start(adapter: Adapter, seed: int = 0) -> PyTree:
    """The parameters that a run of `AdapterTuning` on the shipped model begins with."""
    task = AdapterTuning(adapter, "package:language/base")
    task.__dict__["loaded"] = shipped()
    return task.start(jax.random.key(seed))


@functools.partial(jax.jit, static_argnames=("model", "adapter"))
def tune(
    model: Any,
    adapter: Adapter,
    params: PyTree,
    batches: Batch,
    rate: float,
    key: jax.Array,
    rates: PyTree = None,
    until: int = 1 << 30,
) -> tuple[PyTree, jax.Array]:
    """Adam on `params["adapter"]`, an update for each of `batches`; the rate warms for five and falls on half a cosine.

    rates: factors of the rate, a tree like the adapter; 1 where None. until: a stage ends there, and what `rates` has
    below 0 is trained before it only. -> parameters, losses of the text f32[steps].
    """
    steps = len(batches["tokens"])
    task = LanguageModelling(model)
    rule = optax.scale_by_adam(b1=0.9, b2=0.95)
    factors = jax.tree.map(lambda _: 1.0, params["adapter"]) if rates is None else rates

    def one(carry: PyTree, xs: PyTree) -> tuple[PyTree, jax.Array]:
        params, moments = carry
        batch, number = xs

        def loss(trained: PyTree) -> tuple[jax.Array, jax.Array]:
            whole = {**params, "adapter": trained}
            own = jax.random.fold_in(key, number)
            metrics = add_reported(task.loss(adapter.assemble(whole, own), batch, own), adapter.losses(whole))
            text = metrics.get("cross_entropy", metrics["loss"])
            return metrics["loss"][0] / metrics["loss"][1], text[0] / text[1]

        gradient, text = jax.grad(loss, has_aux=True)(params["adapter"])
        clip = jnp.minimum(1.0, 1.0 / optax.tree.norm(gradient))
        update, moments = rule.update(jax.tree.map(lambda g: g * clip, gradient), moments)
        now = rate * jnp.minimum((number + 1) / 5, 1.0) * (0.55 + 0.45 * jnp.cos(jnp.pi * number / steps))

        def move(value: jax.Array, step: jax.Array, factor: float) -> jax.Array:
            factor = jnp.where((factor < 0) & (number >= until), 0.0, jnp.abs(factor))
            return value - now * factor * step

        trained = jax.tree.map(move, params["adapter"], update, factors)
        return (adapter.remember({**params, "adapter": trained}), moments), text

    (params, _), losses = jax.lax.scan(
        one, (params, rule.init(params["adapter"])), (batches, jnp.arange(steps))
    )
    return params, losses


@functools.partial(jax.jit, static_argnames=("model", "adapter"))
def nats(model: Any, adapter: Adapter | None, params: PyTree, batch: Batch) -> jax.Array:
    """Nats a token: of a run's parameters with its adapter, or, with None, of the model's own."""
    tree = params if adapter is None else adapter.assemble(params, None)
    total, weight = LanguageModelling(model).evaluate(tree, batch)["loss"]
    return total / weight


def values(results: Results, arm: str, measure: str) -> np.ndarray:
    """[seeds, ...]."""
    return np.asarray(results[arm][measure], float)


def centre(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds, and half of their range, which is drawn as its error."""
    return data.mean(axis=0), np.ptp(data, axis=0) / 2


@contextlib.contextmanager
def two_panels(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Two panels side by side, in inches together, that are saved at `path` in the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=size, constrained_layout=True)
    yield panels
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
