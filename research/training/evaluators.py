"""Evaluation on a schedule: every variant of the model over a dataset."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from research.errors import UserError
from research.nn.accounting import count_active_parameters, count_parameters
from research.training.feed import Dataset, batch_spec, check_batch_size, feed
from research.training.task import Metrics, Task

PyTree = Any

NON_FINITE = "_non_finite"


@dataclass(frozen=True)
class Evaluate:
    """Measure all of the task's variants on one pass over `data`.

    every: steps between evaluations; `None` is after the last step only, where it always happens.
    batches: how many batches to read at most, `None` for the whole pass.
    """

    name: str
    data: Dataset
    batch_size: int = 32
    every: int | None = None
    batches: int | None = None

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after `step` of `last` steps."""
        return step == last or (self.every is not None and step > 0 and step % self.every == 0)

    def derive(self, means: dict[str, Any]) -> dict[str, float]:
        """What else follows from the means of a variant; kinds of evaluators whose numbers are no means have some.

        A kind with a figure of its own also has `draw(model, params, folder) -> [path]`, called after a run.
        """
        return {}

    def __post_init__(self):
        for name in ("batch_size", "every", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"evaluator {self.name!r}: {name} is {value}; it must be at least 1")


class Evaluation:
    """Runs evaluators; each shape of a variant is compiled once, whatever its name."""

    def __init__(self, task: Task, mesh: jax.sharding.Mesh):
        self._task, self._mesh = task, mesh
        self._evaluate = jax.jit(task.evaluate)
        self._extract: dict[str, Any] = {}

    def check(self, evaluator: Evaluate) -> None:
        """Raise `UserError` if the evaluator cannot run on this mesh."""
        check_batch_size(f"evaluator {evaluator.name!r}", evaluator.batch_size, self._mesh)

    def variants(self, params: PyTree) -> list[str]:
        """The names of the variants, in the task's order."""
        # eval_shape sorts the keys of a dict; the order in which the task made them is noted on the way.
        names: list[str] = []

        def note(params: PyTree) -> PyTree:
            made = self._task.variants(params)
            names.extend(made)
            return made

        jax.eval_shape(note, params)
        return names

    def run(self, evaluator: Evaluate, params: PyTree) -> dict[str, dict[str, float]]:
        """{variant: {metric: mean or list of means, "parameters": count, "seconds": wall time}}, and
        `active_parameters` where a token meets fewer than all.

        Sums and weights of the batches are added in float64. Raises `UserError` if a metric has weight 0.
        """
        results = {}
        with jax.set_mesh(self._mesh):
            for name in self.variants(params):
                start = time.perf_counter()
                if name not in self._extract:
                    self._extract[name] = jax.jit(lambda p, name=name: self._task.variants(p)[name])
                variant = self._extract[name](params)
                totals = self._totals(evaluator, variant)
                results[name] = means(totals, f"evaluator {evaluator.name!r}")
                results[name] |= evaluator.derive(results[name])
                results[name]["parameters"] = count_parameters(variant)
                active = count_active_parameters(getattr(self._task, "model", None), variant)
                if active < results[name]["parameters"]:
                    results[name]["active_parameters"] = active
                results[name]["seconds"] = round(time.perf_counter() - start, 3)
        return results

    def _totals(self, evaluator: Evaluate, variant: PyTree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{metric: (sum, weight)} over the pass, float64."""
        spec = batch_spec(evaluator.data, evaluator.batch_size)
        batches = feed(evaluator.data, 0, evaluator.batch_size, self._mesh, spec, epochs=1)
        measured: list[Metrics] = []
        for count, batch in enumerate(batches, 1):
            measured.append(self._evaluate(variant, batch))
            if count > 1:
                # One batch ahead of the device is enough; more would pile up batches in its memory.
                jax.block_until_ready(measured[-2])
            if count == evaluator.batches:
                break
        if not measured:
            raise UserError(f"evaluator {evaluator.name!r}: its data has no records")
        return {
            name: tuple(
                np.sum([np.asarray(batch[name][part], np.float64) for batch in measured], axis=0)
                for part in (0, 1)
            )
            for name in measured[0]
        }


def means(totals: Mapping[str, Any], where: str) -> dict[str, float | list[float]]:
    """{metric: sum / weight} of {metric: (sum, weight)}; a metric without weight is left out.

    The mean of a vector is a list. Raises `UserError` if the loss has no weight, or a layer counted values that
    are not finite.
    """
    if found := non_finite(totals):
        raise UserError(f"{where}: {found}")
    if "loss" in totals and totals["loss"][1] == 0:
        raise UserError(f"{where}: the loss has no weight; is every target of the data masked?")
    return {
        name: (np.asarray(total, np.float64) / float(weight)).tolist()
        for name, (total, weight) in totals.items()
        if weight
    }


def non_finite(totals: Mapping[str, Any]) -> str | None:
    """What to say where a metric `.../<name>_non_finite`, by which layers count such values, is not 0.

    The first layer is named: NaN spreads through all later ones.
    """
    found = [name for name, (total, _) in totals.items() if name.endswith(NON_FINITE) and total > 0]
    if not found:
        return None
    first = min(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    layer, _, what = first.removesuffix(NON_FINITE).rpartition("/")
    total, weight = totals[first]
    return f"{int(total)} of the {int(weight)} {what} logits of {layer} are NaN or infinite"
