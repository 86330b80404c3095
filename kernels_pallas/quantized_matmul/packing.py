"""How quantized weights are stored: codes in byte planes of a tile of rows, and a scale and a zero for every group.

    weight[k, n] = (code[k, n] - zero[k // group, n]) * scale[k // group, n]

A tile of `tile` rows becomes tile * bits / 8 rows of bytes; bits j * bits .. of byte row i are the code of row
j * tile * bits / 8 + i (plane j). So a plane is unpacked by one shift and one mask, without moving rows, and its rows
stand beside as many neighbouring columns of the activations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported, pad_axis

TILE = 1024  # rows of a tile, where there are as many


@functools.partial(jax.jit, static_argnames=("bits", "tile"))
def pack_codes(codes: jax.Array, bits: int, tile: int) -> jax.Array:
    """Codes [..., K, N] of 0 .. 2**bits - 1 -> uint8[..., K * bits / 8, N]; K a multiple of tile, tile of 8 / bits.

    Codes of 3 bits lie as 2 bits and then 1: a tile's planes of the low two bits, and behind them those of the third.
    """
    if bits == 3:
        parts = [(codes & 3, 2), (codes >> 2, 1)]
        packed = [_by_tile(pack_codes(part, width, tile), tile * width // 8) for part, width in parts]
        return jnp.concatenate(packed, axis=-2).reshape(*codes.shape[:-2], -1, codes.shape[-1])
    planes = codes.astype(jnp.uint8).reshape(
        *codes.shape[:-2], -1, 8 // bits, tile * bits // 8, codes.shape[-1]
    )
    shifts = (bits * jnp.arange(8 // bits, dtype=jnp.uint8))[:, None, None]
    packed = jnp.sum(planes << shifts, axis=-3, dtype=jnp.uint8)
    return packed.reshape(*codes.shape[:-2], -1, codes.shape[-1])


@functools.partial(jax.jit, static_argnames=("bits", "tile"))
def unpack_codes(packed: jax.Array, bits: int, tile: int) -> jax.Array:
    """The inverse of `pack_codes`: uint8[..., K, N]."""
    lead, columns = packed.shape[:-2], packed.shape[-1]
    if bits == 3:
        tiles = _by_tile(packed, tile * 3 // 8)
        low, high = tiles[..., : tile // 4, :], tiles[..., tile // 4 :, :]
        parts = [unpack_codes(part.reshape(*lead, -1, columns), b, tile) for part, b in ((low, 2), (high, 1))]
        return parts[0] | parts[1] << 2
    shifts = (bits * jnp.arange(8 // bits, dtype=jnp.uint8))[:, None, None]
    planes = _by_tile(packed, tile * bits // 8)[..., None, :, :] >> shifts
    return (planes & (2**bits - 1)).reshape(*lead, -1, columns)


def _by_tile(packed: jax.Array, rows: int) -> jax.Array:
    return packed.reshape(*packed.shape[:-2], -1, rows, packed.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights [rows, N]; `padded` is `rows` rounded up to whole tiles, and what is behind `rows` has scale 0.

    codes: uint8[padded * bits / 8, N]. scale, zero: [padded / group, N], the zero in units of codes.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    bits: int = dataclasses.field(metadata=dict(static=True))
    group: int = dataclasses.field(metadata=dict(static=True))
    tile: int = dataclasses.field(metadata=dict(static=True))
    rows: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.codes.shape[1]

    @property
    def padded(self) -> int:
        return -(-self.rows // self.tile) * self.tile

    @property
    def planes(self) -> int:
        return 8 // self.bits

    @property
    def plane(self) -> int:
        """Rows of a plane of a tile."""
        return self.tile // self.planes


def pack(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, *, bits: int, tile: int | None = None
) -> Packed:
    """Codes [K, N] of 0 .. 2**bits - 1, scale and zero [K / group, N] -> packed weights.

    tile: rows of a tile, a multiple of group * 8 / bits; by default about `TILE`. Raises `Unsupported` for other bits
    than 8, 4 and 2, groups that don't divide K, or a tile that does not hold whole groups in every plane.
    """
    rows, columns = codes.shape
    if bits not in (8, 4, 2):
        raise Unsupported(f"bits={bits}: there are 8, 4 and 2")
    for name, array in {"scale": scale, "zero": zero}.items():
        if array.ndim != 2 or array.shape[1] != columns or array.shape != scale.shape:
            raise Unsupported(f"{name} has shape {array.shape}, expected [groups, {columns}] for both")
    if not scale.shape[0] or rows % scale.shape[0]:
        raise Unsupported(f"{rows} rows are not a multiple of {scale.shape[0]} groups")
    group = rows // scale.shape[0]
    unit = group * 8 // bits
    if tile is None:
        tile = unit * max(1, min(TILE // unit, -(-rows // unit)))
    if tile < 1 or tile % unit:
        raise Unsupported(f"tile={tile}: {bits} bits in groups of {group} need a multiple of {unit}")
    padded = -(-rows // tile) * tile
    packed = pack_codes(pad_axis(codes, 0, padded), bits, tile)
    scale, zero = (pad_axis(array, 0, padded // group) for array in (scale, zero))
    return Packed(packed, scale, zero, bits, group, tile, rows)


def unpack(weights: Packed) -> jax.Array:
    """The codes, uint8[K, N]."""
    return unpack_codes(weights.codes, weights.bits, weights.tile)[: weights.rows]


def dequantize(weights: Packed) -> jax.Array:
    """The weights, float32[K, N]."""
    groups = -(-weights.rows // weights.group)
    scale, zero = (
        jnp.repeat(array[:groups].astype(jnp.float32), weights.group, axis=0)[: weights.rows]
        for array in (weights.scale, weights.zero)
    )
    return (unpack(weights).astype(jnp.float32) - zero) * scale
