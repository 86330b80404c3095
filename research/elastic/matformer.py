"""MatFormer: nested transformers for elastic inference (arXiv 2310.07707).

Inside every FFN the first m hidden units form a complete smaller FFN. A few widths m_1 < ... < m_g = F are
trained together on shared weights, so one parameter tree holds g models and, with a width chosen per layer,
g ** L of them (Mix'n'Match), none of which needs further training:

    FFN_i(x) = (act(x W_gate[:, :m_i]) * x W_up[:, :m_i]) W_down[:m_i, :]        (sections 3.1 and 3.2)
    L = sum_i lambda_i CE(M_i(x), y)                                             (joint training, equation 3)

A submodel is a slice of the tree, never a mask: training, evaluation and extraction all multiply the smaller
arrays. The task below wraps any task whose model is a stack of blocks: MatLM around a decoder, MatViT around
a ViT.

Sampled training (the authors' later release) draws one width a step. Both code bases sum the losses with
lambda_i = 1. The rule for Mix'n'Match (widths that grow slowly with depth) follows the paper's section 3.3
and the slicing notes of Gemma 3n.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from research.elastic.slicing import (
    ElasticSpec,
    down_kernel,
    mlp_widths,
    nested_widths,
    slice_mlp,
    slice_model,
    slice_params,
)
from research.errors import UserError, nearest
from research.nn.transformer import LayerStack
from research.training.task import Batch, Metrics, PyTree, Task

NAMES = ("S", "M", "L", "XL")


@dataclasses.dataclass(frozen=True)
class MatFormer:
    """Trains the nested widths of a task's model together.

    Args:
        task: a task with a `model` that is a LayerStack.
        divisors: the granularities as divisors of the FFN width, largest divisor (smallest model) first.
        training: "joint" sums the losses of all granularities in every step; "sampled" draws one of them per
            (micro)batch, at less than the cost of one full model.
        loss_weights: lambda_i, smallest granularity first; default 1 for all.
    """

    task: Task
    divisors: tuple[int, ...] = (8, 4, 2, 1)
    training: Literal["joint", "sampled"] = "joint"
    loss_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        falling = list(self.divisors) == sorted(set(self.divisors), reverse=True)
        if not falling or self.divisors[-1:] != (1,):
            raise UserError(f"MatFormer.divisors must fall and end with 1, got {list(self.divisors)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.divisors):
            raise UserError(
                f"MatFormer.loss_weights needs {len(self.divisors)} values, one per divisor, "
                f"got {len(self.loss_weights)}"
            )
        if self.loss_weights is not None and self.training == "sampled":
            raise UserError("MatFormer.loss_weights weigh the terms of a joint loss; sampled has one")
        for width in set(mlp_widths(self.model)):
            nested_widths(width, self.divisors)

    @property
    def model(self) -> LayerStack:
        return self.task.model

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the granularities, smallest first: S, M, L, XL where there are four, else 1/8 ... 1/1."""
        if len(self.divisors) == len(NAMES):
            return NAMES
        return tuple(f"1/{divisor}" for divisor in self.divisors)

    def init(self, key: jax.Array) -> PyTree:
        return self.task.init(key)

    @property
    def start(self) -> Callable[[jax.Array], PyTree]:
        """As that of the task; there is none where that has none."""
        return self.task.start

    def granularity(self, params: PyTree, index: int) -> PyTree:
        """The parameters of granularity `index`: every FFN cut to its width / divisors[index]."""
        return nest(params, self.divisors[index])

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {name: self.granularity(params, i) for i, name in enumerate(self.names)}

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        if self.training == "joint":
            return self._joint_loss(params, batch, key)
        return self._sampled_loss(params, batch, key)

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        return self.task.evaluate(params, batch)

    def _joint_loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        weights = self.loss_weights or (1.0,) * len(self.divisors)
        total, by_size = None, {}
        for i, (name, weight) in enumerate(zip(self.names, weights, strict=True)):
            metrics = self.task.loss(self.granularity(params, i), batch, key)  # one dropout key for all
            loss, count = metrics.pop("loss")
            term = loss if weight == 1.0 else weight * loss
            total = term if total is None else total + term
            by_size[f"loss_{name}"] = (jax.lax.stop_gradient(loss), count)
        return {"loss": (total, count), **metrics, **by_size}  # other metrics are those of the full model

    def _sampled_loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        """Loss of one drawn granularity. Only `loss` carries a gradient; the rest are monitors."""
        draw, key = jax.random.split(key)
        index = jax.random.randint(draw, (), 0, len(self.divisors))

        def branch(i: int):
            def objective(params: PyTree) -> tuple[jax.Array, Metrics]:
                metrics = self.task.loss(self.granularity(params, i), batch, key)
                loss, count = metrics["loss"]
                for j, name in enumerate(self.names):  # weight 0 where another granularity was drawn
                    metrics[f"loss_{name}"] = (
                        metrics["loss"] if i == j else (jnp.zeros_like(loss), jnp.zeros_like(count))
                    )
                return loss, metrics

            return objective

        branches = [branch(i) for i in range(len(self.divisors))]

        # Differentiating a switch stores the residuals of every branch; differentiating inside each branch
        # stores one gradient tree, and was 1.9 times faster at 7M parameters on CPU.
        @jax.custom_vjp
        def drawn(params: PyTree) -> Metrics:
            return jax.lax.switch(index, [lambda p, f=f: f(p)[1] for f in branches], params)

        def forward(params: PyTree) -> tuple[Metrics, PyTree]:
            both = [jax.value_and_grad(f, has_aux=True) for f in branches]
            (_, metrics), gradient = jax.lax.switch(index, both, params)
            return metrics, gradient

        def backward(gradient: PyTree, cotangents: Metrics) -> tuple[PyTree]:
            return (jax.tree.map(lambda g: g * cotangents["loss"][0].astype(g.dtype), gradient),)

        drawn.defvjp(forward, backward)
        return drawn(params)


