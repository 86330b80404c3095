"""Packed codes of 2, 3, 4 or 8 bits, as all quantized weights keep them: how they lie, are cut, and are multiplied.

The layout is that of `kernels_pallas.quantized_matmul.packing`, byte planes of a tile of rows. A tile here divides the
rows, so that nothing is padded: a kernel [in, out] of `bits` bits takes in * bits / 8 * out bytes.

On a CPU a product of few rows reads the codes where they lie. One row: codes become floats in registers and are summed
there. Several rows: blocks of columns become floats in the processor's cache and meet the activations in the library's
product. A float copy of the kernel never reaches memory.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.packing import TILE, pack_codes, unpack_codes
from research.errors import UserError

BITS = (2, 3, 4, 8)
FEW = 128  # rows; with more, a whole kernel is made floats and multiplied once
# Floats of a plane at a time: what XLA leaves to one core; divided among two it took twice as long.
_BLOCK = 1 << 16

Decode = Callable[[jax.Array], jax.Array]


def planes_of(bits: int) -> int:
    """How many rows share a byte; of 3 bits, the eight that share three bytes."""
    return 8 if bits == 3 else 8 // bits


def check_bits(bits: int) -> None:
    """Raise `UserError` for bits that cannot be packed."""
    if bits not in BITS:
        raise UserError(f"bits={bits} is not supported: there are {', '.join(map(str, BITS))}")


def choose_tile(rows: int, bits: int, group: int) -> int:
    """Rows of a tile: the most that divide `rows`, up to `TILE`, with whole groups in every plane where possible.

    Raises `UserError` for bits that there are not and rows that do not fill their bytes.
    """
    check_bits(bits)
    planes = planes_of(bits)
    if rows < 1 or rows % planes:
        raise UserError(f"{rows} inputs cannot be packed at {bits} bits: take a multiple of {planes}")
    unit = group * planes if rows % (group * planes) == 0 and group * planes <= TILE else planes
    count = rows // unit
    return unit * max(n for n in range(1, max(TILE // unit, 1) + 1) if count % n == 0)


def rows_of(codes: jax.Array, bits: int) -> int:
    """Inputs of packed codes [..., in * bits / 8, out]."""
    return codes.shape[-2] * 8 // bits


def pack(codes: jax.Array, bits: int, group: int) -> tuple[jax.Array, int]:
    """Codes [..., in, out] -> (packed codes, their tile)."""
    tile = choose_tile(codes.shape[-2], bits, group)
    return pack_codes(codes, bits, tile), tile


def split_groups(array: jax.Array, groups: int) -> jax.Array:
    """[..., in, out] -> [..., groups, in / groups, out]."""
    return array.reshape(*array.shape[:-2], groups, -1, array.shape[-1])


def scaled(values: jax.Array, scale: jax.Array) -> jax.Array:
    """Values [..., in, out] times their groups' scales [..., groups, out], in float32."""
    out = split_groups(values, scale.shape[-2]) * scale.astype(jnp.float32)[..., None, :]
    return out.reshape(values.shape)


def check_group(rows: int, group: int | None) -> int:
    """The size of a group of inputs, `None` being all. Raises `UserError` unless it divides them."""
    if group is None:
        return rows
    if group < 1 or rows % group:
        raise UserError(f"group={group} does not divide the {rows} inputs of a kernel")
    return group


def cut_groups(rows: int, groups: int, inputs: int) -> int:
    """How many groups the first `inputs` of `rows` take. Raises `UserError`, naming the group, where one is cut."""
    group = rows // groups
    if not 0 < inputs <= rows:
        raise UserError(f"a kernel of {rows} inputs has no slice of {inputs}")
    if groups > 1 and inputs % group:
        raise UserError(f"a slice of {inputs} inputs cuts a group of {group}: take a multiple of {group}")
    return groups if groups == 1 else inputs // group


