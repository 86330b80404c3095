"""A decoder as a directory that transformers loads: which family expresses it, and writing it."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.interop import mamba2
from research.interop.experts import foreign_experts
from research.interop.families import ACTIVATIONS, FAMILIES, Family
from research.interop.files import DTYPES, cast, check_dtype, new_directory, some, write_json, write_tensors
from research.interop.members import candidates, layers_of, obstacles, write_config
from research.interop.names import flatten, shapes, stored
from research.language.decoder import DecoderLM
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.nn import weights
from research.nn.attention import Attention
from research.nn.attention_kernels import AutoAttention, BlockedAttention, DenseAttention, SpanAttention
from research.nn.fuse import unfuse
from research.nn.masks import Causal, Window
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import LinearScaling, Llama3Scaling, Rotary, YarnScaling
from research.nn.transformer import Block, unscan_layers
from research.paths import expand

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
        ffn_widths: hidden units of every layer of the model, of each expert where a layer has experts.
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
    if not family.recurrent:
        attention = layers_of(model)[0].attention
        params = unfuse(params, attention.num_heads, attention.kv_heads)
    leaves = dict(flatten(params))
    by_ffn = _check_leaves(leaves, model)
    largest = {kind: max(found) for kind, found in _by_kind(by_ffn).items()}
    widths = tuple(width for ffn, width in by_ffn.items() if _kind(ffn) != "shared")
    padded_to = _padded_to(by_ffn, unequal)
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

    directory = expand(directory)
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
    if mamba2.is_mamba2(model):
        if reasons := mamba2.obstacles(model):
            raise UserError(
                f"no family of transformers expresses this model; the nearest: {'; '.join(reasons)}"
            )
        return FAMILIES["mamba2"]
    if reasons := _foreign_parts(model):
        raise UserError(f"no family of transformers expresses this model: {'; '.join(reasons)}")
    blocks = layers_of(model)
    kinds = {type(block.mlp) for block in blocks}
    for kind in kinds:
        widths = tuple(block.mlp.hidden_dim for block in blocks if type(block.mlp) is kind)
        if len(set(widths)) > 1 and (unequal == "refuse" or len(kinds) > 1):
            raise _unequal_error(widths) if len(kinds) == 1 else _unequal_kinds(widths)
    found = {family.model_type: (family, obstacles(family, model)) for family in candidates(model)}
    family, reasons = min(found.values(), key=lambda pair: len(pair[1]))
    if reasons:
        raise UserError(f"no family of transformers expresses this model; the nearest: {'; '.join(reasons)}")
    return family


def _unequal_error(widths: tuple[int, ...]) -> UserError:
    return UserError(
        f"FFN widths {', '.join(map(str, widths))} differ between layers, and transformers' plain families "
        f'have one; unequal="pad" fills with zeros and keeps the logits. {_GEMMA_3N}'
    )


def _unequal_kinds(widths: tuple[int, ...]) -> UserError:
    return UserError(
        f"FFN widths {', '.join(map(str, widths))} differ between layers of a model of dense and sparse layers; such a "
        "model is exported with one width for its dense layers and one for its experts"
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

    jetmoe = any(isinstance(block.attention, MixtureOfAttention) for block in layers_of(model))
    if (
        kind(model.final_norm, (RMSNorm,), "final norm") and not jetmoe
    ):  # whose last norm may have its own epsilon
        norm(model.final_norm, "final norm")
    for block in layers_of(model):
        if not kind(block, (Block,), "block"):
            continue
        norm(block.norm, "norm")
        same("post_norms", block.post_norms)
        if kind(block.mlp, (GatedMLP, MoE), "FFN"):
            same("FFN activation", block.mlp.activation)
            same("FFN use_bias", block.mlp.use_bias)
            if block.mlp.activation not in ACTIVATIONS.values():
                found.append(f"the activation {block.mlp.activation} has no name in transformers")
        if isinstance(block.mlp, MoE):
            found += [
                f"{what}, and families have {instead}" for what, instead in foreign_experts(block.mlp).items()
            ]
            for name in ("num_experts", "k", "norm", "output_bias"):
                same(f"MoE {name}", getattr(block.mlp, name))
            same("presence of a shared expert", block.mlp.shared is not None)
        attention = block.attention
        if not kind(attention, (Attention, MixtureOfAttention), "attention"):
            continue
        kind(
            attention.kernel,
            (AutoAttention, DenseAttention, BlockedAttention, SpanAttention),
            "attention kernel",
        )
        names = ("num_heads", "kv_heads", "head_dim", "scale", "output_bias")
        if isinstance(attention, MixtureOfAttention):
            names += ("num_experts", "k", "norm")
            if attention.capacity_factor is not None:
                found.append("attention experts have a capacity, and families drop nothing")
        else:
            names += ("softcap", "use_bias")
            same(
                "presence of query_norm and key_norm",
                (attention.query_norm is None, attention.key_norm is None),
            )
            for part in (attention.query_norm, attention.key_norm):
                if part is not None:
                    norm(part, "query or key norm")
                    same("query and key norm axes", part.axes)
        for name in names:
            same(f"attention {name}", getattr(attention, name))
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


_FFN = re.compile(r"(layer_\d+/mlp(?:/experts|/shared)?)/(?:gate|up|down)/(?:kernel|bias)")


def _ffn(path: str) -> str | None:
    """The FFN that a parameter is of, `layer_0/mlp/experts` for those of experts; None if it has no hidden units."""
    match = _FFN.fullmatch(path)
    return match and match[1]


def _kind(ffn: str) -> str:
    """mlp, experts or shared."""
    return ffn.rsplit("/", 1)[1]


def _by_kind(by_ffn: dict[str, int]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for ffn, width in by_ffn.items():
        kinds.setdefault(_kind(ffn), []).append(width)
    return kinds


def _padded_to(by_ffn: dict[str, int], unequal: Unequal) -> int | None:
    """The width that narrower FFNs are filled up to; None where all are equal."""
    by_kind = _by_kind(by_ffn)
    uneven = {kind: widths for kind, widths in by_kind.items() if len(set(widths)) > 1}
    if uneven and {"mlp", "experts"} <= by_kind.keys():
        raise _unequal_kinds(tuple(next(iter(uneven.values()))))
    if uneven and unequal == "refuse":
        raise _unequal_error(tuple(next(iter(uneven.values()))))
    return max(by_kind["experts" if "experts" in by_kind else "mlp"]) if uneven else None


def _check_leaves(leaves: dict[str, Any], model: DecoderLM) -> dict[str, int]:
    """The width of every FFN, from the arrays; all other shapes must be those of the model."""
    expected = shapes(model)
    if differing := sorted(expected.keys() ^ leaves.keys()):
        absent = [path for path in differing if path in expected]
        kind, names = ("missing", absent) if absent else ("unexpected", differing)
        raise UserError(f"the parameters don't fit the model: {kind} {some(names)}")
    by_layer = sorted(expected, key=lambda path: [int(part) for part in re.findall(r"layer_(\d+)", path)])
    ffns = dict.fromkeys(ffn for path in by_layer if (ffn := _ffn(path)) is not None)
    widths = {ffn: leaves[f"{ffn}/down/kernel"].shape[-2] for ffn in ffns}
    for path, shape in expected.items():
        shape = _with_width(path, shape, widths.get(_ffn(path), 0))
        if tuple(leaves[path].shape) != shape:
            raise UserError(
                f"the parameters don't fit the model: {path} is {list(leaves[path].shape)}, not {list(shape)}"
            )
    return widths


def _with_width(path: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The shape of a parameter in an FFN of `width` hidden units; that of any other as it is."""
    if _ffn(path) is None or path.endswith("down/bias"):
        return tuple(shape)
    axis = len(shape) - (2 if path.endswith("down/kernel") else 1)
    return tuple(width if i == axis else size for i, size in enumerate(shape))


def _padded_shape(path: str, shape: tuple[int, ...], largest: dict[str, int]) -> tuple[int, ...]:
    ffn = _ffn(path)
    return tuple(shape) if ffn is None else _with_width(path, shape, largest[_kind(ffn)])


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
