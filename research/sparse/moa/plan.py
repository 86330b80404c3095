"""Plans as files, and models that run them.

A plan names the rule of every key head (a query head shares that of its key head). It belongs to one model, whose
fingerprint it keeps, and to inputs up to a length. `apply_plan` gives the model for one length N, prompt and output
together: prefill and decoding mask with the spans S(N), and every run of heads with equal rules has a ring of exactly
its sinks and window in the cache (`research.nn.cache`). The heads of a layer are put in the order of their spans, so
that there is one run for each rule.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.nn.masks import Window
from research.nn.transformer import LayerStack, in_stack, stack_of, unscan_layers
from research.nn.weights import Weight
from research.sparse.moa.influence import planned_layers, with_attention
from research.sparse.moa.rules import Grid, Rule
from research.training.model_directory import fingerprint
from research.training.paths import PyTree

FORMAT = 1


@dataclass(frozen=True)
class Shape:
    """What must agree before weights are compared: the layers with spans, and heads of each."""

    layers: tuple[int, ...]
    num_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: LayerStack) -> "Shape":
        attention = planned_layers(model)
        first = next(iter(attention.values()))
        return cls(tuple(attention), first.num_heads, first.kv_heads, first.head_dim)


@dataclass(frozen=True)
class Plan:
    """rules: for every layer of `shape.layers` and every key head. grid: in which spans are whole blocks.

    fingerprint: of the model's parameters. lengths: profiled and constrained ones; the largest is the longest input.
    density: the mean share of keys that heads keep, at most.
    """

    rules: tuple[tuple[Rule, ...], ...]
    grid: Grid
    shape: Shape
    fingerprint: str
    lengths: tuple[int, ...]
    density: float

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def spans(self, length: int) -> np.ndarray:
        """int[layers, Hkv]: keys and values that each head keeps of an input of so many tokens."""
        return np.array([[self.grid.span(rule, length) for rule in layer] for layer in self.rules])

    def save(self, path: str | Path) -> None:
        """As JSON. Raises UserError where it can't be written."""
        text = json.dumps({"moa_plan": FORMAT, **asdict(self)}, indent=1)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"plan {path} can't be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Raises UserError for a file that is no plan."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"plan {path} can't be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"plan {path} is no JSON: {error}") from error
        if not isinstance(values, dict) or values.pop("moa_plan", None) != FORMAT:
            raise UserError(f'{path} is no MoA plan of this version: "moa_plan": {FORMAT} is expected in it')
        try:
            shape = values.pop("shape")
            plan = cls(
                rules=tuple(tuple(Rule(int(a), float(b)) for a, b in layer) for layer in values.pop("rules")),
                grid=Grid(**values.pop("grid")),
                shape=Shape(tuple(shape.pop("layers")), **shape),
                lengths=tuple(int(length) for length in values.pop("lengths")),
                **values,
            )
            whole = len(plan.rules) == len(plan.shape.layers) and plan.lengths
            if not whole or any(len(layer) != plan.shape.kv_heads for layer in plan.rules):
                raise ValueError("rules for every layer and key head, and lengths, are expected")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"plan {path} is malformed: {error}") from error
        return plan

    def check(self, model: LayerStack, params: PyTree) -> None:
        """Raise UserError unless the plan was made for this model with these parameters, or for the decoder in it."""
        model, params = stack_of(model, params)
        shape = Shape.of(model)
        if shape != self.shape:
            raise UserError(f"the plan is for another model: {self.shape}; this one has {shape}")
        found = fingerprint(params)
        if found != self.fingerprint:
            raise UserError(
                f"the plan is for a model of this shape with other parameters, {self.fingerprint}; these are {found}"
            )


@in_stack
def apply_plan(model: LayerStack, params: PyTree, plan: Plan, length: int) -> tuple[LayerStack, PyTree]:
    """The model with the plan's spans for inputs of up to `length` tokens, prompt and output together.

    The heads of a layer are put in the order of their spans where its projections are plain arrays; structured weights
    (quantized, low-rank) keep their order, which makes more and smaller rings of the same size in all. The parameters
    may be others than the plan was made with, `Plan.check` tells. Its context is `length` from then on.

    Raises:
        UserError: a model of another shape, or a length beyond those of the plan.
    """
    model, params = unscan_layers(model, params)
    attention = planned_layers(model)
    shape = Shape.of(model)
    if shape != plan.shape:
        raise UserError(f"the plan is for another model: {plan.shape}; this one has {shape}")
    if length > plan.longest:
        raise UserError(
            f"{length} tokens of prompt and output are beyond the plan's lengths, at most {plan.longest}: plan for "
            "longer inputs, or ask for fewer tokens"
        )
    groups = shape.num_heads // shape.kv_heads
    params, changed = dict(params), {}
    for (layer, module), spans in zip(attention.items(), plan.spans(length), strict=True):
        name = f"layer_{layer}"
        order = np.argsort(spans, kind="stable")
        if _is_plain(params[name]["attention"]):
            params[name] = {
                **params[name],
                "attention": permute_heads(params[name]["attention"], order, groups),
            }
            spans = spans[order]
        windows = tuple(int(span) - plan.grid.sinks for span in np.repeat(spans, groups))
        # Inputs no longer than the sinks and a block are whole, whatever the rule.
        rule = Window(tuple(max(window, 1) for window in windows), plan.grid.sinks)
        changed[layer] = module.clone(rule=rule)
    return with_attention(model, changed).clone(max_length=min(model.max_length, length)), params


def permute_heads(attention: dict[str, Any], order: Sequence[int], groups: int) -> dict[str, Any]:
    """The parameters of an attention layer with key head `order[i]`, and its `groups` query heads, in place i.

    Columns of query, key and value and rows of output move together: the layer's output stays as it is.
    """
    key_order = np.asarray(order)
    query_order = (key_order[:, None] * groups + np.arange(groups)).reshape(-1)

    def along(x: jax.Array, heads: np.ndarray, axis: int) -> jax.Array:
        shape = x.shape
        split = x.reshape(*shape[:axis], len(heads), -1, *shape[axis + 1 :])
        return jnp.take(split, jnp.asarray(heads), axis=axis).reshape(shape)

    moved = dict(attention)
    for name, heads in (("query", query_order), ("key", key_order), ("value", key_order)):
        moved[name] = {leaf: along(x, heads, x.ndim - 1) for leaf, x in attention[name].items()}
    kernel = along(attention["output"]["kernel"], query_order, 0)
    moved["output"] = {**attention["output"], "kernel": kernel}
    return moved


def _is_plain(attention: dict[str, Any]) -> bool:
    names = ("query", "key", "value", "output")
    return all(name in attention and not isinstance(attention[name]["kernel"], Weight) for name in names)
