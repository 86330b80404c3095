"""LoRA adapters in the format of the peft library: `adapter_config.json` and `adapter_model.safetensors`.

    save(task, saved, "exported")                # of a run or directory of `AdapterTuning`
    config, saved = load("theirs", base="qwen3")    # what `research.training.partial.save_adapter` writes

Their lora_A [r, in] and lora_B [out, r] are `down` and `up` transposed, their scaling lora_alpha / r (with `use_rslora`
lora_alpha / sqrt(r)) is ours. A frozen kernel that is W less what the adapter began with (PiSSA, CorDA) has no place in
that format: the difference from W, of rank 2 r, is written, which any base model takes.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from research.adapters.lora import LoRA, flat, tree
from research.adapters.tuning import AdapterTuning
from research.config import of
from research.errors import UserError, nearest
from research.interop.export import expressible
from research.interop.families import FAMILIES
from research.interop.fields import read_json
from research.interop.files import DTYPES, cast, check_dtype, new_directory, some, write_json
from research.interop.names import shapes, stored
from research.nn.transformer import unscan_layers, unscan_params
from research.nn.weights import LowRank
from research.paths import expand
from research.training.model_directory import fingerprint
from research.training.paths import compile_pattern
from research.training.workdir import load_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
# What changes the arithmetic and is not LoRA's.
_REFUSED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "use_qalora": False,
}


def is_peft(directory: str | Path) -> bool:
    """Whether a directory holds an adapter of the peft library."""
    return (expand(directory) / CONFIG).is_file()


def save(
    task: AdapterTuning,
    saved: Any,
    directory: str | Path,
    *,
    base_name: str | None = None,
    dtype: str = "float32",
) -> str:
    """Writes the adapter of a run. saved: "fixed" and "adapter". base_name: what peft is told its base model is called;
    by default where it lies here. -> a line that says what was written.

    Raises:
        UserError: no low-rank adapter, a base that was rounded on the way or has no name in transformers, and what
            `files` raises.
    """
    import safetensors.numpy

    check_dtype(dtype, tuple(DTYPES))
    if not isinstance(task.adapter, LoRA) or any(
        not isinstance(leaf, LowRank) for leaf in flat(saved["adapter"]).values()
    ):
        raise UserError(f"peft has LoRA; a {type(task.adapter).__name__} has no place in its format")
    if "kernel" in saved["fixed"]:
        raise UserError(
            "this adapter's base was rounded when it began, and peft's format holds no base: merge it instead "
            "(python -m experiments.adapter --merge)"
        )
    factors = _unrolled(saved["adapter"])
    origin = _unrolled(saved["fixed"].get("origin", {}))
    factors = {path: _difference(term, origin.get(path)) for path, term in factors.items()}
    modules = _modules(task.loaded.model, list(factors))
    tensors, ranks, alphas = {}, {}, {}
    for path, term in factors.items():
        name, (down, up) = modules[path], (np.asarray(part) for part in (term.down, term.up))
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = cast(np.ascontiguousarray(down.T), dtype, name)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = cast(np.ascontiguousarray(up.T), dtype, name)
        ranks[name], alphas[name] = down.shape[1], term.scale * down.shape[1]
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or task.base,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": task.adapter.dropout,
        "target_modules": sorted(modules.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: _number(a) for name, a in alphas.items() if a != alpha},
        "inference_mode": True,
    }
    directory = expand(directory)
    with new_directory(directory, sum(tensor.nbytes for tensor in tensors.values())) as content:
        safetensors.numpy.save_file(tensors, content / WEIGHTS, metadata={"format": "pt"})
        write_json(content / CONFIG, config)
    what = f", the difference from the base, of rank {rank}" if origin else ""
    return f"{directory}: a LoRA adapter of {len(factors)} modules in {dtype}{what}"


def load(directory: str | Path, base: str) -> tuple[ConfigDict, Any]:
    """An adapter of the peft library for the model at `base` -> (config, what a run of `AdapterTuning` saves).

    Raises:
        UserError: another kind of adapter, an option that changes the arithmetic, tensors that are missing, unexpected,
            damaged, or do not fit the base.
    """
    import safetensors
    import safetensors.numpy

    folder = expand(directory)
    entries = read_json(folder / CONFIG)
    _check(entries, folder / CONFIG)
    try:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(
            f"{folder / WEIGHTS} does not exist; pickle (adapter_model.bin) is never read"
        ) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is not an intact safetensors file: {error}") from None
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UserError(f"{folder / WEIGHTS}: {name} is no factor of a linear layer")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    loaded = load_model(base)
    model, _ = unscan_layers(loaded.model, loaded.params)
    modules = {name: path for path, name in _modules(model, None).items()}
    terms = {}
    for name, parts in pairs.items():
        if set(parts) != {"A", "B"}:
            raise UserError(f"{folder / WEIGHTS}: {name} has only lora_{next(iter(parts))}")
        if name not in modules:
            close = nearest(name, modules)
            raise UserError(f"{base} has no module {name}" + (f"; did they mean {close}?" if close else ""))
        terms[modules[name]] = _term(name, parts["A"], parts["B"], entries, folder)
    ranks = {term.down.shape[-1] for term in terms.values()}
    adapter = of(LoRA, rank=max(ranks), targets=tuple(f"^{re.escape(path)}$" for path in terms))
    if model is not loaded.model:
        raise UserError(
            f"{base} has scanned layers: convert it to unrolled ones first, as --format=lathe does"
        )
    task = AdapterTuning(LoRA(rank=max(ranks)), base)
    digits = fingerprint(loaded.params)
    mark = jnp.asarray([int(digits[:8], 16), int(digits[8:], 16)], jnp.uint32)
    saved = {"fixed": {"fingerprint": mark}, "adapter": tree(terms)}
    task.adapter.check(loaded.model, loaded.params, saved["adapter"])
    return ConfigDict({"task": of(AdapterTuning, adapter=adapter, base=base)}), saved


def _term(name: str, a: np.ndarray, b: np.ndarray, entries: dict[str, Any], folder: Path) -> LowRank:
    rank = _of_pattern(name, entries.get("rank_pattern") or {}, entries.get("r", 8))
    alpha = _of_pattern(name, entries.get("alpha_pattern") or {}, entries.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(
            f"{folder / CONFIG}: r {rank!r} and lora_alpha {alpha!r} of {name} are no rank and no factor"
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(
            f"{folder}: {name} has factors {a.shape} and {b.shape}, and {CONFIG} says rank {rank}"
        )
    scale = alpha / (math.sqrt(rank) if entries.get("use_rslora") else rank)
    down, up = (jnp.asarray(part.T.astype(np.float32)) for part in (a, b))
    return LowRank(down, up, float(scale))


def _of_pattern(name: str, patterns: dict[str, Any], default: Any) -> Any:
    """What peft takes: the first pattern that a module's name ends with, at a dot."""
    found = (
        value
        for pattern, value in patterns.items()
        if compile_pattern(rf"(.*\.)?({pattern})", CONFIG).fullmatch(name)
    )
    return next(found, default)


