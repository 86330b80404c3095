"""Kernels in the order in which a CPU's product of few rows reads them, for decoding.

Reading weights bounds decoding. `kernels_pallas.skinny_matmul` reads them at the speed of memory for one row and for
eight alike, where XLA's libraries take up to four times as long for eight rows as for one. Kernels of 8 and 4 bits are
read as they are, and become floats in registers.
"""

import contextlib
import math
import mmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels_pallas.skinny_matmul import (
    dequantize,
    pack,
    pack_codes,
    pack_grid,
    panel_columns,
    skinny_code_matmul,
    skinny_matmul,
    unpack,
)
from research.errors import UserError
from research.nn.packed import cut_groups
from research.nn.quantized import Quantized

_LARGE = 1 << 14  # elements; a smaller product takes as long as the call
_LINE = 64  # bytes of a cache line
_BLOCK = 1 << 25  # bytes of a block of memory


class Panels(struct.PyTreeNode):
    """A kernel [in, out] as blocks of columns: panels float32[ceil(out / width), in, width].

    A `Weight` that lives while a model decodes.
    """

    panels: jax.Array
    outputs: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.panels.shape[1], self.outputs)

    @property
    def dtype(self) -> jnp.dtype:
        return self.panels.dtype

    def dot(self, x: jax.Array) -> jax.Array:
        return skinny_matmul(x.astype(jnp.float32), self.panels, self.outputs).astype(x.dtype)

    def materialize(self) -> jax.Array:
        return unpack(self.panels, self.outputs)

    def narrow(self, inputs: int | None, outputs: int | None) -> "Panels":
        outputs = self.outputs if outputs is None else min(outputs, self.outputs)
        count = -(-outputs // self.panels.shape[2])
        return Panels(self.panels[:count, :inputs], outputs)


class CodePanels(struct.PyTreeNode):
    """A kernel [in, out] of 8 or 4 bits as blocks of columns: the same numbers as the `Quantized` one.

    codes: uint8[ceil(out / width), in * bits / 8, width]. grid: float32[ceil(out / width), groups, 2, width] of scales
    and zeros. A `Weight` that lives while a model decodes.
    """

    codes: jax.Array
    grid: jax.Array
    bits: int = struct.field(pytree_node=False)
    outputs: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.codes.shape[1] * 8 // self.bits, self.outputs)

    @property
    def dtype(self) -> jnp.dtype:
        return self.grid.dtype

    def dot(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return skinny_code_matmul(wide, self.codes, self.grid, self.bits, self.outputs).astype(x.dtype)

    def materialize(self) -> jax.Array:
        return dequantize(self.codes, self.grid, self.bits, self.outputs)

    def narrow(self, inputs: int | None, outputs: int | None) -> "CodePanels":
        outputs = self.outputs if outputs is None else min(outputs, self.outputs)
        count = -(-outputs // self.codes.shape[2])
        inputs = self.shape[0] if inputs is None else inputs
        groups = cut_groups(self.shape[0], self.grid.shape[1], inputs)
        if inputs * self.bits % 8:
            raise UserError(
                f"a slice of {inputs} inputs cuts a byte of {self.bits} bits: take a multiple of 2"
            )
        codes = self.codes[:count, : inputs * self.bits // 8]
        return self.replace(codes=codes, grid=self.grid[:count, :groups], outputs=outputs)


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


def holds_stacked_panels(params: Any) -> bool:
    """Whether a tree has kernels that are `StackedPanels`."""
    found = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, StackedPanels))
    return any(isinstance(leaf, StackedPanels) for leaf in found)


def to_panels(params: Any) -> Any:
    """Every large float32 kernel of a tree as `Panels`, and an embedding table that is the head too has them beside it;
    every large `Quantized` one of 8 or 4 bits that XLA multiplies as `CodePanels`; every float32 kernel [E, in, out]
    below an `experts` as `StackedPanels`.

    Other structured kernels, other stacked and small ones and the taps of convolutions stay as they are.

    Raises `Unsupported` where this processor has no such product.
    """
    return _to_panels(params, False, Memory())


def _to_panels(params: Any, of_experts: bool, memory: "Memory") -> Any:
    if not isinstance(params, dict):
        return params
    changed = {
        name: value if name == "conv" else _to_panels(value, of_experts or name == "experts", memory)
        for name, value in params.items()
    }
    kernel = params.get("kernel")
    if _is_large(kernel):
        changed["kernel"] = _panels(np.asarray(kernel), memory)
    elif _has_codes(kernel):
        changed["kernel"] = _code_panels(kernel, memory)
    elif of_experts and isinstance(kernel, jax.Array) and kernel.ndim == 3 and kernel.dtype == jnp.float32:
        changed["kernel"] = _stacked_panels(np.asarray(kernel), memory)
    table = params["embedding"].get("table") if isinstance(params.get("embedding"), dict) else None
    if "head" not in params and _is_large(table):
        changed["embedding"]["head"] = _panels(np.asarray(table).T, memory)
    return changed


def _is_large(kernel: Any) -> bool:
    return isinstance(kernel, jax.Array) and kernel.dtype == jnp.float32 and _pays(kernel.shape)


def _has_codes(kernel: Any) -> bool:
    """Whether it is a large kernel of codes that can lie in panels: no group divides a byte."""
    if not isinstance(kernel, Quantized) or kernel.bits not in (4, 8) or kernel.kernel is not None:
        return False
    return _pays(kernel.shape) and kernel.group * kernel.bits % 8 == 0


def _pays(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and math.prod(shape) >= _LARGE and shape[1] >= panel_columns()


def _panels(kernel: np.ndarray, memory: "Memory") -> Panels:
    inputs, outputs = kernel.shape
    width = panel_columns()
    packed = pack(kernel, width, memory.take((-(-outputs // width), inputs, width), np.float32))
    return Panels(jax.device_put(packed), outputs)  # the same memory, as it is aligned


def _code_panels(kernel: Quantized, memory: "Memory") -> CodePanels:
    bits, (inputs, outputs), groups = kernel.bits, kernel.shape, kernel.scale.shape[0]
    width = panel_columns()
    count = -(-outputs // width)
    codes = memory.take((count, inputs * bits // 8, width), np.uint8)
    grid = memory.take((count, groups, 2, width), np.float32)
    scale = np.asarray(kernel.scale, np.float32)
    zero = (
        np.full_like(scale, 2 ** (bits - 1)) if kernel.zero is None else np.asarray(kernel.zero, np.float32)
    )
    pack_codes(np.asarray(kernel.unpacked()), bits, width, codes)
    pack_grid(scale, zero, width, grid)
    return CodePanels(jax.device_put(codes), jax.device_put(grid), bits, outputs)


def _stacked_panels(kernels: np.ndarray, memory: "Memory") -> StackedPanels:
    experts, inputs, outputs = kernels.shape
    width = panel_columns()
    panels = memory.take((experts, -(-outputs // width), inputs, width), np.float32)
    for kernel, out in zip(kernels, panels, strict=True):
        pack(kernel, width, out)
    return StackedPanels(jax.device_put(panels), outputs)


class Memory:
    """Arrays beside each other in large blocks that the system is asked to back with large pages: kernels were read
    1.3 to 1.4 times as fast from these as from pages of 4 KiB."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """An array that begins a cache line."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        taken = -(-size // _LINE) * _LINE
        if taken > len(self._free):
            # Not malloc's, which hands out pages that are in use already.
            block = mmap.mmap(-1, max(taken, _BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(AttributeError, OSError):  # a system without large pages
                block.madvise(mmap.MADV_HUGEPAGE)
            self._free = np.frombuffer(block, np.uint8)
        array, self._free = self._free[:size].view(dtype).reshape(shape), self._free[taken:]
        return array
