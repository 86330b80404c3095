"""What is trained: initialisation, loss and metrics.

Every metric is a pair (sum, weight). Sums and weights add over microbatches, devices and batches, so the mean
`sum / weight` of the whole is exact however it was cut. A sum may be a vector (one value an expert, say).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas import cross_entropy as kernels
from research.errors import UserError, nearest
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.reports import Measurement, apply_reporting

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

LN2 = 0.6931471805599453
COMPUTE_DTYPES = ("float32", "bfloat16")
_LARGE = 1 << 16  # logits from where on a kernel pays


@runtime_checkable
class Task(Protocol):
    """The contract between the training loop and whatever is trained. All methods are pure and traceable.

    A task that starts from saved parameters also has `start(key) -> params`, run once and not traced, with
    the shapes of `init`.

    A task may keep other things than weights in its parameters: leaves that are not floating point, which no stage
    trains. It then has any of

        remember(params, metrics) -> params     traced, after every update: what the step leaves behind
        check_mesh(mesh)                        raises `UserError` for devices that it can't run on
        rearrange(state, mesh, step) -> state   on the host, after step `step` and with None when a run starts: may
                                                move values between devices; the state it is given is used up
        unpack(params) -> params                the tree of the wrapped task, where its own is another

    One that saves only a part of its parameters has `recalled` and `recall`: see `research.training.partial`.
    """

    def init(self, key: jax.Array) -> PyTree:
        """Float32 parameters from a typed random key."""

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        """{"loss": (sum f32[], weight f32[]), ...}. Weights must not depend on the parameters."""

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        """The metrics of evaluation: no dropout, no key."""

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        """The models that evaluators measure, by name; `{"": params}` when there is just one."""


def cast_floats(params: PyTree, dtype: str) -> PyTree:
    """The floating leaves in `dtype`, the others as they are.

    What lies below a `router` stays: in half precision its logits would tie, and training would choose other
    experts than a model that is served in float32.
    """
    if dtype == "float32":
        return params

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        routes = any(getattr(part, "key", None) == "router" for part in path)
        return leaf if routes or not jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def dropout_rngs(key: jax.Array | None) -> dict[str, jax.Array] | None:
    """The `rngs` of `apply`: dropout is active where the model has any and a key is given (in training)."""
    return None if key is None else {"dropout": key}


def add_reported(metrics: Metrics, losses: dict[str, jax.Array]) -> Metrics:
    """Training metrics with the losses that layers report (`research.nn.reports`), f32[] each.

    Each joins `loss` times its weight, so that the mean is that of the task plus theirs, and is reported under
    its own name; the plain loss becomes `cross_entropy`, unless it has become that already. Raises `UserError`
    where a layer's name is one of the task's.
    """
    if not losses:
        return metrics
    total, weight = metrics["loss"]
    reported = {name: (weight * value, weight) for name, value in losses.items()}
    for name in reported:
        if name in metrics:
            raise UserError(f"a layer reports a loss {name!r}, which is the name of a metric of the task")
    objective = sum((sum_ for sum_, _ in reported.values()), total)
    return {"cross_entropy": (total, weight)} | metrics | {"loss": (objective, weight)} | reported


def check_compute_dtype(dtype: str, where: str) -> None:
    """Raise `UserError` unless `dtype` is one of `COMPUTE_DTYPES`."""
    if dtype not in COMPUTE_DTYPES:
        close = nearest(dtype, COMPUTE_DTYPES)
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(f"{where}.compute_dtype: {dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}{hint}")


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [N, V], labels int32 [N] -> (nats [N], logsumexp [N], correct [N]), all float32.

    `correct` is 1 where no other class has a larger logit (a tie counts as correct): unlike argmax it costs
    nothing, since logsumexp needs the maximum anyway.
    """
    kernel = logits.size >= _LARGE and use_cpu_kernels()
    implementation = "cpu" if kernel else "reference"
    return kernels.cross_entropy(logits.astype(jnp.float32), labels, implementation=implementation)


class FromDirectory:
    """Base of tasks with a field `start_from`, a run or model directory whose parameters a run begins with.

    Where it is None the task has no `start`, and a run begins with `init`.
    """

    @property
    def start(self) -> Callable[[jax.Array], PyTree]:
        if self.start_from is None:
            raise AttributeError("start")
        return lambda key: saved_parameters(self.start_from, jax.eval_shape(self.init, key))


def saved_parameters(path: str, wanted: PyTree) -> PyTree:
    """The parameters of a run or model directory. Raises `UserError` unless they have the shapes `wanted`, where
    structured weights stand for arrays of their logical shape. Floats of 16 bits among their parts become float32,
    which training updates."""
    from research.training.checkpoint_files import mismatches
    from research.training.paths import named_leaves
    from research.training.structures import structures, with_structures
    from research.training.workdir import load_model

    params = load_model(path).params
    wanted = with_structures(wanted, structures(params), f"start_from={path!r}")
    if difference := mismatches(named_leaves(params), named_leaves(wanted), str(path), dtypes=False):
        raise UserError(f"start_from={path!r} does not fit the model: {difference}")
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )


