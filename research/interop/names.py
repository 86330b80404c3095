"""Names of parameters in safetensors files, and parameter trees as plain arrays under our own paths."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from research.interop.families import Family
from research.nn import weights

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
_THEIR_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def tensor_name(path: str, family: Family) -> str:
    """The name of a parameter in a file: `layer_0/mlp/up/kernel` -> `model.layers.0.mlp.up_proj.weight`."""
    if path in _TOP:
        return _TOP[path]
    layer, module, leaf = _LAYER.fullmatch(path).groups()
    modules = {**_MODULES, **(_GEMMA_NORMS if family.gemma else _NORMS)}
    return f"model.layers.{layer}.{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def is_transposed(path: str) -> bool:
    """Kernels are [in, out] here and [out, in] there."""
    return path.endswith("/kernel")


def layer_count(names: Iterable[str]) -> int:
    """One more than the largest layer in the names of a file."""
    return 1 + max((int(match[1][:9]) for name in names if (match := _THEIR_LAYER.match(name))), default=-1)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with their `/`-joined paths, the inverse of `paths.nested`; a structured weight
    is a leaf."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def unfuse(params: dict[str, Any], heads: int, kv_heads: int) -> dict[str, Any]:
    """Inverse of `research.nn.fuse.fuse_projections` for a model with these numbers of heads."""

    def split(module: dict[str, Any], parts: dict[str, int]) -> dict[str, Any]:
        """The outputs of a fused projection, divided among `parts` in proportion to their numbers."""
        total = sum(parts.values())
        divided: dict[str, Any] = {name: {} for name in parts}
        for leaf, value in module.items():
            array = weights.materialize(value)
            unit = array.shape[-1] // total
            stop = 0
            for name, count in parts.items():
                divided[name][leaf] = array[..., stop * unit : (stop + count) * unit]
                stop += count
        return divided

    plain: dict[str, Any] = {}
    for name, value in params.items():
        if name == "qkv":
            plain |= split(value, {"query": heads, "key": kv_heads, "value": kv_heads})
        elif name == "gate_up":
            plain |= split(value, {"gate": 1, "up": 1})
        else:
            plain[name] = unfuse(value, heads, kv_heads) if isinstance(value, dict) else value
    return plain


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by path; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return {path: leaf.shape for path, leaf in flatten(variables["params"])}
