"""Kernels of 2, 3, 4 or 8 bits on a uniform grid, packed.

    kernel[k, n] = (code[k, n] - zero[k // group, n]) * scale[k // group, n]

Codes are 0 .. 2**bits - 1. A symmetric grid has the fixed zero 2**(bits - 1) and stores none. A group is so many
neighbouring inputs of one output; a kernel quantized per channel has one group.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.common import target_platform
from kernels_pallas.quantized_matmul import Packed, Unsupported, quantized_matmul
from kernels_pallas.quantized_matmul.packing import unpack_codes
from research.errors import UserError
from research.nn import packed
from research.nn.weights import Kernel, Spec, Weight, array_bits, dot


@dataclasses.dataclass(frozen=True)
class PallasProduct:
    """The product of a `Quantized` kernel by the Pallas kernel; of its scales it makes no gradient.

    Args:
        implementation: "auto" takes the kernel of the backend.
        interpret: run the kernel in Pallas' interpreter, anywhere and slowly.

    Raises:
        UserError: when called, where the kernel cannot run. Nothing else is run instead.
    """

    implementation: Literal["auto", "tpu", "gpu"] = "auto"
    interpret: bool = False

    def __call__(self, x: jax.Array, kernel: "Quantized") -> jax.Array:
        try:
            implementation = None if self.implementation == "auto" else self.implementation
            return quantized_matmul(
                x, _as_packed(kernel), implementation=implementation, interpret=self.interpret
            )
        except Unsupported as error:
            raise UserError(f"kernel={self} cannot run: {error}; None runs everywhere") from error


def _as_packed(kernel: "Quantized") -> Packed:
    """The kernel as the Pallas kernels read it; groups that straddle planes are divided, their scales repeated."""
    if kernel.bits == 3 or kernel.codes.ndim != 2:
        what = "codes of 3 bits" if kernel.bits == 3 else f"a stack of shape {kernel.shape}"
        raise Unsupported(f"{what}: the kernels take a single matrix of 8, 4 or 2 bits")
    group = math.gcd(kernel.group, kernel.tile // packed.planes_of(kernel.bits))
    scale = jnp.repeat(kernel.scale, kernel.group // group, axis=0)
    middle = jnp.full_like(scale, 2 ** (kernel.bits - 1))
    zero = middle if kernel.zero is None else jnp.repeat(kernel.zero, kernel.group // group, axis=0)
    return Packed(
        kernel.codes, scale, zero.astype(scale.dtype), kernel.bits, group, kernel.tile, kernel.shape[0]
    )


class Quantized(struct.PyTreeNode):
    """A kernel [..., in, out] of packed codes; leading axes are a stack, of experts or of scanned layers.

    codes: uint8[..., in * bits / 8, out], packed as `research.nn.packed` says. scale: floating[..., groups, out].
    zero: [..., groups, out] in units of codes, whole (uint8) or floating; None: symmetric. tile: of the packing.
    kernel: what multiplies; None is XLA. It is not saved.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    bits: int = struct.field(pytree_node=False)
    tile: int = struct.field(pytree_node=False)
    kernel: PallasProduct | None = struct.field(pytree_node=False, default=None, metadata={"saved": False})

    @classmethod
    def from_codes(cls, codes: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int) -> "Quantized":
        """Codes [..., in, out] of 0 .. 2**bits - 1, scale and zero [..., groups, out] -> the packed kernel."""
        group = codes.shape[-2] // check_groups(codes.shape, scale)
        bytes_, tile = packed.pack(codes, bits, group)
        return cls(bytes_, scale, zero, bits, tile)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], packed.rows_of(self.codes, self.bits), self.codes.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape) + self.scale.size + (0 if self.zero is None else self.zero.size)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-2] // self.scale.shape[-2]

    def check(self) -> None:
        """Raise `UserError` unless the parts belong together."""
        packed.check_bits(self.bits)
        if type(self.tile) is not int or self.tile < 1 or self.tile % packed.planes_of(self.bits):
            raise UserError(f"tile={self.tile} does not hold whole bytes of {self.bits} bits")
        if self.codes.dtype != jnp.uint8 or self.codes.ndim < 2 or self.shape[-2] % self.tile:
            raise UserError(f"codes {self.codes.dtype}{self.codes.shape} are not tiles of {self.tile} rows")
        check_groups(self.shape, self.scale)
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise UserError(f"zero has shape {self.zero.shape}, scale {self.scale.shape}")

    def unpacked(self) -> jax.Array:
        """The codes, uint8[..., in, out]."""
        return unpack_codes(self.codes, self.bits, self.tile)

    def dot(self, x: jax.Array) -> jax.Array:
        if self.kernel is not None:
            return self.kernel(x, self)
        return _dot(x, self)

    def materialize(self) -> jax.Array:
        return dequantize(self.unpacked(), self.scale, self.zero, self.bits)

    def narrow(self, inputs: int | None, outputs: int | None) -> "Quantized":
        codes, scale, zero = (
            None if part is None else part[..., :outputs] for part in (self.codes, self.scale, self.zero)
        )
        tile = self.tile
        if inputs is not None and inputs != self.shape[-2]:
            groups = packed.cut_groups(self.shape[-2], scale.shape[-2], inputs)
            codes, tile = packed.cut_rows(codes, self.bits, tile, inputs, self.group)
            scale, zero = (None if part is None else part[..., :groups, :] for part in (scale, zero))
        return self.replace(codes=codes, scale=scale, zero=zero, tile=tile)

    def stored_bits(self) -> int:
        zeros = 0 if self.zero is None else array_bits(self.zero)
        return math.prod(self.shape) * self.bits + array_bits(self.scale) + zeros

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        return [spec] * len(jax.tree.leaves(self))


