"""Low-rank terms in NormalFloat, as LQ-LoRA stores what it trained (arXiv 2311.12023).

    python -m experiments.compress --workdir=runs/lq_lora --method=factors --output=runs/small

Of a kernel Q + scale A B the factors A [in, r] and B [r, out] are rounded, and Q stays bit for bit as it is. Scales are
doubly quantized: of 8 bits for `group` inputs at most, with a second one in float32 for 256 of them at most; groups and
blocks are the largest that divide a factor. The paper's blocks run on from one output to the next; here they don't, so
that a B of low rank has more scales.
"""

import dataclasses
import math
from typing import ClassVar

import jax

from research.compression.blocks import SELECT, kernels_at, replace, selected
from research.compression.chain import PyTree, Subject
from research.errors import UserError
from research.nn.normal_float import BlockNormal
from research.nn.packed import check_bits
from research.nn.weights import Kernel, LowRank, Sum, Weight

BLOCK = 256  # scales that share a second one


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of every low-rank term among `select` to NormalFloat of `bits`; needs no data."""

    bits: int = 8
    group: int = 64
    select: str = SELECT

    name: ClassVar[str] = "factors"
    needs_data: ClassVar[bool] = False
    needs_compressed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 1:
            raise UserError(f"group={self.group}: a group has at least 1 input")

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        paths = selected(subject.params, self.select)
        found = {}
        for path, kernel in kernels_at(subject.params, paths).items():
            try:
                if (rounded := self.rounded(kernel)) is not kernel:
                    found[path] = rounded
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        if not found:
            raise UserError(
                "factors rounds low-rank terms of floats, and this model has none: it takes a run of LoRA or LQ-LoRA, "
                "or what eora left"
            )
        return replace(subject.params, found), [f"low-rank terms of {len(found)} kernels in {self.bits} bits"]

    def rounded(self, kernel: Kernel) -> Kernel:
        """The kernel with its low-rank terms rounded; the same object where it has none of floats."""
        if isinstance(kernel, Sum):
            terms = tuple(map(self.rounded, kernel.terms))
            return Sum(terms) if any(a is not b for a, b in zip(terms, kernel.terms, strict=True)) else kernel
        if isinstance(kernel, LowRank) and not isinstance(kernel.down, Weight):
            return kernel.replace(down=self._factor(kernel.down), up=self._factor(kernel.up))
        return kernel

    def _factor(self, factor: jax.Array) -> Weight:
        inputs, outputs = factor.shape[-2:]
        group = math.gcd(inputs, self.group)
        block = math.gcd(inputs // group * outputs, BLOCK)
        return _quantize(BlockNormal(self.bits, group=group, block=block), factor)


_quantize = jax.jit(lambda quantizer, factor: quantizer(factor), static_argnums=0)
