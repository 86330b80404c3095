"""Ternary kernels in less than one bit a weight: words of a dictionary that is the same for all (arXiv 2310.16795).

Each output of a kernel has three values, 0 and the two ends of its row, and its symbols are coded by
`kernels_pallas.qmoe_decode.dictionary`. What is stored, for E experts of `out` outputs:

    codes uint16[E, n]       as many as the longest expert takes, padding behind the others
    offsets int32[E, out+1]  where an output's words begin
    ends bfloat16[E, out, 2]

and, once for a whole model, the dictionary of 512 KiB, which is computed when it is needed and whose fingerprint is
saved with every kernel.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels_pallas.qmoe_decode import Unsupported, qmoe_matmul
from kernels_pallas.qmoe_decode.coded import Coded, dense
from kernels_pallas.qmoe_decode.dictionary import encode, fingerprint
from research.errors import UserError
from research.nn.weights import Spec, array_bits, dot


@dataclasses.dataclass(frozen=True)
class PallasDecode:
    """The product by the Pallas kernel, which decodes in the tile.

    implementation: "auto" takes the kernel of the backend. interpret: run it in Pallas' interpreter, anywhere, slowly.
    Raises `UserError`, when called, where the kernel cannot run; nothing else is run instead.
    """

    implementation: Literal["auto", "tpu", "gpu"] = "auto"
    interpret: bool = False

    def __call__(self, x: jax.Array, kernel: "TernaryCode") -> jax.Array:
        if kernel.codes.ndim != 1:
            raise UserError(f"kernel={self} multiplies a single matrix, not a stack of shape {kernel.shape}")
        try:
            implementation = None if self.implementation == "auto" else self.implementation
            return qmoe_matmul(x, kernel.coded(), implementation=implementation, interpret=self.interpret)
        except Unsupported as error:
            raise UserError(f"kernel={self} cannot run: {error}; kernel=None runs everywhere") from error


class TernaryCode(struct.PyTreeNode):
    """A kernel [..., in, out] of coded ternary values; leading axes are experts, or scanned layers.

    codes uint16[..., n], offsets int32[..., out + 1], ends floating [..., out, 2]: as `Coded` has them. inputs: of the
    kernel. dictionary: fingerprint of what it is coded by. kernel: what multiplies; None is XLA, which decodes the
    whole kernel once a call. It is not saved.
    """

    codes: jax.Array
    offsets: jax.Array
    ends: jax.Array
    inputs: int = struct.field(pytree_node=False)
    dictionary: str = struct.field(pytree_node=False)
    kernel: PallasDecode | None = struct.field(pytree_node=False, default=None, metadata={"saved": False})

    @classmethod
    def from_symbols(cls, symbols: np.ndarray, ends: jax.Array) -> "TernaryCode":
        """Symbols 0 (zero), 1 (low), 2 (high) [..., in, out] and ends [..., out, 2] -> the kernel, on the host."""
        symbols = np.asarray(symbols, np.uint8)
        inputs, outputs = symbols.shape[-2:]
        coded = [encode(np.ascontiguousarray(part.T)) for part in symbols.reshape(-1, inputs, outputs)]
        longest = max(len(codes) for codes, _ in coded)
        codes = np.stack([np.pad(codes, (0, longest - len(codes))) for codes, _ in coded])
        lead = symbols.shape[:-2]
        offsets = np.stack([offsets for _, offsets in coded]).reshape(*lead, -1)
        return cls(jnp.asarray(codes.reshape(*lead, -1)), jnp.asarray(offsets), ends, inputs, fingerprint())

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.ends.shape[:-2], self.inputs, self.ends.shape[-2])

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape) + self.ends.size

    def check(self) -> None:
        """Raise `UserError` unless the parts belong together and the dictionary is this one."""
        lead, outputs = self.ends.shape[:-2], self.ends.shape[-2] if self.ends.ndim > 1 else 0
        fits = self.ends.shape[-1] == 2 and self.offsets.shape == (*lead, outputs + 1)
        if not fits or self.codes.shape[:-1] != lead or self.codes.dtype != jnp.uint16 or outputs < 1:
            raise UserError(
                f"codes {self.codes.shape}, offsets {self.offsets.shape} and ends {self.ends.shape} are no coded kernel"
            )
        if type(self.inputs) is not int or self.inputs < 1:
            raise UserError(f"inputs={self.inputs}: a kernel has at least 1")
        if self.dictionary != fingerprint():
            raise UserError(
                f"the kernel was coded by another dictionary, {self.dictionary}; this one is {fingerprint()}"
            )

    def coded(self) -> Coded:
        """As the kernel takes it, [out, in]."""
        return Coded(self.codes, self.offsets, self.ends, self.inputs)

    def dot(self, x: jax.Array) -> jax.Array:
        if self.kernel is not None:
            return self.kernel(x, self)
        return _dot(x, self)

    def materialize(self) -> jax.Array:
        decode = lambda kernel: dense(kernel.coded()).T  # noqa: E731
        for _ in range(self.codes.ndim - 1):
            decode = jax.vmap(decode)
        return decode(self)

    def narrow(self, inputs: int | None, outputs: int | None) -> "TernaryCode":
        if inputs in (None, self.shape[-2]) and outputs in (None, self.shape[-1]):
            return self
        raise UserError(
            f"a coded kernel {self.shape} is not cut to {inputs or 'all'} inputs and {outputs or 'all'} outputs: words "
            "lie across the cut; slice first, compress afterwards"
        )

    def stored_bits(self) -> int:
        """Of the arrays; the dictionary, one for all kernels, is not in it."""
        return sum(array_bits(part) for part in (self.codes, self.offsets, self.ends))

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        # Words are not divided; experts are.
        lead = (None,) * (self.codes.ndim - 1) if len(spec) < 3 else tuple(spec[:-2])
        return [(*lead, None), (*lead, None), (*lead, None, None)]


@jax.checkpoint  # for its gradient the words are read again, and not a float copy kept
def _dot(x: jax.Array, kernel: TernaryCode) -> jax.Array:
    return dot(x, kernel.materialize())


def dictionary_bits(tree: Any) -> int:
    """Bits of the dictionary, once, where a tree has a kernel that it codes; else 0."""
    from kernels_pallas.qmoe_decode.dictionary import BITS

    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, TernaryCode))
    return BITS if any(isinstance(node, TernaryCode) for node in nodes) else 0