def cut_rows(codes: jax.Array, bits: int, tile: int, inputs: int, group: int) -> tuple[jax.Array, int]:
    """The first `inputs` rows of packed codes, packed, and their tile. Whole tiles are a slice."""
    if inputs % tile == 0:
        return codes[..., : inputs * bits // 8, :], tile
    return pack(unpack_codes(codes, bits, tile)[..., :inputs, :], bits, min(group, inputs))


def block_dot(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    bits: int,
    tile: int,
    decode: Decode,
) -> jax.Array:
    """x [M, in] times the kernel (decode(codes) - zero) * scale -> float32[M, out], for CPUs and few rows.

    codes uint8[in * bits / 8, out] packed; scale and zero [groups, out]; decode: codes uint8 -> float32.
    """
    parts = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
    # Tied to the activations: else XLA takes all unpacking out of a decoding loop and keeps the floats.
    x, parts = jax.lax.optimization_barrier((x.astype(jnp.float32), parts))
    multiply = _row_dot if x.shape[0] == 1 else _columns_dot
    return multiply(x, parts, bits, tile, decode)


def _row_dot(x: jax.Array, parts: dict[str, jax.Array], bits: int, tile: int, decode: Decode) -> jax.Array:
    """The product of one row, x [1, in]. A reduction would do, but XLA runs it a number at a time; sums that are
    written out it makes vectors of."""
    rows, planes = x.shape[1], planes_of(bits)
    # Rows of a plane that are summed at once, within one group; more need more registers than there are.
    height = _height(rows, parts, bits, tile)
    height = next(n for n in range(max(16 // planes, 4), 0, -1) if height % n == 0)
    codes = _blocks_of_codes(parts["codes"], bits, tile, height)
    scale, zero = _scale_and_zero(parts, rows, bits, tile, height)
    xs = x.reshape(-1, planes, tile // planes // height, height).swapaxes(0, 1).reshape(planes, -1, height, 1)
    total = jnp.zeros_like(scale[0])
    for j in range(planes):
        product = sum(xs[j, :, i] * decode(_plane(codes[:, :, i], bits, j)) for i in range(height))
        if zero is not None:
            product -= jnp.sum(xs[j], axis=1) * zero[j]
        total += product * scale[j]
    return jnp.ones((1, total.shape[0]), jnp.float32) @ total


def _columns_dot(
    x: jax.Array, parts: dict[str, jax.Array], bits: int, tile: int, decode: Decode
) -> jax.Array:
    """The product of several rows, x [M, in]."""
    (m, rows), columns, planes = x.shape, parts["codes"].shape[-1], planes_of(bits)
    if bits == 8:  # bytes lie in the order of their rows: any tile describes them
        tile = next(n for n in range(min(TILE // 2, rows), 0, -1) if rows % n == 0)
    plane, tiles, height = tile // planes, rows // tile, _height(rows, parts, bits, tile)
    width, taken = min(max(_BLOCK // plane, 1), columns), tile * bits // 8
    xs = x.reshape(m, tiles, planes, plane).transpose(1, 2, 0, 3)

    @jax.checkpoint  # for a gradient, too, floats are made a block at a time
    def of_columns(at: jax.Array | int) -> jax.Array:
        """The product with `width` columns."""
        own = {
            name: jax.lax.dynamic_slice_in_dim(parts[name], at, width, 1) for name in parts if name != "codes"
        }
        scale, zero = _scale_and_zero(own, rows, bits, tile, height)

        def add_tile(total: jax.Array, number: jax.Array | int) -> tuple[jax.Array, None]:
            codes = jax.lax.dynamic_slice(parts["codes"], (number * taken, at), (taken, width))
            codes = _blocks_of_codes(codes, bits, tile, height)
            blocks = plane // height
            for j in range(planes):
                values = decode(_plane(codes, bits, j))
                if zero is not None:
                    values -= jax.lax.dynamic_slice_in_dim(zero[j], number * blocks, blocks)[:, None]
                values *= jax.lax.dynamic_slice_in_dim(scale[j], number * blocks, blocks)[:, None]
                total += jax.lax.dot(xs[number, j], values.reshape(plane, width))
            return total, None

        total = jnp.zeros_like(x, shape=(m, width))
        if tiles == 1:
            return add_tile(total, 0)[0]
        return jax.lax.scan(add_tile, total, jnp.arange(tiles, dtype=jnp.int32))[0]

    if width == columns:
        return of_columns(0)

    def block(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        at = jnp.minimum(number * width, columns - width)  # the last two blocks may share columns
        return jax.lax.dynamic_update_slice_in_dim(total, of_columns(at), at, 1), None

    total = jnp.zeros_like(x, shape=(m, columns))
    return jax.lax.scan(block, total, jnp.arange(-(-columns // width), dtype=jnp.int32))[0]


def _height(rows: int, parts: dict[str, jax.Array], bits: int, tile: int) -> int:
    """The most neighbouring rows of a plane that always share a scale."""
    return math.gcd(tile // planes_of(bits), rows // parts["scale"].shape[0])


def _scale_and_zero(
    parts: dict[str, jax.Array], rows: int, bits: int, tile: int, height: int
) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zeros of groups [groups, out] -> float32[planes, blocks of `height` rows of a plane, out]."""
    planes = planes_of(bits)

    def of_planes(values: jax.Array) -> jax.Array:
        columns = values.shape[-1]
        each = jnp.repeat(values.astype(jnp.float32), rows // height // values.shape[0], axis=0)
        each = each.reshape(-1, planes, tile // planes // height, columns)
        return each.swapaxes(0, 1).reshape(planes, -1, columns)

    return of_planes(parts["scale"]), of_planes(parts["zero"]) if "zero" in parts else None


def _blocks_of_codes(codes: jax.Array, bits: int, tile: int, height: int) -> jax.Array:
    """Packed codes -> [parts, blocks, height, out]: one part, of 3 bits the two halves of the low bits and the high."""
    parts = 3 if bits == 3 else 1
    blocks = codes.reshape(-1, parts, tile // planes_of(bits) // height, height, codes.shape[-1])
    return blocks.swapaxes(0, 1).reshape(parts, -1, height, codes.shape[-1])


def _plane(parts: jax.Array, bits: int, j: int) -> jax.Array:
    """The codes of plane j of the parts [parts, ...] of some blocks -> uint8[...]."""
    if bits != 3:
        return (parts[0] >> (bits * j)) & (2**bits - 1)
    return (parts[j % 2] >> (2 * (j // 2))) & 3 | ((parts[2] >> j) & 1) << 2
