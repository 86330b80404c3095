"""Distillation of a decoder into its mmMamba student, layer by layer and end to end (arXiv 2502.13145, section 3.2).

One task for all three stages; stages choose the term by `loss_weights`, and what is trained by patterns:

1. `mimicry`, W_Q, W_K, W_V and W_O fixed. Every mixer reads the *teacher's* hidden states, whatever the layers below it
   have become, and what its heads give to W_O is to be what the teacher's heads give to it, in mean square over heads,
   their width and layers. The paper multiplies by 1000: `loss_weights={"mimicry": 1000.0}`.
2. The same, with W_Q, W_K, W_V.
3. `loss`: the student runs on its own states; KL(teacher || student) of the next token, at temperature 1. Without W_O,
   MLPs, embeddings and head, which stay the teacher's.

The parameters of a run are {"teacher": the whole decoder, "student": {"layer_3": {"attention": ...}}}: what is not
converted is there once. Both terms are sums over tokens that are divided by their number. The teacher reads text; for
one that reads images see `research/multimodal/distillation.py`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from research.config_capture import capture
from research.decoding.speculative.losses import agreement, kl
from research.nn.attention import Context
from research.nn.transformer import unscan_layers
from research.ssm.mmmamba import (
    Hybrid,
    Seeding,
    converted,
    graft,
    part,
    seed_mixers,
    stacks,
    student_model,
    with_stacks,
)
from research.training.model_directory import Loaded
from research.training.task import Batch, Metrics, PyTree, cast_floats, check_compute_dtype, language_metrics
from research.training.workdir import load_model

NEW = r"^student/.*/(A_log|dt_bias|dt/kernel|conv/\w+|gate/kernel|norm/scale)$"
PROJECTIONS = r"^student/.*/(query|key|value)(_norm)?/\w+$"


@dataclass(frozen=True)
class MambaDistillation:
    """The model saved at `teacher`, made into a student whose attention has become state-space layers.

    Metrics: `loss` (KL in nats a token), `mimicry` (mean square, see above), `agreement` (share of tokens whose first
    guess is the teacher's), `cross_entropy` (nats a token of the text), `accuracy`, `bits_per_byte`.

    Args:
        teacher: a workdir or a model directory, as for `load_model`; or a model, whose parameters are drawn.
        hybrid, period: which layers stay attention, see `kept_layers`.
        seeding: what the mixers begin with, see `seed_mixers`.
        conv_width, chunk: of the mixers.
        compute_dtype: as in `LanguageModelling`.
    """

    teacher: str | nn.Module
    hybrid: Hybrid | None = None
    period: int = 4
    seeding: Seeding = "mimic"
    conv_width: int = 2
    chunk: int = 128
    compute_dtype: str = "float32"

    def __post_init__(self):
        check_compute_dtype(self.compute_dtype, "MambaDistillation")

    @functools.cached_property
    def loaded(self) -> Loaded:
        # Whoever asks first may be tracing: arrays, not tracers, are kept.
        with jax.ensure_compile_time_eval():
            return load_model(self.teacher)

    @functools.cached_property
    def teacher_model(self) -> nn.Module:
        model = self._saved_model
        plain = {name: stack.clone(scan_layers=False, remat="none") for name, stack in stacks(model).items()}
        return with_stacks(model, plain)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The student."""
        fields = dict(conv_width=self.conv_width, chunk=self.chunk)
        return student_model(self._saved_model, self.hybrid, self.period, **fields)

    @property
    def _saved_model(self) -> nn.Module:
        return self.teacher if isinstance(self.teacher, nn.Module) else self.loaded.model

    @property
    def model_config(self) -> ConfigDict:
        return capture(self.model)

    def init(self, key: jax.Array) -> PyTree:
        teacher_key, student_key = jax.random.split(key)
        params = self.teacher_model.init(teacher_key, jnp.zeros((1, 2), jnp.int32))["params"]
        return {"teacher": params, "student": self._seeded(student_key, params)}

    def start(self, key: jax.Array) -> PyTree:
        """What a run begins with: `init`, but with the teacher that was saved."""
        if isinstance(self.teacher, nn.Module):
            return jax.jit(self.init)(key)
        _, params = unscan_layers(self.loaded.model, self.loaded.params)
        mixers = jax.jit(self._seeded)(jax.random.split(key)[1], params)
        return {"teacher": params, "student": mixers}

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        return self.evaluate(params, batch)

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        params = cast_floats(params, self.compute_dtype)
        teacher, mixers = jax.lax.stop_gradient(params["teacher"]), params["student"]
        inputs = self.inputs(batch)
        hidden, seen = watch(self.teacher_model, teacher, *inputs)
        wanted = self.teacher_model.apply({"params": teacher}, hidden, method="logits")
        logits = self.model.apply({"params": graft(teacher, mixers)}, *inputs)
        metrics = self.measured(logits, batch)
        return {
            **metrics,
            "cross_entropy": metrics["loss"],
            "loss": kl(logits, wanted, batch["weights"]),
            "agreement": agreement(logits, jnp.argmax(wanted, axis=-1), batch["weights"]),
            "mimicry": mimicry(self.model, mixers, seen),
        }

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """What teacher and student are called with."""
        return batch["tokens"], batch["positions"], batch["segments"]

    def measured(self, logits: jax.Array, batch: Batch) -> Metrics:
        """Of the student's logits alone."""
        return language_metrics(logits, batch)[0]

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {"": params}

    def unpack(self, params: PyTree) -> PyTree:
        """The student's own tree, as its `model` takes it."""
        return graft(params["teacher"], params["student"])

    def _seeded(self, key: jax.Array, params: PyTree) -> PyTree:
        return seed_mixers(self.model, self.teacher_model, params, key, self.seeding)


Seen = dict[str, tuple[jax.Array, Context, jax.Array]]
"""{"layer_3": (what its mixer reads [..., width], where that stands, what its heads give to W_O [..., H d])}."""


def watch(model: nn.Module, params: PyTree, *inputs: Any) -> tuple[jax.Array, Seen]:
    """One forward of a model with unrolled layers -> its hidden states [B, T, D], and what its attentions see and
    say: of any class that ends in a projection called `output`."""
    read: dict[str, tuple[jax.Array, Context]] = {}
    heads: dict[str, jax.Array] = {}

    def listen(run: Any, args: tuple, keywords: dict[str, Any], call: nn.module.InterceptorContext) -> Any:
        path = call.module.path
        if call.method_name == "__call__" and path[-1:] == ("attention",):
            read["/".join(path[:-1])] = args[:2]
        if call.method_name == "__call__" and path[-2:] == ("attention", "output"):
            heads["/".join(path[:-2])] = args[0]
        return run(*args, **keywords)

    with nn.intercept_methods(listen):
        hidden, _ = model.apply({"params": params}, *inputs, method="features")
    return hidden, {layer: (*read[layer], heads[layer]) for layer in heads}


def mimicry(model: nn.Module, mixers: PyTree, seen: Seen) -> tuple[jax.Array, jax.Array]:
    """(sum over tokens of the mean square by which a layer's heads differ from the teacher's, tokens), both added over
    the converted layers; `seen` is the teacher's, and constant."""
    total, count = jnp.float32(0), jnp.float32(0)
    for layer, mixer in converted(model):
        u, context, wanted = jax.lax.stop_gradient(seen[layer])
        real = jnp.ones(context.positions.shape) if context.segments is None else context.segments > 0
        real = real.astype(jnp.float32).reshape(-1)
        said = _heads(mixer, part(mixers, layer)["attention"], u, context)
        gap = said.astype(jnp.float32) - wanted.astype(jnp.float32)
        total += jnp.sum(real * jnp.mean(jnp.square(gap).reshape(len(real), -1), axis=-1))
        count += jnp.sum(real)
    return total, count


def _heads(mixer: nn.Module, params: PyTree, u: jax.Array, context: Context) -> jax.Array:
    """What a mixer gives to its projection `output`."""
    found: list[jax.Array] = []

    def listen(run: Any, args: tuple, keywords: dict[str, Any], call: nn.module.InterceptorContext) -> Any:
        if call.method_name == "__call__" and call.module.path == ("output",):
            found.append(args[0])
        return run(*args, **keywords)

    with nn.intercept_methods(listen):
        mixer.apply({"params": params}, u, context)
    return found[0]
