"""The experts of all layers as one store, and back: pure functions between parameter trees.

    packed = {the model's parameters, with `experts` empty,
              "store": {"experts": {"up": {"kernel": [R, in, out]}, ...}},        R = L E rows
              "placement": {"rows": int32[L, E], "history": int32[w, L, E]}}

L layers of E experts, in the order of depth. The leaves of `placement` are integers, so no stage ever trains them,
and a checkpoint holds them like parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.moe.layer import MoE
from research.moe.placement.sharding import even_rows
from research.nn.transformer import LayerStack

PyTree = Any

STORE, EXPERTS, PLACEMENT = "store", "experts", "placement"


@dataclass(frozen=True)
class ExpertLayers:
    """Which layers of a stack have their experts in the store.

    indices: their numbers by depth; period: of the pattern of blocks; scanned: whether parameters are stacked.
    """

    indices: tuple[int, ...]
    period: int
    scanned: bool

    @classmethod
    def of(cls, model: LayerStack) -> "ExpertLayers":
        """The layers whose FFN is a `MoE`. Raises `UserError` where there are none, or not all alike."""
        mlps = [getattr(block, "mlp", None) for block in model.blocks]
        mixtures = [isinstance(mlp, MoE) for mlp in mlps]
        period = len(mlps)
        indices = tuple(i for i in range(model.num_layers) if mixtures[i % period])
        if not indices:
            raise UserError(
                "placement: no layer of the model has an FFN that is a mixture of experts (research.moe.layer.MoE)"
            )
        kinds = {(m.num_experts, m.hidden_dim, m.gated, m.use_bias) for m in mlps if isinstance(m, MoE)}
        if len(kinds) > 1:
            raise UserError(
                "placement: the layers have experts of different number or shape; all share one store, so they must "
                "be alike"
            )
        return cls(indices, period, model.scan_layers)

    def read(self, params: PyTree) -> list[PyTree]:
        """The `experts` of each of the layers."""
        found = []
        for index in self.indices:
            node = params
            for name in self._path(index):
                node = node[name]
            repeat = index // self.period
            found.append(jax.tree.map(lambda leaf: leaf[repeat], node) if self.scanned else node)  # noqa: B023
        return found

    def write(self, params: PyTree, layers: Sequence[PyTree]) -> PyTree:
        """`params` with layers[i] as the `experts` of the i-th of the layers."""
        by_path: dict[tuple[str, ...], list[PyTree]] = {}
        for index, layer in zip(self.indices, layers, strict=True):
            by_path.setdefault(self._path(index), []).append(layer)
        for path, values in by_path.items():
            value = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values) if self.scanned else values[0]
            params = _replaced(params, path, value)
        return params

    def names(self) -> list[str]:
        """The path of each layer's FFN in what it reports, by depth whether scanned or not."""
        return [f"layer_{index}/mlp" for index in self.indices]

    def _path(self, index: int) -> tuple[str, ...]:
        if self.scanned:
            return ("layers", f"layer_{index % self.period}", "mlp", EXPERTS)
        return (f"layer_{index}", "mlp", EXPERTS)


def is_packed(params: PyTree) -> bool:
    """Whether the tree is one that `pack` made."""
    return PLACEMENT in params


def pack(params: PyTree, layers: ExpertLayers, window: int) -> PyTree:
    """The packed tree of a model's parameters: experts at their even homes, nothing known of loads."""
    experts = layers.read(params)
    rows = even_rows(len(experts), jax.tree.leaves(experts[0])[0].shape[0])
    # Row e L + l is expert e of layer l, as `even_rows` says.
    store = jax.tree.map(
        lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *experts
    )
    placement = {"rows": jnp.asarray(rows), "history": jnp.zeros((window, *rows.shape), jnp.int32)}
    return {
        **layers.write(params, [{}] * len(experts)),
        STORE: {EXPERTS: store},
        PLACEMENT: placement,
    }


def unpack(packed: PyTree, layers: ExpertLayers) -> PyTree:
    """The model's own parameters."""
    rows, store = packed[PLACEMENT]["rows"], packed[STORE][EXPERTS]
    experts = [jax.tree.map(lambda leaf: leaf[mine], store) for mine in rows]  # noqa: B023
    rest = {name: value for name, value in packed.items() if name not in (STORE, PLACEMENT)}
    return layers.write(rest, experts)


def _replaced(tree: PyTree, path: tuple[str, ...], value: PyTree) -> PyTree:
    name, *rest = path
    return {**tree, name: _replaced(tree[name], tuple(rest), value) if rest else value}
