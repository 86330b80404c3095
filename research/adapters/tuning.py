"""Fine-tuning an adapter on a frozen model: one task for all of them.

The parameters of a run are {"base": the frozen model's, "fixed": what its adapter needs and never trains, "adapter":
what is trained}. The base is read from its directory whenever it is needed and is in no checkpoint; its fingerprint is,
so that another model at the same place is noticed.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from research.adapters.lora import Adapter
from research.config_capture import capture
from research.errors import UserError
from research.training.model_directory import Loaded, fingerprint
from research.training.partial import kept
from research.training.task import (
    Batch,
    LanguageModelling,
    Metrics,
    PyTree,
    add_reported,
    check_compute_dtype,
)
from research.training.workdir import load_model


@dataclass(frozen=True)
class AdapterTuning:
    """`adapter` is trained on next-token prediction, beside the model saved at `base`. A stage's `trainable` is
    `("^adapter/",)`.

    base: a workdir, a model directory or an adapter directory, as for `load_model`. compute_dtype: as in
    `LanguageModelling`, whose metrics these are.
    """

    adapter: Adapter
    base: str
    compute_dtype: str = "float32"

    recalled: ClassVar[tuple[str, ...]] = ("base",)

    def __post_init__(self):
        check_compute_dtype(self.compute_dtype, "AdapterTuning")

    @functools.cached_property
    def loaded(self) -> Loaded:
        # Whoever asks first may be tracing: arrays, not tracers, are kept.
        with jax.ensure_compile_time_eval():
            found = load_model(self.base)
        if not hasattr(found.model, "logits"):
            raise UserError(f"{self.base} holds a {type(found.model).__name__}, which predicts no tokens")
        return found

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.adapter.model(self.loaded.model)

    @property
    def model_config(self) -> ConfigDict:
        return capture(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @functools.cached_property
    def inner(self) -> LanguageModelling:
        return LanguageModelling(self.model, self.compute_dtype)

    def init(self, key: jax.Array) -> PyTree:
        """The base with an adapter that is drawn; a run begins with `start`."""
        fixed, adapter = self.adapter.draw(self.loaded.model, self.loaded.params, key)
        return self.recall({"fixed": {**fixed, "fingerprint": self._fingerprint}, "adapter": adapter})

    def start(self, key: jax.Array) -> PyTree:
        """What a run begins with; on the host."""
        fixed, adapter = self.adapter.create(self.loaded.model, self.loaded.params, key)
        return self.recall({"fixed": {**fixed, "fingerprint": self._fingerprint}, "adapter": adapter})

    def recall(self, saved: PyTree) -> PyTree:
        """All parameters, from "fixed" and "adapter".

        Raises:
            UserError: the base is another model than it was, or the adapter does not fit it.
        """
        there, here = np.asarray(saved["fixed"]["fingerprint"]), np.asarray(self._fingerprint)
        self.adapter.check(self.loaded.model, self.loaded.params, saved["adapter"])
        if not np.array_equal(there, here):
            raise UserError(
                f"the adapter was trained on another base than is at {self.base} now: its fingerprint was "
                f"{_hex(there)} and is {_hex(here)}; put that model back"
            )
        return {"base": self.adapter.frozen(self.loaded.params, saved["fixed"]), **kept(self, saved)}

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        own, inner = jax.random.split(key)
        metrics = self.inner.loss(self.adapter.assemble(params, own), batch, inner)
        return add_reported(metrics, self.adapter.losses(params))

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        return self.inner.evaluate(self.adapter.assemble(params, None), batch)

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {"": params}

    def remember(self, params: PyTree, metrics: Metrics) -> PyTree:
        return self.adapter.remember(params)

    def unpack(self, params: PyTree) -> PyTree:
        """The parameters of `model`."""
        return self.adapter.unpack(params)

    def merge(self, params: PyTree) -> tuple[nn.Module, PyTree, str]:
        """(model, parameters, what was done): one model without an adapter."""
        return self.adapter.merge(self.loaded.model, params)

    @functools.cached_property
    def _fingerprint(self) -> jax.Array:
        """The base's, uint32[2]."""
        digits = fingerprint(self.loaded.params)
        with jax.ensure_compile_time_eval():
            return jnp.asarray([int(digits[:8], 16), int(digits[8:], 16)], jnp.uint32)


def _hex(number: np.ndarray) -> str:
    return "".join(f"{int(part):08x}" for part in number)
