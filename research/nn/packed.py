"""Packed codes of 2, 3, 4 or 8 bits, as all quantized weights keep them: how they lie, are cut, and are multiplied.

The layout is that of `kernels_pallas.quantized_matmul.packing`, byte planes of a tile of rows. A tile here divides the
rows, so that nothing is padded: a kernel [in, out] of `bits` bits takes in * bits / 8 * out bytes.

A product of few rows reads the codes block by block: a block becomes floats in the processor's cache and meets the
activations there. Codes of float size never reach memory.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.packing import TILE, pack_codes, unpack_codes
from research.errors import UserError

BITS = (2, 3, 4, 8)
FEW = 16  # rows; with more, a whole kernel is made floats and multiplied once
_BLOCK = 1 << 20  # bytes of floats at a time

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
    m, rows = x.shape
    columns, planes = codes.shape[-1], planes_of(bits)
    plane, group = tile // planes, rows // scale.shape[0]
    # Rows of a plane that are taken at a time: within one group, and few enough to stay in the cache.
    height = math.gcd(plane, group)
    fitting = max(_BLOCK // (4 * columns), 1)
    height = next(n for n in range(min(height, fitting), 0, -1) if height % n == 0)
    tiles, blocks = rows // tile, plane // height

    def by_block(values: jax.Array, each: int) -> jax.Array:
        """[in / height (a row a block), ...] or [in, ...] -> [tiles * blocks, planes, each, ...]."""
        values = values.reshape(tiles, planes, blocks, each, *values.shape[1:])
        return values.swapaxes(1, 2).reshape(tiles * blocks, planes, each, *values.shape[4:])

    def of_groups(values: jax.Array) -> jax.Array:
        each = jnp.repeat(values.astype(jnp.float32), group // height, axis=0)
        return by_block(each, 1)[:, :, 0]

    xs = {"x": by_block(x.astype(jnp.float32).T, height), "scale": of_groups(scale)}
    xs["codes"] = _blocks_of_codes(codes, bits, tile, height)
    if zero is not None:
        xs["zero"] = of_groups(zero)

    def block(total: jax.Array, part: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        for j in range(planes):  # each is one shift, one mask and one product
            xj = part["x"][j]
            product = jax.lax.dot_general(
                xj, decode(_plane(part["codes"], bits, j)), (((0,), (0,)), ((), ()))
            )
            if zero is not None:
                product -= jnp.sum(xj, axis=0)[:, None] * part["zero"][j]
            total += product * part["scale"][j]
        return total, None

    total = jnp.zeros_like(x, shape=(m, columns), dtype=jnp.float32)
    return jax.lax.scan(block, total, xs)[0]


def _blocks_of_codes(codes: jax.Array, bits: int, tile: int, height: int) -> jax.Array:
    """Packed codes -> [blocks, parts, height, out]: one part, of 3 bits the two halves of the low bits and the high."""
    parts = 3 if bits == 3 else 1
    plane, columns = tile // planes_of(bits), codes.shape[-1]
    blocks = codes.reshape(-1, parts, plane // height, height, columns).swapaxes(1, 2)
    return blocks.reshape(-1, parts, height, columns)


def _plane(parts: jax.Array, bits: int, j: int) -> jax.Array:
    """The codes of plane j of a block [parts, height, out] -> uint8[height, out]."""
    if bits != 3:
        return (parts[0] >> (bits * j)) & (2**bits - 1)
    return (parts[j % 2] >> (2 * (j // 2))) & 3 | ((parts[2] >> j) & 1) << 2
