"""NormalFloat: kernels of 2, 3, 4 or 8 bits on the quantiles of a normal distribution, after QLoRA (arXiv:2305.14314).

    kernel[k, n] = book[code[k, n]] * scale[k // group, n]

The book reaches from -1 to 1 and has an exact 0; a scale is the largest magnitude of its group. Scales themselves may
be quantized (double quantization): int8 differences from their mean, with a scale a block of them (`ByteScales`), or
LQ-LoRA's codes of few bits above their least (`PackedScales`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.common import target_platform
from kernels_pallas.quantized_matmul.packing import unpack_codes
from research.errors import UserError
from research.nn import packed
from research.nn.quantized import check_groups
from research.nn.weights import Spec, array_bits, dot

BITS = packed.BITS


@functools.lru_cache
def code_book(bits: int, last: float | None = None) -> tuple[float, ...]:
    """The 2**bits values of NormalFloat, ascending from -1 to 1: 2**(bits - 1) positive, one 0, the rest negative.

    Quantiles are evenly spaced from 1/2 to `last`, by default 1 - (1 / 2**(bits + 1) + 1 / (2**(bits + 1) - 2)) / 2.
    """
    if bits not in BITS:
        raise UserError(f"NormalFloat of {bits} bits is not supported: there are {', '.join(map(str, BITS))}")
    half = 2 ** (bits - 1)
    if last is None:
        last = 1.0 - (1.0 / 2 ** (bits + 1) + 1.0 / (2 ** (bits + 1) - 2)) / 2.0
    if not 0.5 < last < 1.0:
        raise UserError(f"the outermost quantile is {last}: a number between 1/2 and 1 is expected")

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(0.5 + (last - 0.5) * i / count) for i in range(1, count + 1)]

    values = [*(-q for q in reversed(quantiles(half - 1))), 0.0, *quantiles(half)]
    return tuple(value / values[-1] for value in values)


def _decode(codes: jax.Array, book: tuple[float, ...]) -> jax.Array:
    """Codes uint8 -> the book's values, float32: a tree of choices, one level a bit, since gathers are no vectors on a
    CPU; of 8 bits the tree would be the slower."""
    if len(book) > 16:
        return jnp.take(jnp.asarray(book, jnp.float32), codes.astype(jnp.int32))
    level: list[Any] = [jnp.float32(value) for value in book]
    bit = 0
    while len(level) > 1:
        odd = (codes >> bit & 1).astype(bool)
        level = [jnp.where(odd, level[i + 1], level[i]) for i in range(0, len(level), 2)]
        bit += 1
    return level[0]


class ByteScales(struct.PyTreeNode):
    """Scales [..., groups, out] in a byte: offset + code * step.

    codes: int8[..., groups, out]. step: f32[..., groups, out / block], one for `block` outputs of a group.
    offset: f32[..., 1, 1].
    """

    codes: jax.Array
    step: jax.Array
    offset: jax.Array

    @classmethod
    def of(cls, scale: jax.Array, block: int) -> "ByteScales":
        """Scales [..., groups, out] in blocks of `block` outputs, or of all where there are fewer."""
        block = min(block, scale.shape[-1])
        if block < 1 or scale.shape[-1] % block:
            raise UserError(f"scale_block={block} does not divide the {scale.shape[-1]} outputs of a kernel")
        offset = jnp.mean(scale, axis=(-2, -1), keepdims=True)
        rest = (scale - offset).reshape(*scale.shape[:-1], -1, block)
        step = jnp.max(jnp.abs(rest), axis=-1) / 127.0
        codes = jnp.round(rest / jnp.where(step > 0, step, 1.0)[..., None])
        return cls(codes.astype(jnp.int8).reshape(scale.shape), step, offset)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def block(self) -> int:
        """Outputs that share a step."""
        return self.codes.shape[-1] // self.step.shape[-1]

    def values(self) -> jax.Array:
        """The scales, f32[..., groups, out]."""
        rest = self.codes.astype(jnp.float32).reshape(*self.step.shape, -1) * self.step[..., None]
        return self.offset + rest.reshape(self.codes.shape)

    def narrow(self, groups: int | None, outputs: int | None) -> "ByteScales":
        """Of the first groups and outputs; a `UserError` names the block where one is cut."""
        blocks = None
        if outputs is not None:
            if self.step.shape[-1] > 1 and outputs % self.block:
                raise UserError(
                    f"a slice of {outputs} outputs cuts a block of {self.block} scales: take a multiple of {self.block}"
                )
            blocks = max(outputs // self.block, 1)
        return ByteScales(self.codes[..., :groups, :outputs], self.step[..., :groups, :blocks], self.offset)


class PackedScales(struct.PyTreeNode):
    """Scales [..., groups, out] in a few bits: offset + code * step / (2**bits - 1), as LQ-LoRA stores them (arXiv
    2311.12023, section 2.3). They are taken output by output, and a block is so many in that order.

    codes: uint8[..., groups * out * bits / 8, 1], packed. step: [..., blocks], the largest difference of a block from
    the offset, in its own dtype. offset: f32[..., 1, 1], the least scale. groups: of an output.
    """

    codes: jax.Array
    step: jax.Array
    offset: jax.Array
    groups: int = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False)
    tile: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, scale: jax.Array, bits: int, block: int, dtype: Any) -> "PackedScales":
        groups, outputs = scale.shape[-2:]
        if (groups * outputs) % block:
            raise UserError(f"blocks of {block} scales do not divide the {groups * outputs} of a kernel")
        offset = jnp.min(scale, axis=(-2, -1), keepdims=True)
        rest = (scale - offset).swapaxes(-1, -2).reshape(*scale.shape[:-2], -1, block)
        step = jnp.max(rest, axis=-1).astype(dtype)
        wide = step.astype(jnp.float32)[..., None]
        codes = jnp.round(rest / jnp.where(wide > 0, wide, 1.0) * (2**bits - 1))
        codes = jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8).reshape(*scale.shape[:-2], -1, 1)
        bytes_, tile = packed.pack(codes, bits, block)
        return cls(bytes_, step, offset, groups, bits, tile)

    @property
    def shape(self) -> tuple[int, ...]:
        count = packed.rows_of(self.codes, self.bits)
        return (*self.codes.shape[:-2], self.groups, count // self.groups)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def block(self) -> int:
        """Scales that share a step."""
        return packed.rows_of(self.codes, self.bits) // self.step.shape[-1]

    def values(self) -> jax.Array:
        """The scales, f32[..., groups, out]."""
        codes = unpack_codes(self.codes, self.bits, self.tile).astype(jnp.float32)
        step = self.step.astype(jnp.float32)[..., None] / (2**self.bits - 1)
        rest = codes.reshape(*self.step.shape, -1) * step
        lead = self.shape[:-2]
        return self.offset + rest.reshape(*lead, -1, self.groups).swapaxes(-1, -2)

    def narrow(self, groups: int | None, outputs: int | None) -> "PackedScales":
        """Of the first outputs; a `UserError` where a block of scales is cut, or inputs are."""
        if groups is not None and groups != self.groups:
            raise UserError(
                "a slice of inputs would cut blocks of packed scales: materialize the kernel first"
            )
        if outputs is None:
            return self
        count = outputs * self.groups
        if count % self.block:
            raise UserError(f"a slice of {outputs} outputs cuts a block of {self.block} scales")
        codes, tile = packed.cut_rows(self.codes, self.bits, self.tile, count, self.block)
        return self.replace(codes=codes, step=self.step[..., : count // self.block], tile=tile)


_SCALES = (ByteScales, PackedScales)


class NormalFloat(struct.PyTreeNode):
    """A kernel [..., in, out] of packed codes of the book; leading axes are a stack.

    codes: uint8[..., in * bits / 8, out], packed as `research.nn.packed` says. scale: floating[..., groups, out], or
    `ByteScales` or `PackedScales` of that shape. tile: of the packing. last: of the book, see `code_book`.
    """

    codes: jax.Array
    scale: jax.Array | ByteScales | PackedScales
    bits: int = struct.field(pytree_node=False)
    tile: int = struct.field(pytree_node=False)
    last: float | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], packed.rows_of(self.codes, self.bits), self.codes.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape) + sum(leaf.size for leaf in jax.tree.leaves(self.scale))

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-2] // self.scale.shape[-2]

    def check(self) -> None:
        """Raise `UserError` unless the parts belong together."""
        code_book(self.bits, self.last)
        if type(self.tile) is not int or self.tile < 1 or self.tile % packed.planes_of(self.bits):
            raise UserError(f"tile={self.tile} does not hold whole bytes of {self.bits} bits")
        if self.codes.dtype != jnp.uint8 or self.codes.ndim < 2 or self.shape[-2] % self.tile:
            raise UserError(f"codes {self.codes.dtype}{self.codes.shape} are not tiles of {self.tile} rows")
        check_groups(self.shape, self.scale)

    def scales(self) -> jax.Array:
        """Floating[..., groups, out]."""
        return self.scale.values() if isinstance(self.scale, _SCALES) else self.scale

    def dot(self, x: jax.Array) -> jax.Array:
        return _dot(x, self)

    @jax.jit
    def materialize(self) -> jax.Array:
        values = _decode(unpack_codes(self.codes, self.bits, self.tile), code_book(self.bits, self.last))
        return packed.scaled(values, self.scales())

    def narrow(self, inputs: int | None, outputs: int | None) -> "NormalFloat":
        codes, tile, groups = self.codes[..., :outputs], self.tile, None
        if inputs is not None and inputs != self.shape[-2]:
            groups = packed.cut_groups(self.shape[-2], self.scale.shape[-2], inputs)
            codes, tile = packed.cut_rows(codes, self.bits, tile, inputs, self.group)
        if isinstance(self.scale, _SCALES):
            scale = self.scale.narrow(groups, outputs)
        else:
            scale = self.scale[..., :groups, :outputs]
        return self.replace(codes=codes, scale=scale, tile=tile)

    def stored_bits(self) -> int:
        codes = math.prod(self.shape) * self.bits
        if not isinstance(self.scale, _SCALES):
            return codes + array_bits(self.scale)
        second = array_bits(self.scale.step) + array_bits(self.scale.offset)
        return codes + array_bits(self.scale.codes) + second

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        if isinstance(self.scale, PackedScales):
            return [spec, (None,), (None,), (None,)]  # scales in order of outputs: whole everywhere
        return [spec] * len(jax.tree.leaves(self))


@jax.jit
@jax.checkpoint  # for its gradient the codes are read again, and not a float copy kept
def _dot(x: jax.Array, kernel: NormalFloat) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    if target_platform() != "cpu" or rows.shape[0] > packed.FEW:
        return dot(x, kernel.materialize())
    book = code_book(kernel.bits, kernel.last)
    y = packed.block_dot(
        rows,
        kernel.codes,
        kernel.scales(),
        None,
        kernel.bits,
        kernel.tile,
        lambda codes: _decode(codes, book),
    )
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("bits", "last"))
def encode_normal(kernel: jax.Array, scale: jax.Array, bits: int, last: float | None = None) -> jax.Array:
    """The nearest codes of a kernel [..., in, out] under scales [..., groups, out] -> uint8[..., in, out]."""
    book = code_book(bits, last)
    between = jnp.asarray([(a + b) / 2 for a, b in zip(book, book[1:], strict=False)], jnp.float32)
    scale = jnp.where(scale > 0, scale, 1.0).astype(jnp.float32)
    values = packed.split_groups(kernel.astype(jnp.float32), scale.shape[-2]) / scale[..., None, :]
    return jnp.searchsorted(between, values).astype(jnp.uint8).reshape(kernel.shape)


@functools.partial(jax.jit, static_argnames=("bits", "group", "scale_block", "scale_dtype", "store", "last"))
def quantize_normal(
    kernel: jax.Array,
    bits: int = 4,
    group: int | None = 64,
    *,
    scale_block: int | None = None,
    scale_dtype: Any = jnp.float32,
    store: Callable[[jax.Array], PackedScales] | None = None,
    last: float | None = None,
) -> NormalFloat:
    """A kernel [..., in, out] rounded to NormalFloat, each group of inputs scaled by its largest magnitude.

    scale_block: double quantization, outputs that share a second scale; None: scales of `scale_dtype`. store: another
    way of storing them. Codes are found for the scales as they are stored. last: of the book, see `code_book`.

    Raises `UserError` for bits other than 2, 3, 4 and 8, a group that does not divide the inputs, a block that does not
    divide the outputs, and inputs that do not fill their bytes.
    """
    code_book(bits, last)
    rows = kernel.shape[-2]
    group = packed.check_group(rows, group)
    scale = jnp.max(jnp.abs(packed.split_groups(kernel.astype(jnp.float32), rows // group)), axis=-2)
    if store is not None:
        stored = store(scale)
    else:
        stored = scale.astype(scale_dtype) if scale_block is None else ByteScales.of(scale, scale_block)
    used = stored.values() if isinstance(stored, _SCALES) else stored
    codes, tile = packed.pack(encode_normal(kernel, used, bits, last), bits, group)
    return NormalFloat(codes, stored, bits, tile, last)


OUTERMOST = 0.9677083
"""The outermost quantile of LQ-LoRA's code book, for every number of bits: 4 bits are QLoRA's NF4."""


@dataclasses.dataclass(frozen=True)
class BlockNormal:
    """One configuration (b, b0, b1, B0, B1) of LQ-LoRA's quantizer (arXiv 2311.12023, section 2.3).

    Blocks lie along the inputs of an output.

    bits: b, of a weight: 2, 3, 4 or 8. scale_bits: b0. second: b1. group: B0, weights a scale. block: B1, scales a
    second scale.
    """

    bits: int = 4
    scale_bits: int = 8
    second: Literal["float32", "bfloat16", "float16"] = "float32"
    group: int = 64
    block: int = 256

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(self, kernel: jax.Array) -> NormalFloat:
        def store(scale: jax.Array) -> PackedScales:
            return PackedScales.of(scale, self.scale_bits, self.block, jnp.dtype(self.second))

        return quantize_normal(kernel, self.bits, self.group, store=store, last=OUTERMOST)

    @property
    def bits_per_weight(self) -> float:
        """Without the one least scale of a kernel."""
        second = 8 * jnp.dtype(self.second).itemsize
        return self.bits + self.scale_bits / self.group + second / (self.group * self.block)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether its blocks divide a kernel [.., in, out] and fill their bytes."""
        inputs, outputs = shape[-2:]
        scales = inputs // self.group * outputs
        bytes_filled = inputs * self.bits % 8 == 0 and inputs % (8 if self.bits == 3 else 1) == 0
        return inputs % self.group == 0 and scales % self.block == 0 and scales % 8 == 0 and bytes_filled
