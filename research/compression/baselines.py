"""What methods of uniform grids are compared with: rounding to the nearest, and GPTQ (arXiv 2210.17323).

A grid has 2^bits values in each group of `group` inputs of an output (None: all inputs). It spans the range of the
group, or the part of it that has the least squared error of the weights, of `clips` parts tried: 1, ... 0.2.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.compression.blocks import SELECT, Notes, Walk, check_array, kernels_at, quantize_arrays, replace
from research.compression.chain import PyTree, Subject
from research.compression.rounding import Affine, Uniform, feed_back
from research.errors import UserError
from research.nn.packed import check_bits
from research.nn.quantized import Quantized, quantize
from research.nn.weights import Kernel
from research.training.observe import Gram


def clip_parts(count: int) -> tuple[float, ...]:
    """`count` parts of a range, from all of it down to a fifth: 1 - 0.8 i / count."""
    if count < 1:
        raise UserError(f"clips={count}: at least 1, the whole range")
    return tuple(1.0 - 0.8 * i / count for i in range(count))


@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest value of its grid; needs no data.

    symmetric: no zeros are stored. scale_dtype: what scales are stored in; weights are rounded to the stored grid.
    """

    bits: int = 4
    group: int | None = None
    symmetric: bool = False
    clips: int = 1
    scale_dtype: str = "float16"
    select: str = SELECT

    name: ClassVar[str] = "round_to_nearest"
    needs_data: ClassVar[bool] = False
    needs_compressed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        clip_parts(self.clips)

    def quantize(self, kernel: jax.Array) -> Quantized:
        """A kernel [..., in, out] -> the same, packed."""
        return _quantize(kernel, self.bits, self.group, self.symmetric, self.clips, self.scale_dtype)

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        return quantize_arrays(self.name, subject.params, self.quantize, self.select), []


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Rounding with the error fed back, block by block: a block's Gram matrices are those of its original weights
    behind the compressed blocks before it.

    damp: see `feed_back`. order: inputs of the largest second moment first. Others as `RoundToNearest`.
    """

    bits: int = 4
    group: int | None = None
    symmetric: bool = False
    clips: int = 1
    damp: float = 0.01
    order: bool = True
    scale_dtype: str = "float16"
    select: str = SELECT

    name: ClassVar[str] = "gptq"
    needs_data: ClassVar[bool] = True
    needs_compressed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        clip_parts(self.clips)

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        walk, notes = Walk(subject.model, subject.params, subject.batches, self.select), Notes()
        params = dict(subject.params)
        for _ in range(walk.layers):
            subject.tell(f"{self.name}: block {walk.index + 1} of {walk.layers}")
            name, block = walk.name, params[walk.name]
            paths = walk.paths(block)
            grams = walk.grams(block, paths)
            notes.unseen(name, grams)
            kernels = {
                path: self._round(f"{name}/{path}", kernel, grams[path], notes)
                for path, kernel in kernels_at(block, paths).items()
            }
            params[name] = replace(block, kernels)
            walk.advance(params[name])
        return params, notes.lines()

    def _round(self, path: str, kernel: Kernel, gram: Gram, notes: Notes) -> Quantized:
        check_array(self.name, path, kernel)
        try:
            start = _quantize(kernel, self.bits, self.group, self.symmetric, self.clips, self.scale_dtype)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        scale = start.scale.astype(jnp.float32)
        middle = jnp.full_like(scale, 2 ** (self.bits - 1))
        fitted = Affine(scale, middle if start.zero is None else start.zero.astype(jnp.float32))
        grid = Uniform(self.bits, self.symmetric)
        options = dict(group=start.group, fitted=fitted, damp=self.damp, order=self.order)
        rounded = feed_back(kernel.astype(jnp.float32), jnp.asarray(gram.total), grid, **options)
        if failed := int(np.sum(rounded.nearest)):
            notes.add(f"the Gram matrix of {failed} could not be factored: rounded to nearest", path)
        return Quantized.from_codes(rounded.codes.astype(jnp.uint8), start.scale, start.zero, self.bits)


def _quantize(
    kernel: jax.Array, bits: int, group: int | None, symmetric: bool, clips: int, scale_dtype: str
) -> Quantized:
    return _programs(kernel, bits, group, symmetric, clip_parts(clips), scale_dtype)


_programs = jax.jit(
    lambda kernel, bits, group, symmetric, clips, scale_dtype: quantize(
        kernel, bits, group, symmetric, clips=clips, scale_dtype=scale_dtype
    ),
    static_argnums=(1, 2, 3, 4, 5),
)
