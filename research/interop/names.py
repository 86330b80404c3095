"""Where the parameters are in safetensors files, and parameter trees as plain arrays under our own paths."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.interop import mamba2
from research.interop.families import Family

_TOP = {
    "embedding/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_MODULES = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_NORMS = {"mlp_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_LAYER = re.compile(r"layer_(\d+)/(.+)/(kernel|bias|scale)")
_THEIR_LAYER = re.compile(r"(?:model|backbone)\.layers\.(\d+)\.")
_THEIR_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a parameter is: the tensors of which it is made.

    Args:
        names: one tensor; or one of every expert, which stacked are the parameter [E, ...].
        per_expert: which of the two.
        part: (i, n): the parameter is the i-th of n equal parts of the outputs of the tensor.
        transposed: kernels are [in, out] here and [out, in] there.
        depthwise: of a convolution, [width, channels] here and [channels, 1, width] there.
    """

    names: tuple[str, ...]
    per_expert: bool = False
    part: tuple[int, int] = (0, 1)
    transposed: bool = False
    depthwise: bool = False

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor of a parameter of this shape."""
        shape = shape[1:] if self.per_expert else shape
        if self.depthwise:
            return (shape[1], 1, shape[0])
        if self.transposed:
            shape = (*shape[:-2], shape[-1] * self.part[1], shape[-2])
        return shape

    def assemble(self, tensors: list[np.ndarray]) -> np.ndarray:
        """The parameter made of its tensors."""
        if self.depthwise:
            tensors = [tensor[:, 0].T for tensor in tensors]
        elif self.transposed:
            place, count = self.part
            tensors = [np.split(tensor, count, axis=-2)[place].swapaxes(-1, -2) for tensor in tensors]
        return np.stack(tensors) if self.per_expert else np.ascontiguousarray(tensors[0])

    def piece(self, array: np.ndarray, name: str) -> np.ndarray:
        """What a parameter gives to the tensor of a name, the inverse of `assemble`."""
        array = array[self.names.index(name)] if self.per_expert else array
        if self.depthwise:
            return array.T[:, None]
        return array.swapaxes(-1, -2) if self.transposed else array


def stored(path: str, shape: tuple[int, ...], family: Family) -> Stored:
    """`layer_0/mlp/up/kernel` -> `model.layers.0.mlp.up_proj.weight`, transposed."""
    transposed = path.endswith("/kernel")
    if family.recurrent:
        depthwise = path.endswith("/conv/kernel")
        return Stored((mamba2.tensor_name(path),), transposed=transposed, depthwise=depthwise)
    if path in _TOP:
        return Stored((_TOP[path],), transposed=transposed)
    layer, module, leaf = _LAYER.fullmatch(path).groups()
    prefix = f"model.layers.{layer}."
    if family.experts is not None and module in family.experts.names:
        name, part = family.experts.names[module]
        if "*" not in name:
            return Stored((prefix + name,), part=part, transposed=transposed)
        names = tuple(prefix + name.replace("*", str(expert)) for expert in range(shape[0]))
        return Stored(names, True, part, transposed)
    modules = {**_MODULES, **(_GEMMA_NORMS if family.gemma else _NORMS)}
    return Stored(
        (f"{prefix}{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}",), transposed=transposed
    )


def layer_count(names: Iterable[str]) -> int:
    """One more than the largest layer in the names of a file."""
    return 1 + max((int(match[1][:9]) for name in names if (match := _THEIR_LAYER.match(name))), default=-1)


def expert_count(names: Iterable[str]) -> int:
    """One more than the largest expert in the names of a file, 0 where none has a number."""
    return 1 + max((int(match[1][:9]) for name in names if (match := _THEIR_EXPERT.search(name))), default=-1)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with their `/`-joined paths, the inverse of `paths.nested`; a structured weight
    is a leaf."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by path; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return {path: leaf.shape for path, leaf in flatten(variables["params"])}