@jax.jit
@jax.checkpoint  # for its gradient the codes are read again, and not a float copy kept
def _dot(x: jax.Array, kernel: Quantized) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    if target_platform() != "cpu" or rows.shape[0] > packed.FEW:
        return dot(x, kernel.materialize())
    zero, middle = kernel.zero, 0 if kernel.zero is not None else 2 ** (kernel.bits - 1)
    y = packed.block_dot(
        rows,
        kernel.codes,
        kernel.scale,
        zero,
        kernel.bits,
        kernel.tile,
        lambda codes: codes.astype(jnp.float32) - middle,
    )
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def check_groups(shape: tuple[int, ...], scale: jax.Array) -> int:
    """The number of groups of a kernel of `shape`. Raises `UserError` where `scale` does not fit it."""
    fits = scale.ndim == len(shape) and (*scale.shape[:-2], scale.shape[-1]) == (*shape[:-2], shape[-1])
    if not fits or not scale.shape[-2] or shape[-2] % scale.shape[-2]:
        raise UserError(f"scales of shape {scale.shape} do not divide a kernel {shape} into groups of inputs")
    return scale.shape[-2]


@functools.partial(jax.jit, static_argnames="bits")
def dequantize(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int) -> jax.Array:
    """Codes [..., in, out], scale and zero [..., groups, out] -> the kernel, float32."""
    values = packed.split_groups(codes.astype(jnp.float32), scale.shape[-2])
    zero = 2.0 ** (bits - 1) if zero is None else zero.astype(jnp.float32)[..., None, :]
    return ((values - zero) * scale.astype(jnp.float32)[..., None, :]).reshape(codes.shape)


@functools.partial(jax.jit, static_argnames="bits")
def encode(kernel: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int) -> jax.Array:
    """The nearest codes of a kernel [..., in, out] on a grid [..., groups, out] -> uint8[..., in, out]."""
    values = packed.split_groups(kernel.astype(jnp.float32), scale.shape[-2])
    zero = 2.0 ** (bits - 1) if zero is None else zero.astype(jnp.float32)[..., None, :]
    codes = jnp.round(values / scale.astype(jnp.float32)[..., None, :] + zero)
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8).reshape(kernel.shape)


