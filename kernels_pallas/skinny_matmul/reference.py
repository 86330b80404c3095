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


def skinny_matmul(x: jax.Array, panels: jax.Array, columns: int) -> jax.Array:
    """x [M, K] times panels [n, K, width] -> [M, columns], accumulated in float32."""
    product = jnp.einsum("mk,nkw->mnw", x, panels, preferred_element_type=jnp.float32)
    return product.reshape(len(x), -1)[:, :columns].astype(x.dtype)
