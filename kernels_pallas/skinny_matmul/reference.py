"""The skinny product in plain jnp, and the order in which its weights lie."""

import jax
import jax.numpy as jnp
import numpy as np


def pack(weights: np.ndarray, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Weights [K, N] as panels [ceil(N / width), K, width]: blocks of columns, zeros behind the last column.

    out: where they are written, by default a new array.
    """
    inputs, columns = weights.shape
    panels = np.empty((-(-columns // width), inputs, width), weights.dtype) if out is None else out
    whole, rest = divmod(columns, width)
    panels[:whole] = weights[:, : columns - rest].reshape(inputs, whole, width).swapaxes(0, 1)
    if rest:
        panels[whole, :, :rest] = weights[:, columns - rest :]
        panels[whole, :, rest:] = 0
    return panels


def unpack(panels: jax.Array, columns: int) -> jax.Array:
    """Panels [n, K, width] -> weights [K, columns]."""
    return panels.swapaxes(0, 1).reshape(panels.shape[1], -1)[:, :columns]


def pack_codes(codes: np.ndarray, bits: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Codes uint8[K, N] as panels uint8[ceil(N / width), K * bits / 8, width]; of 4 bits a byte holds two neighbouring
    rows, the first one in its low half.

    out: where they are written, by default a new array.
    """
    return pack(codes if bits == 8 else codes[::2] | codes[1::2] << 4, width, out)


def pack_grid(scale: np.ndarray, zero: np.ndarray, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Scale and zero [groups, N] as panels float32[ceil(N / width), groups, 2, width].

    out: where they are written, by default a new array.
    """
    groups, columns = scale.shape
    grid = np.empty((-(-columns // width), groups, 2, width), np.float32) if out is None else out
    for number, values in enumerate((scale, zero)):
        pack(values, width, grid[:, :, number])
    return grid


def dequantize(codes: jax.Array, grid: jax.Array, bits: int, columns: int) -> jax.Array:
    """Panels of codes and their grid -> the weights (code - zero) * scale, float32[K, columns]."""
    if bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1, codes.shape[2])
    count, groups, _, width = grid.shape
    values = codes.astype(jnp.float32).reshape(count, groups, -1, width)
    scale, zero = grid[:, :, :1], grid[:, :, 1:]
    return unpack(((values - zero) * scale).reshape(codes.shape), columns)


def skinny_matmul(x: jax.Array, panels: jax.Array, columns: int) -> jax.Array:
    """x [M, K] times panels [n, K, width] -> [M, columns], accumulated in float32."""
    product = jnp.einsum("mk,nkw->mnw", x, panels, preferred_element_type=jnp.float32)
    return product.reshape(len(x), -1)[:, :columns].astype(x.dtype)