def fit_grid(
    kernel: jax.Array,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    *,
    clip: float | jax.Array = 1.0,
    scale_dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array | None]:
    """Min-max scale [..., groups, out] and zero (uint8, None if symmetric) of a kernel [..., in, out].

    clip: the part of the range that the grid spans; what is beyond it gets the last code. A group of zeros has scale 1.
    """
    packed.check_bits(bits)
    groups = kernel.shape[-2] // packed.check_group(kernel.shape[-2], group)
    values = packed.split_groups(kernel.astype(jnp.float32), groups)
    if symmetric:
        scale = clip * jnp.max(jnp.abs(values), axis=-2) / (2 ** (bits - 1) - 1)
        return _positive(scale).astype(scale_dtype), None
    # 0 is always inside, so that it has a code of its own.
    low, high = (clip * f(values, axis=-2, initial=0.0) for f in (jnp.min, jnp.max))
    scale = _positive((high - low) / (2**bits - 1)).astype(scale_dtype)
    zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, 2**bits - 1)
    return scale, zero.astype(jnp.uint8)


def _positive(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1.0)


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric", "clips", "scale_dtype"))
def quantize(
    kernel: jax.Array,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    *,
    clips: tuple[float, ...] = (1.0,),
    scale_dtype: Any = jnp.float32,
) -> Quantized:
    """A kernel [..., in, out] rounded to the nearest of 2**bits values in each group of inputs.

    group: inputs that share a scale; None: one scale an output. clips: of several, every group has the one with the
    least squared error (see `fit_grid`). scale_dtype: what scales are stored in; codes are found for the stored ones.

    Raises `UserError` for bits other than 2, 3, 4 and 8, a group that does not divide the inputs, and inputs that
    do not fill their bytes.
    """

    def attempt(clip: float | jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        scale, zero = fit_grid(kernel, bits, group, symmetric, clip=clip, scale_dtype=scale_dtype)
        codes = encode(kernel, scale, zero, bits)
        error = jnp.square(dequantize(codes, scale, zero, bits) - kernel)
        return jnp.sum(packed.split_groups(error, scale.shape[-2]), axis=-2), (scale, zero), codes

    if not clips:
        raise UserError("clips is empty: it takes at least one part of the range, such as 1.0")
    if len(clips) == 1:
        _, (scale, zero), codes = attempt(clips[0])
        return Quantized.from_codes(codes, scale, zero, bits)

    def better(best: tuple[jax.Array, Any], clip: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        error, grid, _ = attempt(clip)
        least, kept = best
        kept = jax.tree.map(lambda new, old: jnp.where(error < least, new, old), grid, kept)
        return (jnp.minimum(error, least), kept), None

    first = attempt(clips[0])[:2]
    (_, (scale, zero)), _ = jax.lax.scan(better, first, jnp.asarray(clips[1:], jnp.float32))
    return Quantized.from_codes(encode(kernel, scale, zero, bits), scale, zero, bits)


# Taps of convolutions are no products, and a router decides too much for what it weighs.
KERNELS = r"(^|/)(?!conv/|router/)\w+/kernel$"


def quantize_kernels(
    params: Any, quantizer: Callable[[jax.Array], Kernel], pattern: str = KERNELS
) -> dict[str, Any]:
    """A parameter tree with `quantizer(kernel)` for every array whose path `pattern` is found in.

    Raises `UserError`, naming the path, for what the quantizer cannot take, and if the pattern is found nowhere.
    """
    found = []

    def replace(keys: tuple, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if isinstance(leaf, Weight) or not re.search(pattern, path):
            return leaf
        found.append(path)
        try:
            return quantizer(leaf)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    replaced = jax.tree_util.tree_map_with_path(replace, params, is_leaf=lambda x: isinstance(x, Weight))
    if not found:
        raise UserError(f"no array to quantize: {pattern!r} is found in no path of the tree")
    return replaced