def _check(entries: dict[str, Any], path: Path) -> None:
    if entries.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {entries.get('peft_type')!r} is not supported; LORA is")
    if entries.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {entries['bias']!r} trains biases, which is not supported; none is")
    for name, neutral in _REFUSED.items():
        if entries.get(name, neutral) not in (neutral, None, False, [], {}):
            raise UserError(f"{path}: {name} {json.dumps(entries[name])} is not supported")


def _modules(model: Any, wanted: list[str] | None) -> dict[str, str]:
    """{path of a kernel: the module of transformers' family}, of those wanted, by default all that have one to
    themselves."""
    model = model.clone(scan_layers=False) if getattr(model, "scan_layers", False) else model
    family = FAMILIES[expressible(model)]
    found = {}
    for path, shape in shapes(model).items():
        if not path.endswith("/kernel"):
            continue
        place = stored(path, shape, family)
        whole = len(place.names) == 1 and place.part == (0, 1) and place.transposed and not place.depthwise
        if whole:
            found[path] = place.names[0].removesuffix(".weight")
        elif wanted is not None and path in wanted:
            raise UserError(f"{path} is a part of a tensor in transformers, and peft adapts whole modules")
    if wanted is None:
        return found
    if strange := sorted(set(wanted) - set(found)):
        raise UserError(f"the model has no {some(strange)}")
    return {path: found[path] for path in wanted}


def _unrolled(terms: Any) -> dict[str, LowRank]:
    return flat(unscan_params(terms) if "layers" in terms else terms)


def _difference(term: LowRank, origin: LowRank | None) -> LowRank:
    if origin is None:
        return term
    down = np.concatenate([term.down, origin.down], axis=1)
    return LowRank(down, np.concatenate([term.up, -np.asarray(origin.up)]), term.scale)


def _number(value: float) -> int | float:
    """Whole numbers as such, as peft writes them."""
    return int(value) if float(value).is_integer() else float(value)
