"""Larger models that say what a smaller one says: Net2Net for decoders (arXiv 1511.05641).

    model, params = deepen(*widen(model, params), num_layers=10)

`widen` (Net2WiderNet, section 2.2) doubles the width: hidden states become [x, x], heads and units of the FFN get a
twin each, and what reads twins has each kernel halved, which floating point does exactly. Root mean squares and
variances of [x, x] are those of x; a tied head would sum the logits twice, so the norm before it has its scale halved.
Twins of units lie side by side, so that the first half of the grown units is that of the old ones: nested widths
(MatFormer) stay nested, and the grown submodel says what the submodel said. `deepen` (Net2DeeperNet, section 2.3)
appends layers that add nothing: copies of the last ones whose output projections are zero.

Logits differ by the order of sums, and by the rounding of such a scale where it is stored minus one. Twins are equal,
and an optimizer would keep them so: who trains on has to break that by noise first (the paper's section 2.4), which
nothing here does.
"""

import re
from typing import Any

import numpy as np

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Window
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.transformer import Block
from research.training.paths import PyTree, map_named

_ADDS = re.compile(r"(attention/output|mlp/down)/(kernel|bias)$|_post_norm/bias$")


def widen(model: DecoderLM, params: PyTree) -> tuple[DecoderLM, PyTree]:
    """The decoder of twice the width, heads and FFN units, with the same logits.

    params: arrays [in, out] as `model` has them; the result has float arrays of the same dtypes, on the host.

    Raises:
        UserError: a model with a part whose twin this does not know, or parameters that are structured or fused.
    """
    _check(model)
    norm = model.final_norm
    offset = isinstance(norm, RMSNorm) and norm.unit_offset

    def double(path: str, leaf: Any) -> np.ndarray:
        _refuse_structured(path)
        array = np.asarray(leaf)
        *_, part, name = path.split("/")
        if path == "embedding/table":
            return _tile(array, -1)
        if part in ("query_norm", "key_norm"):  # of each head by itself
            return array
        if path.startswith("final_norm/") and model.tied_head:
            one = array.dtype.type(1 if offset and name == "scale" else 0)
            return _tile((array + one) / 2 - one, -1)
        if part.endswith("norm"):
            return _tile(array, -1)
        if part in ("query", "key", "value", "output"):
            return _tile(array, -1) if name == "bias" else _tile(_tile(array / 2, -2), -1)
        if part in ("gate", "up"):
            return _twins(array, -1) if name == "bias" else _twins(_tile(array / 2, -2), -1)
        if part == "down":
            return _tile(array, -1) if name == "bias" else _tile(_twins(array / 2, -2), -1)
        if path == "head/kernel":
            return _tile(array / 2, -2)
        raise UserError(f"{path} is no parameter that can be widened: grow a model before anything is fused")

    blocks = tuple(
        block.clone(
            attention=block.attention.clone(
                num_heads=2 * block.attention.num_heads,
                num_kv_heads=block.attention.num_kv_heads and 2 * block.attention.num_kv_heads,
            ),
            mlp=block.mlp.clone(hidden_dim=2 * block.mlp.hidden_dim),
        )
        for block in model.blocks
    )
    return model.clone(blocks=blocks, width=2 * model.width), map_named(double, params)


def deepen(model: DecoderLM, params: PyTree, num_layers: int) -> tuple[DecoderLM, PyTree]:
    """The decoder of `num_layers` layers, of which those behind its own add nothing; params as in `widen`.

    Raises:
        UserError: fewer layers than the model has, a model as in `widen`, or structured parameters.
    """
    _check(model)
    period, count = len(model.blocks), model.num_layers
    if num_layers < count or count < period:
        raise UserError(f"a model of {count} layers in patterns of {period} does not grow to {num_layers}")

    def silent(path: str, leaf: Any) -> Any:
        _refuse_structured(path)
        return np.zeros_like(leaf) if _ADDS.search(path) else leaf

    grown = dict(params)
    for layer in range(count, num_layers):
        like = f"layer_{layer - period}"  # of the same kind in the pattern
        grown[f"layer_{layer}"] = map_named(silent, grown[like])
    return model.clone(num_layers=num_layers), grown


def _refuse_structured(path: str) -> None:
    if "/kernel/" in path:
        raise UserError(f"{path} is part of a structured kernel: grow a model before it is compressed")


def _tile(array: np.ndarray, axis: int) -> np.ndarray:
    """a, b -> a, b, a, b: hidden states and heads."""
    return np.concatenate([array, array], axis)


def _twins(array: np.ndarray, axis: int) -> np.ndarray:
    """a, b -> a, a, b, b: units of an FFN, whose first ones are nested."""
    return np.repeat(array, 2, axis)


def _check(model: DecoderLM) -> None:
    """Raises where the twin of a part would not be known."""

    def refuse(part: object, *known: type) -> None:
        if type(part) not in known:
            names = " or ".join(kind.__name__ for kind in known)
            raise UserError(f"a {type(part).__name__} can't be grown; {names} can")

    refuse(model, DecoderLM)
    if model.scan_layers:
        raise UserError("the layers of a scanned model are stacked: unscan_layers it first")
    norms = [model.final_norm]
    for block in model.blocks:
        refuse(block, Block)
        refuse(block.attention, Attention)
        refuse(block.mlp, MLP, GatedMLP)
        norms += [block.norm, block.attention.query_norm, block.attention.key_norm]
        if isinstance(block.attention.rule, Window) and not isinstance(block.attention.rule.size, int):
            raise UserError("a model with a span for every head can't be grown: plan its spans afterwards")
    for norm in filter(None, norms):
        refuse(norm, RMSNorm, LayerNorm)
        if isinstance(norm, RMSNorm) and (norm.axes, norm.groups) != (1, 1):
            raise UserError("a norm of several axes or groups can't be grown")
