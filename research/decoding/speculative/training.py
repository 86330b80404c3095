"""Training a drafter against a frozen target: one task for all of them.

The parameters of a run are `{"target": ..., "drafter": ...}`, so stages say what is trained: `drafter/` alone
as a rule, parts of `target/` too where the paper tunes both (Medusa-2). The target is read from disk when the
run begins.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from research.decoding.proposers import Proposer, Target
from research.errors import UserError
from research.nn.transformer import holds_stack
from research.training.task import Batch, Metrics, PyTree
from research.training.workdir import load_model


class Drafter(Proposer, Protocol):
    """A proposer with parameters of its own that are trained; static and hashable, built by a config."""

    def create(self, key: jax.Array, target: Target) -> PyTree:
        """Float32 parameters for `target`, which may start as copies of some of its own."""

    def loss(self, params: PyTree, teacher: "Teacher", batch: Batch, key: jax.Array | None) -> Metrics:
        """{"loss": (sum, weight), ...} over a language batch; key is None in evaluation (no noise)."""


class Teacher:
    """The target's view of a language batch, computed when asked for, once.

    `target` is the model with its parameters, through which gradients flow where they are trained; `hidden`
    [B, T, D] (after the final norm) and `logits` float32[B, T, V] are constants.
    """

    def __init__(self, target: Target, batch: Batch):
        self.target, self._batch = target, batch

    @functools.cached_property
    def hidden(self) -> jax.Array:
        variables = {"params": jax.lax.stop_gradient(self.target.params)}
        places = self._batch["positions"], self._batch["segments"]
        hidden, _ = self.target.model.apply(variables, self._batch["tokens"], *places, method="features")
        return jax.lax.stop_gradient(hidden)

    @functools.cached_property
    def logits(self) -> jax.Array:
        return jax.lax.stop_gradient(self.target.logits(self.hidden))


def shifted(x: jax.Array, offset: int) -> jax.Array:
    """x [B, T, ...] -> y with y[:, t] = x[:, t + offset], zeros beyond the end."""
    if not offset:
        return x
    return jnp.pad(x[:, offset:], ((0, 0), (0, offset)) + ((0, 0),) * (x.ndim - 2))


def ahead(batch: Batch, offset: int) -> tuple[jax.Array, jax.Array]:
    """(labels int32[B, T], weights f32[B, T]) for predicting, at t, the token t + 1 + offset.

    The weight is that of the label, and 0 where another document has begun in between. Offset 0 is the target's
    own task.
    """
    same = shifted(batch["segments"], offset) == batch["segments"]
    return shifted(batch["targets"], offset), shifted(batch["weights"], offset) * same


@dataclass(frozen=True)
class DrafterTraining:
    """The task: `drafter` learns to guess what the model saved at `target` says next.

    target: a workdir or a model directory, as for `load_model`.
    """

    drafter: Drafter
    target: str

    @functools.cached_property
    def loaded(self) -> Any:
        # Whoever asks first may be tracing: arrays, not tracers, are kept.
        with jax.ensure_compile_time_eval():
            return load_model(self.target)

    @property
    def target_model(self) -> Any:
        model = self.loaded.model
        if holds_stack(model):
            raise UserError(
                f"DrafterTraining.target: {self.target} holds a {type(model).__name__}, whose batches have images; "
                "drafters are trained for decoders of text"
            )
        return model

    def init(self, key: jax.Array) -> PyTree:
        target_key, drafter_key = jax.random.split(key)
        params = self.target_model.init(target_key, jnp.zeros((1, 2), jnp.int32))["params"]
        return {"target": params, "drafter": self.drafter.create(drafter_key, self._target(params))}

    def start(self, key: jax.Array) -> PyTree:
        """What a run begins with: `init`, but with the target that was saved."""
        params = self.loaded.params
        return {"target": params, "drafter": self._create(jax.random.split(key)[1], params)}

    @functools.cached_property
    def _create(self) -> Callable[[jax.Array, PyTree], PyTree]:
        return jax.jit(lambda key, params: self.drafter.create(key, self._target(params)))

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        return self._measure(params, batch, key)

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        return self._measure(params, batch, None)

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {"": params}

    def _measure(self, params: PyTree, batch: Batch, key: jax.Array | None) -> Metrics:
        teacher = Teacher(self._target(params["target"]), batch)
        return self.drafter.loss(params["drafter"], teacher, batch, key)

    def _target(self, params: PyTree) -> Target:
        return Target(params, self.target_model)
