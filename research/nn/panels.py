"""Kernels in the order in which a CPU's product of few rows reads them, for decoding.

Reading weights bounds decoding. `kernels_pallas.skinny_matmul` reads them at the speed of memory for one row and for
eight alike, where XLA's libraries take up to four times as long for eight rows as for one.
"""

import contextlib
import math
import mmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels_pallas.skinny_matmul import pack, panel_columns, skinny_matmul, unpack

_LARGE = 1 << 14  # elements; a smaller product takes as long as the call
_LINE = 16  # floats of a cache line
_BLOCK = 1 << 23  # floats of a block of memory


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


def to_panels(params: Any) -> Any:
    """Every large float32 kernel of a tree as `Panels`, and an embedding table that is the head too has them beside it.

    Structured and stacked kernels, small ones and the taps of convolutions stay as they are.

    Raises `Unsupported` where this processor has no such product.
    """
    return _to_panels(params, _Memory())


def _to_panels(params: Any, memory: "_Memory") -> Any:
    if not isinstance(params, dict):
        return params
    changed = {name: value if name == "conv" else _to_panels(value, memory) for name, value in params.items()}
    if _is_large(params.get("kernel")):
        changed["kernel"] = _panels(np.asarray(params["kernel"]), memory)
    table = params["embedding"].get("table") if isinstance(params.get("embedding"), dict) else None
    if "head" not in params and _is_large(table):
        changed["embedding"]["head"] = _panels(np.asarray(table).T, memory)
    return changed


def _is_large(kernel: Any) -> bool:
    if not isinstance(kernel, jax.Array) or kernel.ndim != 2 or kernel.dtype != jnp.float32:
        return False
    return kernel.size >= _LARGE and kernel.shape[1] >= panel_columns()


def _panels(kernel: np.ndarray, memory: "_Memory") -> Panels:
    inputs, outputs = kernel.shape
    width = panel_columns()
    packed = pack(kernel, width, memory.take((-(-outputs // width), inputs, width)))
    return Panels(jax.device_put(packed), outputs)  # the same memory, as it is aligned


class _Memory:
    """Arrays beside each other in large blocks that the system is asked to back with large pages: kernels were read
    1.3 to 1.4 times as fast from these as from pages of 4 KiB."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.float32)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of floats that begins a cache line."""
        size = -(-math.prod(shape) // _LINE) * _LINE
        if size > len(self._free):
            # Not malloc's, which hands out pages that are in use already.
            block = mmap.mmap(-1, 4 * max(size, _BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(AttributeError, OSError):  # a system without large pages
                block.madvise(mmap.MADV_HUGEPAGE)
            self._free = np.frombuffer(block, np.float32)
        array, self._free = self._free[: math.prod(shape)].reshape(shape), self._free[size:]
        return array
