"""What the kernels share: the mask of a tile, its scores, and the gradient with respect to them."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import precision_of

ROW_BY_ROW = (((1,), (1,)), ((), ()))  # [a, d] x [b, d] -> [a, b]
PLAIN = (((1,), (0,)), ((), ()))  # [a, b] x [b, d] -> [a, d]


def product(a: jax.Array, b: jax.Array, contract=PLAIN) -> jax.Array:
    """float32 product of a tile; `a` takes the dtype of b."""
    a = a.astype(b.dtype)
    return jax.lax.dot_general(
        a, b, contract, precision=precision_of(b.dtype), preferred_element_type=jnp.float32
    )


def visible_tile(
    rows: jax.Array,
    columns: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Which query (`rows`) sees which key (`columns`): indices that broadcast against each other, and so do the
    segments of the queries and of the keys."""
    distance = rows - columns
    visible = (distance >= 0) & ((distance < window) | (columns < sink))
    if segments is not None:
        of_rows, of_columns = segments
        visible = visible & (of_rows == of_columns) & (of_columns > 0)
    return visible


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def score_gradient(
    probabilities: jax.Array,
    drift: jax.Array,
    delta: jax.Array,
    scores: jax.Array,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """With respect to the products of queries and keys (FlashAttention, arXiv 2205.14135, appendix B.4).

    `drift` is the products of output gradients and values; `delta` those of output gradients and outputs;
    `scores` after the cap.
    """
    gradient = probabilities * (drift - delta) * scale
    return gradient if softcap is None else gradient * (1 - jnp.square(scores / softcap))
