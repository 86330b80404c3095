"""A decoder as a directory that transformers loads: which family expresses it, and writing it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.interop.families import ACTIVATIONS, FAMILIES, Family, layers_of, obstacles, write_config
from research.interop.files import DTYPES, cast, check_dtype, new_directory, some, write_json, write_tensors
from research.interop.names import flatten, shapes, stored, unfuse
from research.language.decoder import DecoderLM
from research.nn import weights
from research.nn.attention import Attention
from research.nn.attention_kernels import AutoAttention, BlockedAttention, DenseAttention
from research.nn.masks import Causal, Window
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import LinearScaling, Llama3Scaling, Rotary, YarnScaling
from research.nn.transformer import Block, unscan_layers

Unequal = Literal["pad", "refuse"]

_GEMMA_3N = (
    "Gemma 3n has one width per layer, but only for its own architecture (AltUp, LAuReL, per-layer "
    "embeddings), which this model doesn't have"
)


@dataclasses.dataclass(frozen=True)
class Export:
    """What `save` wrote.

    Attributes:
        directory: where.
        family: the `model_type`.
        dtype: of the tensors.
        parameters: stored numbers, padding included.
        ffn_widths: hidden units of every layer of the model.
        padded_to: the width that narrower layers were filled up to with zeros; None where all are equal.
    """

    directory: Path
    family: str
    dtype: str
    parameters: int
    ffn_widths: tuple[int, ...]
    padded_to: int | None

    def __str__(self) -> str:
        text = f"{self.directory}: {self.family}, {self.parameters:,} parameters in {self.dtype}"
        if self.padded_to is None:
            return text
        widths = ", ".join(map(str, self.ffn_widths))
        return f"{text}; FFN widths {widths} are zero-padded to {self.padded_to}, which changes no logit"


def expressible(model: DecoderLM, *, unequal: Unequal = "pad") -> str:
    """The transformers family (`model_type`) that computes what `model` does; needs no parameters.

    Args:
        model: a decoder; scanned and unrolled are alike.
        unequal: whether FFN widths that differ between layers are padded with zeros or refused.

    Raises:
        UserError: no family does; the reasons are those of the nearest one.
    """
    return _family_of(model, unequal).model_type


def save(
    model: DecoderLM,
    variables: dict[str, Any],
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    unequal: Unequal = "pad",
) -> Export:
    """Writes `config.json`, safetensors, the tokenizer and a README that transformers' Auto classes load.

    Args:
        model, variables: scanned, fused and structured parameters are made plain; FFNs may be cut narrower
            than the model says (`research.elastic`).
        directory: new, or empty.
        tokenizer: written as `tokenizer.json` and `tokenizer_config.json`.
        dtype: "float32", "float16" or "bfloat16".
        unequal: FFN widths that differ between layers: "pad" fills with zero units up to the largest, which
            leaves the logits as they are; "refuse" raises.

    Raises:
        UserError: the model isn't expressible, parameters don't fit it, or the directory can't be written.
    """
    check_dtype(dtype, tuple(DTYPES))
    if set(variables) != {"params"}:
        raise UserError(f'variables must hold "params" alone to be exported, not {sorted(variables)}')
    family = _family_of(model, unequal)
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the vocabulary of the model {model.vocab_size}"
        )
    model, params = unscan_layers(model, variables["params"])
    attention = layers_of(model)[0].attention
    leaves = dict(flatten(unfuse(params, attention.num_heads, attention.kv_heads)))
    widths = _check_leaves(leaves, model)
    if len(set(widths)) > 1 and unequal == "refuse":
        raise _unequal_error(widths)
    largest = max(widths)
    padded_to = None if len(set(widths)) == 1 else largest
    padded = {path: _padded_shape(path, leaf.shape, largest) for path, leaf in leaves.items()}
    places = {path: stored(path, shape, family) for path, shape in padded.items()}
    sizes = {name: place.tensor_shape(padded[path]) for path, place in places.items() for name in place.names}
    parts: dict[str, list[str]] = {}
    for path, place in sorted(places.items(), key=lambda item: item[1].part):
        for name in place.names:
            parts.setdefault(name, []).append(path)
    parameters = sum(int(np.prod(shape)) for shape in sizes.values())

    @functools.lru_cache(maxsize=2)  # the names of a stack of experts follow each other
    def plain(path: str) -> np.ndarray:
        array = np.asarray(weights.materialize(leaves[path]))
        return np.pad(array, [(0, to - have) for have, to in zip(array.shape, padded[path], strict=True)])

    def make(name: str) -> np.ndarray:
        pieces = [places[path].piece(plain(path), name) for path in parts[name]]
        return cast(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-2), dtype, name)

    directory = Path(directory).expanduser()
    item = np.dtype(DTYPES[dtype]).itemsize
    report = Export(directory, family.model_type, dtype, parameters, widths, padded_to)
    with new_directory(directory, parameters * item) as content:
        write_tensors(content, {name: int(np.prod(shape)) * item for name, shape in sizes.items()}, make)
        config = write_config(family, model, largest) | {"torch_dtype": dtype, "use_cache": True}
        config |= _special_ids(tokenizer)
        if padded_to is not None:
            config["lathe"] = {"unequal_ffn": "zero-padded", "ffn_widths": list(widths)}
        write_json(content / "config.json", config)
        if tokenizer is not None:
            tokenizer.save(content / "tokenizer.json")
            write_json(content / "tokenizer_config.json", _tokenizer_config(tokenizer, model.max_length))
        (content / "README.md").write_text(_readme(report, model), encoding="utf-8")
    return report


def _family_of(model: DecoderLM, unequal: Unequal) -> Family:
    if unequal not in ("pad", "refuse"):
        raise UserError(f"unequal {unequal!r} is not supported; one of pad, refuse")
    if reasons := _foreign_parts(model):
        raise UserError(f"no family of transformers expresses this model: {'; '.join(reasons)}")
    widths = tuple(block.mlp.hidden_dim for block in layers_of(model))
    if len(set(widths)) > 1 and unequal == "refuse":
        raise _unequal_error(widths)
    found = {family.model_type: obstacles(family, model) for family in FAMILIES.values()}
    nearest = min(found, key=lambda name: len(found[name]))
    if found[nearest]:
        raise UserError(
            f"no family of transformers expresses this model; the nearest: {'; '.join(found[nearest])}"
        )
    return FAMILIES[nearest]


def _unequal_error(widths: tuple[int, ...]) -> UserError:
    return UserError(
        f"FFN widths {', '.join(map(str, widths))} differ between layers, and transformers' plain families "
        f'have one; unequal="pad" fills with zeros and keeps the logits. {_GEMMA_3N}'
    )


def _foreign_parts(model: DecoderLM) -> list[str]:
    """Parts that no family has, and settings that differ between layers where every family has one."""
    if type(model) is not DecoderLM:
        return [f"it is a {type(model).__name__}, not a plain DecoderLM"]
    found: list[str] = []
    distinct: dict[str, list[Any]] = {}

    def same(name: str, value: Any) -> None:
        values = distinct.setdefault(name, [])
        if value not in values:
            values.append(value)

    def kind(part: Any, accepted: tuple[type, ...], what: str) -> bool:
        if type(part) in accepted:
            return True
        names = " or ".join(cls.__name__ for cls in accepted)
        reason = f"the {what} is {'absent' if part is None else type(part).__name__}, not {names}"
        if reason not in found:
            found.append(reason)
        return False

    def norm(part: Any, what: str) -> None:
        if kind(part, (RMSNorm,), what):
            same("norm epsilon", part.epsilon)
            same("norm unit_offset", part.unit_offset)

    norm(model.final_norm, "final norm")
    for block in layers_of(model):
        if not kind(block, (Block,), "block"):
            continue
        norm(block.norm, "norm")
        same("post_norms", block.post_norms)
        if kind(block.mlp, (GatedMLP,), "FFN"):
            same("FFN activation", block.mlp.activation)
            same("FFN use_bias", block.mlp.use_bias)
            if block.mlp.activation not in ACTIVATIONS.values():
                found.append(f"the activation {block.mlp.activation} has no name in transformers")
        attention = block.attention
        if not kind(attention, (Attention,), "attention"):
            continue
        kind(attention.kernel, (AutoAttention, DenseAttention, BlockedAttention), "attention kernel")
        for name in ("num_heads", "kv_heads", "head_dim", "scale", "softcap", "use_bias", "output_bias"):
            same(f"attention {name}", getattr(attention, name))
        same(
            "presence of query_norm and key_norm", (attention.query_norm is None, attention.key_norm is None)
        )
        for part in (attention.query_norm, attention.key_norm):
            if part is not None:
                norm(part, "query or key norm")
        if kind(attention.rotary, (Rotary,), "rotary embedding") and attention.rotary.scaling is not None:
            kind(attention.rotary.scaling, (LinearScaling, Llama3Scaling, YarnScaling), "rotary scaling")
        if kind(attention.rule, (Causal, Window), "mask rule") and isinstance(attention.rule, Window):
            same("window size", attention.rule.size)
            same("rotary embedding of windowed layers", attention.rotary)
            if not isinstance(attention.rule.size, int) or attention.rule.sinks:
                found.append("windows have a size per head or sinks")
        elif isinstance(attention.rule, Causal):
            same("rotary embedding of unwindowed layers", attention.rotary)
    found += [
        f"the {name} differs: {some([str(v) for v in values])}"
        for name, values in distinct.items()
        if values[1:]
    ]
    if len(set(distinct.get("presence of query_norm and key_norm", [(True, True)])[0])) > 1:
        found.append("only one of query_norm and key_norm is there")
    return list(dict.fromkeys(found))


def _check_leaves(leaves: dict[str, Any], model: DecoderLM) -> tuple[int, ...]:
    """The FFN width of every layer, from the arrays; all other shapes must be those of the model."""
    expected = shapes(model)
    if differing := sorted(expected.keys() ^ leaves.keys()):
        absent = [path for path in differing if path in expected]
        kind, names = ("missing", absent) if absent else ("unexpected", differing)
        raise UserError(f"the parameters don't fit the model: {kind} {some(names)}")
    widths = tuple(leaves[f"layer_{i}/mlp/down/kernel"].shape[0] for i in range(model.num_layers))
    for path, shape in expected.items():
        if "/mlp/" in path:
            width = widths[int(path.split("/")[0].removeprefix("layer_"))]
            shape = tuple(width if axis == _hidden_axis(path) else size for axis, size in enumerate(shape))
        if tuple(leaves[path].shape) != shape:
            raise UserError(
                f"the parameters don't fit the model: {path} is {list(leaves[path].shape)}, not {list(shape)}"
            )
    return widths


def _hidden_axis(path: str) -> int | None:
    """Which axis of an FFN parameter counts its hidden units; None for the output bias."""
    module, leaf = path.split("/")[-2:]
    if module == "down":
        return 0 if leaf == "kernel" else None
    return 1 if leaf == "kernel" else 0


def _padded_shape(path: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    if "/mlp/" not in path:
        return tuple(shape)
    return tuple(width if axis == _hidden_axis(path) else size for axis, size in enumerate(shape))


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    # Written even where there are none: the families' own defaults name ids of other tokenizers.
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}


def _tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    for role in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{role}_id")
        if token is not None:
            config[f"{role}_token"] = tokenizer.backend.id_to_token(token)
    return config


def _readme(report: Export, model: DecoderLM) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"A decoder language model of the {report.family} family, exported by Lathe: {model.num_layers} "
        f"layers, width {model.width}, {report.parameters:,} parameters in {report.dtype}, context "
        f"{model.max_length}.",
        "",
        "    from transformers import AutoModelForCausalLM",
        '    model = AutoModelForCausalLM.from_pretrained(".")',
        "",
    ]
    if report.padded_to is not None:
        lines += [
            f"FFN widths per layer: {', '.join(map(str, report.ffn_widths))}. This family has one width, so "
            f"narrower layers are filled up to {report.padded_to} with units whose weights are zero; the "
            "logits are those of the unpadded model. The numbers above count the padding.",
            "",
        ]
    return "\n".join(lines)