def nest(params: PyTree, divisor: int) -> PyTree:
    """Every FFN of a (scanned or unrolled) tree cut to the first 1 / divisor of its own hidden units."""
    if divisor == 1:
        return params

    def cut(layer: dict) -> dict:
        return {**layer, "mlp": slice_mlp(layer["mlp"], down_kernel(layer["mlp"]).shape[-2] // divisor)}

    if "layers" in params:
        return {**params, "layers": {name: cut(layer) for name, layer in params["layers"].items()}}
    return {name: cut(value) if name.startswith("layer_") else value for name, value in params.items()}


@dataclasses.dataclass(frozen=True)
class Submodels:
    """Evaluates chosen submodels of a MatFormer instead of its granularities: a Task whose variants they are."""

    task: MatFormer
    specs: dict[str, ElasticSpec]

    def init(self, key: jax.Array) -> PyTree:
        return self.task.init(key)

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        return self.task.loss(params, batch, key)

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        return self.task.evaluate(params, batch)

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        return {name: slice_params(params, spec) for name, spec in self.specs.items()}


def mix_n_match(num_layers: int, widths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The recommended per-layer widths, smallest model first.

    They never shrink with depth, and only neighbours are mixed. Between two neighbouring widths the deepest
    layers grow first, one at a time: (g - 1) L + 1 models.
    """
    mixes = [(widths[0],) * num_layers]
    for small, large in zip(widths, widths[1:], strict=False):
        mixes += [(small,) * (num_layers - grown) + (large,) * grown for grown in range(1, num_layers + 1)]
    return mixes


def parse_widths(text: str, task: MatFormer) -> ElasticSpec:
    """A submodel from words: a granularity ("M"), or one a layer ("S,S,L,XL", or by width "128,256,-,512").

    "-" skips the layer. Widths must be granularities: no others were trained.
    """
    full = mlp_widths(task.model)
    words = [word.strip() for word in text.split(",")]
    if len(words) == 1:
        words *= len(full)
    if len(words) != len(full):
        raise UserError(f"--widths names {len(words)} layers, the model has {len(full)}; '-' skips a layer")
    keep, widths = [], []
    for layer, (word, hidden_dim) in enumerate(zip(words, full, strict=True)):
        if word == "-":
            continue
        trained = dict(zip(task.names, nested_widths(hidden_dim, task.divisors), strict=True))
        width = trained.get(word, int(word) if word.isdecimal() else None)
        if width not in trained.values():
            options = [f"{name} ({value})" for name, value in trained.items()]
            closest = (
                min(trained.values(), key=lambda value: abs(value - width))
                if width is not None
                else nearest(word, trained)
            )
            meant = f"; nearest: {closest}" if closest else ""
            raise UserError(
                f"width {word!r} of layer {layer} is not a granularity: {', '.join(options)}{meant}"
            )
        keep.append(layer)
        widths.append(width)
    if not keep:
        raise UserError("--widths skips every layer")
    return ElasticSpec(tuple(keep), tuple(widths))


def extract(model: LayerStack, params: PyTree, spec: ElasticSpec) -> tuple[LayerStack, PyTree]:
    """A submodel of its own: the smaller module and the smaller arrays."""
    return slice_model(model, spec), slice_params(params, spec)
