"""Kernels of experts in the order in which a CPU's product of few rows reads them, for inference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels_pallas.skinny_matmul import pack, panel_columns, unpack
from research.nn.panels import Memory, Panels


class StackedPanels(struct.PyTreeNode):
    """Kernels [E, in, out], each as in `Panels`: panels float32[E, ceil(out / width), in, width].

    A `Weight` that lives while a model is only run: it has no gradient. Rows that are sorted by expert are multiplied
    by `kernels_pallas.grouped_matmul.cpu`, whoever maps over experts meets the product of one.
    """

    panels: jax.Array
    outputs: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.panels.shape[:-3], self.panels.shape[-2], self.outputs)

    @property
    def dtype(self) -> jnp.dtype:
        return self.panels.dtype

    def dot(self, x: jax.Array) -> jax.Array:
        return Panels(self.panels, self.outputs).dot(x)

    def materialize(self) -> jax.Array:
        if self.panels.ndim == 3:
            return unpack(self.panels, self.outputs)
        return jax.vmap(lambda panels: unpack(panels, self.outputs))(self.panels)

    def narrow(self, inputs: int | None, outputs: int | None) -> "StackedPanels":
        outputs = self.outputs if outputs is None else min(outputs, self.outputs)
        count = -(-outputs // self.panels.shape[-1])
        return StackedPanels(self.panels[..., :count, :inputs, :], outputs)


def holds_panels(params: Any) -> bool:
    """Whether a tree has kernels that are `StackedPanels`."""
    found = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, StackedPanels))
    return any(isinstance(leaf, StackedPanels) for leaf in found)


def to_stacked_panels(params: Any) -> Any:
    """Every float32 kernel [E, in, out] below an `experts` of a tree as `StackedPanels`; structured kernels stay.

    Raises `Unsupported` where this processor has no such product.
    """
    return _to_stacked_panels(params, False, Memory())


def _to_stacked_panels(params: Any, of_experts: bool, memory: Memory) -> Any:
    if not isinstance(params, dict):
        return params
    changed = {
        name: _to_stacked_panels(value, of_experts or name == "experts", memory)
        for name, value in params.items()
    }
    kernel = params.get("kernel")
    if of_experts and isinstance(kernel, jax.Array) and kernel.ndim == 3 and kernel.dtype == jnp.float32:
        changed["kernel"] = _stacked(np.asarray(kernel), memory)
    return changed


def _stacked(kernels: np.ndarray, memory: Memory) -> StackedPanels:
    experts, inputs, outputs = kernels.shape
    width = panel_columns()
    panels = memory.take((experts, -(-outputs // width), inputs, width), np.float32)
    for kernel, out in zip(kernels, panels, strict=True):
        pack(kernel, width, out)
    return StackedPanels(jax.device_put(panels), outputs)