@dataclass(frozen=True)
class LanguageModelling(FromDirectory):
    """Next-token prediction over language batches (see docs/architecture.md).

    Metrics: `loss` (nats per token), `accuracy`, `bits_per_byte` (nats / ln 2 over the bytes of text that the
    targets stand for). With `z_loss` > 0, training adds `z_loss * logsumexp(logits)^2` to `loss` (PaLM,
    arXiv:2204.02311, section 5) and reports the plain nats as `cross_entropy`; evaluation never adds it. The same
    goes for losses that layers report; what they measure (`layer_0/mlp/load`) becomes a metric of both.

    compute_dtype "bfloat16" casts the floating parameters to bfloat16 inside the loss; masters, gradients,
    logits, losses and routers stay float32. start_from: a run or model directory whose parameters a run begins with.
    """

    model: nn.Module
    compute_dtype: str = "float32"
    z_loss: float = 0.0
    start_from: str | None = None

    def __post_init__(self):
        check_compute_dtype(self.compute_dtype, "LanguageModelling")

    def init(self, key: jax.Array) -> PyTree:
        return self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        metrics, partition, losses = self._metrics(params, batch, key)
        if self.z_loss:
            total, weight = metrics["loss"]
            squared = self.z_loss * jnp.sum(batch["weights"].reshape(-1) * jnp.square(partition))
            metrics |= {"loss": (total + squared, weight), "cross_entropy": (total, weight)}
        return add_reported(metrics, losses)

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        return self._metrics(params, batch, None)[0]

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {"": params}

    def _metrics(
        self, params: PyTree, batch: Batch, key: jax.Array | None
    ) -> tuple[Metrics, jax.Array, dict[str, jax.Array]]:
        """-> the metrics, logsumexp f32[B*T], the losses that layers report."""
        logits, losses, measured = apply_reporting(
            self.model,
            {"params": cast_floats(params, self.compute_dtype)},
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            rngs=dropout_rngs(key),
        )
        metrics, partition = language_metrics(logits, batch)
        return metrics | measured, partition, losses


def language_metrics(logits: jax.Array, batch: Batch) -> tuple[Metrics, jax.Array]:
    """logits [B, T, V] of a language batch -> ({"loss", "accuracy", "bits_per_byte"}, logsumexp f32[B*T])."""
    # Two dimensions: with three, XLA:CPU transposes for every weight gradient.
    nats, partition, correct = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch["targets"].reshape(-1)
    )
    weights = batch["weights"].reshape(-1)
    total, weight = jnp.sum(weights * nats), jnp.sum(weights)
    target_bytes = jnp.sum(weights * batch["target_bytes"].reshape(-1).astype(jnp.float32))
    metrics = {
        "loss": (total, weight),
        "accuracy": (jnp.sum(weights * correct), weight),
        "bits_per_byte": (jax.lax.stop_gradient(total) / LN2, target_bytes),
    }
    return metrics, partition


@dataclass(frozen=True)
class Classification(FromDirectory):
    """Image classification over image batches (see docs/architecture.md). Metrics: `loss` (nats), `accuracy`.

    image_shape: (height, width, channels) of the images. label_smoothing s mixes the one-hot target with the
    uniform distribution, (1 - s) onehot + s / classes, in training only, where the plain nats are then
    reported as `cross_entropy`. compute_dtype, start_from, and what layers report, as in `LanguageModelling`.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    compute_dtype: str = "float32"
    label_smoothing: float = 0.0
    start_from: str | None = None

    def __post_init__(self):
        check_compute_dtype(self.compute_dtype, "Classification")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"Classification.label_smoothing: {self.label_smoothing} is not in [0, 1)")

    def init(self, key: jax.Array) -> PyTree:
        return self.model.init(key, jnp.zeros((1, *self.image_shape), jnp.float32))["params"]

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        logits, losses, measured = self._logits(params, batch, key)
        metrics = classification_metrics(logits, batch) | measured
        if self.label_smoothing:
            uniform = jnp.mean(jax.nn.logsumexp(logits, axis=-1, keepdims=True) - logits, axis=-1)
            plain, weight = metrics["loss"]
            smooth = (1 - self.label_smoothing) * plain + self.label_smoothing * jnp.sum(
                batch["weights"] * uniform
            )
            metrics |= {"loss": (smooth, weight), "cross_entropy": (plain, weight)}
        return add_reported(metrics, losses)

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        logits, _, measured = self._logits(params, batch, None)
        return classification_metrics(logits, batch) | measured

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {"": params}

    def _logits(
        self, params: PyTree, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Measurement]]:
        images = batch["images"].astype(self.compute_dtype)
        variables = {"params": cast_floats(params, self.compute_dtype)}
        logits, losses, measured = apply_reporting(self.model, variables, images, rngs=dropout_rngs(key))
        return logits.astype(jnp.float32), losses, measured


def classification_metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """logits f32[B, classes] of an image batch -> {"loss", "accuracy"}."""
    nats, _, correct = cross_entropy(logits, batch["labels"])
    weights = batch["weights"]
    weight = jnp.sum(weights)
    return {"loss": (jnp.sum(weights * nats), weight), "accuracy": (jnp.sum(weights * correct), weight)}
