"""Physical slices of trained models: narrower FFNs, fewer layers. Functions from tree to tree."""

import dataclasses
import re
from collections.abc import Sequence

import flax.linen as nn

from research.errors import UserError
from research.nn import weights
from research.nn.transformer import LayerStack

_LAYER = re.compile(r"layer_(\d+)")


@dataclasses.dataclass(frozen=True)
class ElasticSpec:
    """A submodel: which layers are kept, and the FFN width of every kept layer (Gemma 3n's lab)."""

    keep_layers: tuple[int, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.keep_layers) != len(self.widths):
            raise UserError(
                f"a submodel of {len(self.keep_layers)} kept layers needs as many widths, "
                f"got {len(self.widths)}"
            )
        if list(self.keep_layers) != sorted(set(self.keep_layers)) or not self.keep_layers:
            raise UserError(f"kept layers must rise and not repeat, got {list(self.keep_layers)}")


def nested_widths(hidden_dim: int, divisors: Sequence[int] = (8, 4, 2, 1)) -> tuple[int, ...]:
    """Exponentially spaced widths, smallest first: F/8, F/4, F/2, F."""
    for divisor in divisors:
        if hidden_dim % divisor:
            raise UserError(f"hidden_dim {hidden_dim} does not divide by {divisor}")
    return tuple(hidden_dim // divisor for divisor in divisors)


def slice_mlp(params: dict, width: int) -> dict:
    """The first `width` hidden units of one FFN: columns of up and gate with their biases, rows of down.

    Also takes stacked kernels [layers, in, out]. The output bias is shared by all widths and never sliced. Of a mixture
    of experts every expert is cut; an expert that all tokens share keeps its units, and the router is untouched.
    """
    if "experts" in params:
        return {**params, "experts": slice_mlp(params["experts"], width)}
    if "gate_up" in params:
        raise UserError("this FFN is fused for decoding (gate_up): slice it before `fuse_projections`")
    hidden_dim = params["down"]["kernel"].shape[-2]
    if not 0 < width <= hidden_dim:
        raise UserError(f"width {width} is not between 1 and the {hidden_dim} hidden units of the FFN")
    sliced = dict(params)
    for name in ("gate", "up"):
        if name in params:
            sliced[name] = {"kernel": weights.narrow(params[name]["kernel"], outputs=width)}
            if "bias" in params[name]:
                sliced[name]["bias"] = params[name]["bias"][..., :width]
    sliced["down"] = {**params["down"], "kernel": weights.narrow(params["down"]["kernel"], inputs=width)}
    return sliced


def down_kernel(params: dict) -> weights.Kernel:
    """The kernel [..., hidden, out] of an FFN or of its experts."""
    return params.get("experts", params)["down"]["kernel"]


def mlp_widths(model: LayerStack) -> tuple[int, ...]:
    """The FFN width of every layer of a model, from its configuration."""
    blocks = [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]
    for block in blocks:
        if not hasattr(block.mlp, "hidden_dim"):
            found = "a block without FFN" if block.mlp is None else type(block.mlp).__name__
            raise UserError(f"{found} has no hidden_dim to slice")
    return tuple(block.mlp.hidden_dim for block in blocks)


def slice_params(params: dict, spec: ElasticSpec) -> dict:
    """Parameters of the submodel, in smaller arrays; kept layers are renumbered from 0.

    A scanned tree (`layers/...`) keeps every layer and takes one width for all: convert with
    `unscan_params` for more.
    """
    if "layers" in params:
        count = sum(down_kernel(layer["mlp"]).shape[0] for layer in params["layers"].values())
        if len(set(spec.widths)) > 1 or list(spec.keep_layers) != list(range(count)):
            raise UserError(
                "scanned layers are sliced to one width and all kept; unscan_params the tree first"
            )
        layers = {name: _slice_layer(layer, spec.widths[0]) for name, layer in params["layers"].items()}
        return {**params, "layers": layers}
    count = sum(bool(_LAYER.fullmatch(name)) for name in params)
    if spec.keep_layers[-1] >= count:
        raise UserError(f"layer {spec.keep_layers[-1]} to keep is beyond the model's last, {count - 1}")
    sliced = {name: value for name, value in params.items() if not _LAYER.fullmatch(name)}
    for new, (old, width) in enumerate(zip(spec.keep_layers, spec.widths, strict=True)):
        sliced[f"layer_{new}"] = _slice_layer(params[f"layer_{old}"], width)
    return sliced


def _slice_layer(layer: dict, width: int) -> dict:
    return {**layer, "mlp": slice_mlp(layer["mlp"], width)}


def slice_model(model: LayerStack, spec: ElasticSpec) -> LayerStack:
    """The module that `slice_params` fits: the same pattern of blocks where the widths repeat with it."""
    period = len(model.blocks)
    full = mlp_widths(model)
    for layer, width in zip(spec.keep_layers, spec.widths, strict=True):
        if layer >= model.num_layers:
            raise UserError(f"layer {layer} to keep is beyond the model's last, {model.num_layers - 1}")
        if not 0 < width <= full[layer]:
            raise UserError(f"width {width} of layer {layer} is not between 1 and its {full[layer]} units")
    blocks = tuple(
        _narrow(model.blocks[layer % period], width)
        for layer, width in zip(spec.keep_layers, spec.widths, strict=True)
    )
    whole = list(spec.keep_layers) == list(range(model.num_layers))
    if whole and all(spec.widths[i] == spec.widths[i % period] for i in range(model.num_layers)):
        blocks = blocks[:period]
    elif model.scan_layers:
        raise UserError("a scanned model is sliced to one width and all layers; unscan_layers it first")
    return model.clone(blocks=blocks, num_layers=len(spec.widths))


def _narrow(block: nn.Module, width: int) -> nn.Module:
    return block.clone(mlp=block.mlp.clone(hidden_dim=width))
