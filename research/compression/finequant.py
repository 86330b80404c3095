"""FineQuant: weights alone say how fine their groups must be (arXiv 2308.09723).

A symmetric grid for each group of g inputs of an output, s = max |w| / (2^(b-1) - 1), which takes b + 16 / g bits a
weight. Few weights are large, and each stretches the grid of its group: where halving the groups makes ranges much
smaller, outliers dominate, and smaller groups keep them apart from the rest. So for each matrix, from g = all inputs,

    r(g) = mean over groups and outputs of max |w|       while r(g / 2) < alpha r(g) and g / 2 >= smallest:  g <- g / 2

Experts are judged one by one: of a stack's mean the outliers of one among many would be lost. Their stack, whose scales
are one array, has the finest groups that any of them asks for. No data, no training; inputs of a product stay floating.
The paper says that granularity is found for each matrix from its weights; this rule, and alpha, are a reconstruction.
"""

import dataclasses
from collections import Counter
from typing import ClassVar

import jax
import numpy as np

from research.compression.blocks import SELECT, quantize_arrays
from research.compression.chain import PyTree, Subject
from research.errors import UserError
from research.nn.packed import check_bits
from research.nn.quantized import Quantized, quantize


@dataclasses.dataclass(frozen=True)
class FineQuant:
    """Round to nearest in groups whose size each matrix has by itself.

    smallest: inputs of a group at least. alpha: ranges that shrink below this part of themselves when groups are halved
    tell of outliers; 0 never halves, which is quantization per channel. scale_dtype: what scales are stored in.
    """

    bits: int = 4
    smallest: int = 64
    alpha: float = 0.87
    scale_dtype: str = "float16"
    select: str = SELECT

    name: ClassVar[str] = "finequant"
    needs_data: ClassVar[bool] = False
    needs_compressed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.smallest < 1:
            raise UserError(f"smallest={self.smallest}: a group has at least 1 input")
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"alpha={self.alpha}: from 0, which never halves a group, to 1, which always does"
            )

    def group(self, kernel: np.ndarray) -> int:
        """Inputs of a group of a kernel [in, out]; of a stack [..., in, out] the least of its matrices."""
        if kernel.ndim > 2:
            return min(map(self.group, kernel))
        group = kernel.shape[0]
        while group % 2 == 0 and group // 2 >= self.smallest:
            if not mean_range(kernel, group // 2) < self.alpha * mean_range(kernel, group):
                break
            group //= 2
        return group

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        chosen: Counter[str] = Counter()

        def quantizer(kernel: jax.Array) -> Quantized:
            group = self.group(np.asarray(kernel))
            chosen[f"{group} of {kernel.shape[-2]} inputs"] += 1
            return _quantize(kernel, self.bits, group, self.scale_dtype)

        params = quantize_arrays(self.name, subject.params, quantizer, self.select)
        return params, [
            f"groups: {', '.join(f'{what} in {count}' for what, count in sorted(chosen.items()))} kernels"
        ]


def mean_range(kernel: np.ndarray, group: int) -> float:
    """r(g): the mean over groups of `group` inputs and outputs of a kernel [in, out] of the largest magnitude."""
    magnitude = np.abs(np.asarray(kernel, np.float32)).reshape(-1, group, kernel.shape[1])
    return float(magnitude.max(axis=1).mean(dtype=np.float64))


_quantize = jax.jit(
    lambda kernel, bits, group, scale_dtype: quantize(kernel, bits, group, scale_dtype=scale_dtype),
    static_argnums=(1, 2, 3),
)
