"""Grey-scale morphology with a structuring element for every channel: max-plus convolutions with gradients.

    dilation   (x + k)(i) = max_u x(i + u) + k(u)
    erosion    (x - k)(i) = min_u x(i + u) - k(u)  =  -dilation(-x, k)

u runs over the places of an element of odd size around i that lie in the image. k = 0 is a flat element: the running
maximum and minimum.
"""

import jax
import jax.numpy as jnp

from research.errors import UserError


def neighbours(x: jax.Array, size: int, fill: float) -> jax.Array:
    """x [B, H, W, C] -> [size * size, B, H, W, C]: the neighbour of every place at each row-major offset.

    Places outside are `fill`. Raises `UserError` for an even size, which has no middle.
    """
    if size % 2 == 0:
        raise UserError(f"an element of {size}x{size} places has no middle; its size is odd")
    height, width = x.shape[1:3]
    around = (size // 2, size // 2)
    wide = jnp.pad(x, ((0, 0), around, around, (0, 0)), constant_values=fill)
    return jnp.stack([wide[:, r : r + height, c : c + width] for r in range(size) for c in range(size)])


def dilate(x: jax.Array, element: jax.Array) -> jax.Array:
    """x [B, H, W, C], element [size, size, C] -> [B, H, W, C]. Equal maxima share the gradient."""
    size, _, channels = element.shape
    added = element.astype(x.dtype).reshape(-1, 1, 1, 1, channels)
    return jnp.max(neighbours(x, size, -jnp.inf) + added, axis=0)


def erode(x: jax.Array, element: jax.Array) -> jax.Array:
    """As `dilate`, the minimum of the differences."""
    return -dilate(-x, element)


def correlate(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [size, size, C] -> [B, H, W, C]: sum_u x(i + u) k(u), 0 outside of the image.

    The linear counterpart of `dilate`: a depthwise convolution.
    """
    size, _, channels = kernel.shape
    weights = kernel.astype(x.dtype).reshape(-1, channels)
    around = neighbours(x, size, 0.0)
    total = jnp.einsum("ubhwc,uc->bhwc", around, weights, preferred_element_type=jnp.float32)
    return total.astype(x.dtype)
