"""Rotary embeddings as `config.json` describes them.

transformers 4 writes `rope_theta` beside `rope_scaling`; transformers 5 one `rope_parameters`, for Gemma 3
with one entry per type of layer. Both are read. The first is written, because both versions read it.
"""

import math
from typing import Any

from research.errors import UserError
from research.interop.fields import Fields
from research.nn.rotary import LinearScaling, Llama3Scaling, Rotary, YarnScaling

TYPES = ("default", "linear", "llama3", "yarn")

# What transformers takes where an entry is absent or null.
_DEFAULTS = {
    "attention_factor": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "partial_rotary_factor": 1.0,
    "truncate": True,
}
_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}


def read_rotary(config: Fields, layer_type: str | None, base: float) -> Rotary:
    """The rotary embedding of a model, or of one type of its layers.

    Args:
        config: the whole `config.json`.
        layer_type: None, or the key below `rope_parameters` that transformers 5 uses.
        base: theta where neither form gives one.

    Raises:
        UserError: a type of scaling, or an entry, that would change the positions and isn't supported.
    """
    entry = config.section("rope_parameters", _DEFAULTS)
    scaling = config.section("rope_scaling", _DEFAULTS)
    if layer_type is None:
        if entry is not None and any(isinstance(value, dict) for value in entry.entries.values()):
            raise UserError(
                f"{entry.where}: this family takes one entry for all layers, not one per type of layer"
            )
        entry = scaling or entry  # as in transformers 5: the old form wins where both are given
    else:
        if entry is not None and not any(isinstance(value, dict) for value in entry.entries.values()):
            raise UserError(f"{entry.where}: this family takes full_attention and sliding_attention entries")
        entry = None if entry is None else entry.section(layer_type, _DEFAULTS)
        if (
            scaling is not None and layer_type == "full_attention"
        ):  # the old form scales the global layers only
            entry = Fields({**(entry.entries if entry else {}), **scaling.entries}, scaling.where, _DEFAULTS)
    theta = "rope_local_base_freq" if layer_type == "sliding_attention" else "rope_theta"
    if entry is not None and entry.entries.get("rope_theta") is not None:
        base = entry.number("rope_theta")
    elif config.entries.get(theta) is not None:
        base = config.number(theta)
    whole = config.entries.get("partial_rotary_factor")
    if whole is not None and whole != 1:
        raise config.refuse("partial_rotary_factor", whole, "1: rotation of whole heads")
    return Rotary(base, None if entry is None else _scaling(entry, config))


def _scaling(entry: Fields, config: Fields) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    name = "rope_type" if "rope_type" in entry.entries else "type"
    kind = entry.entries.get(name, "default")
    if kind not in TYPES:
        raise entry.refuse(name, kind, ", ".join(TYPES))
    if entry.number("partial_rotary_factor") != 1:
        raise entry.refuse(
            "partial_rotary_factor", entry.raw("partial_rotary_factor"), "1: rotation of whole heads"
        )
    if kind == "default":
        return None
    missing = [key for key in _REQUIRED[kind] if entry.entries.get(key) is None]
    if missing:
        raise UserError(f"{entry.where}: {kind} scaling needs {', '.join(missing)}")
    if kind == "linear":
        return LinearScaling(entry.number("factor"))
    if config.entries.get("original_max_position_embeddings") is not None:
        original = config.integer("original_max_position_embeddings")
    elif entry.entries.get("original_max_position_embeddings") is not None:
        original = entry.integer("original_max_position_embeddings")
    else:
        original = config.integer("max_position_embeddings")
    if kind == "llama3":
        low, high = entry.number("low_freq_factor"), entry.number("high_freq_factor")
        if low >= high:
            raise UserError(f"{entry.where}: low_freq_factor {low} must be below high_freq_factor {high}")
        return Llama3Scaling(entry.number("factor"), low, high, original)
    return _yarn(entry, config, original)


def _yarn(entry: Fields, config: Fields, original: int) -> YarnScaling:
    factor = entry.optional_number("factor")
    if factor is None:
        factor = config.integer("max_position_embeddings") / original
    attention = entry.optional_number("attention_factor")
    above, below = entry.entries.get("mscale"), entry.entries.get("mscale_all_dim")
    if attention is None and above and below:
        above, below = entry.number("mscale"), entry.number("mscale_all_dim")
        log = math.log(factor) if factor > 1 else 0.0
        attention = (0.1 * above * log + 1.0) / (0.1 * below * log + 1.0)
    return YarnScaling(
        factor,
        original,
        beta_fast=entry.number("beta_fast"),
        beta_slow=entry.number("beta_slow"),
        attention_factor=attention,
        truncate=entry.boolean("truncate"),
    )


def write_scaling(rotary: Rotary) -> dict[str, Any] | None:
    """The `rope_scaling` entry, None where the frequencies aren't scaled."""
    match rotary.scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case YarnScaling(factor, original, fast, slow, attention, truncate):
            entry = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": fast,
                "beta_slow": slow,
                "truncate": truncate,
            }
            return entry if attention is None else {**entry, "attention_factor": attention}
    raise UserError(
        f"rotary scaling {type(rotary.scaling).__name__} has no name in transformers: {', '.join(TYPES)}"
    )
