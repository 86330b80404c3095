"""What the TPU and GPU kernels share: decays, products, and what a chunk is in terms of them.

With rows cum, start, end of `decays` for one head and one chunk of Q tokens, S the state before the chunk:

    W_ij = (C_i B_j) exp(cum_i - cum_j) for j <= i of the same segment, else 0
    Y = W X + start * (C S^T)          S' = start_Q S + (end * X)^T B

The kernels' gradients are of x, the three rows, B, C and S; what the rows are made of is differentiated by JAX.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.common import precision_of

CUM, START, END = range(3)


def decays(
    log_decay: jax.Array, segments: jax.Array | None, chunk: int
) -> tuple[jax.Array, jax.Array | None]:
    """log_decay [b, T, H], segments int32[b, T], T a multiple of `chunk` -> rows float32[b, H, K, 3, Q] and first.

    Rows: the sum of log decays from the chunk's start to and with each token; what is left at each token of the state
    before the chunk; what is left of each token at the chunk's end. first float32[b, K, Q]: the place in the chunk
    where each token's segment begins; None without segments.
    """
    batch, length, heads = log_decay.shape
    count = length // chunk
    total = jnp.cumsum(log_decay.astype(jnp.float32).reshape(batch, count, chunk, heads), axis=2)
    total = total.transpose(0, 3, 1, 2)
    start, end = jnp.exp(total), jnp.exp(total[..., -1:] - total)
    first = None
    if segments is not None:
        segments = segments.reshape(batch, count, chunk)
        before = jnp.concatenate([segments[:, :1, 0], segments[:, :-1, -1]], axis=1)
        start = start * (segments == before[..., None])[:, None]
        end = end * (segments == segments[..., -1:])[:, None]
        changes = jnp.pad(segments[..., 1:] != segments[..., :-1], ((0, 0), (0, 0), (1, 0)))
        first = jax.lax.cummax(jnp.where(changes, jnp.arange(chunk), 0), axis=2).astype(jnp.float32)
    return jnp.stack([total, start, end], axis=3), first


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two matrices over axis contract[0] of a and contract[1] of b, in a's dtype, to float32."""
    return jax.lax.dot_general(
        a,
        b.astype(a.dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision_of(a.dtype),
        preferred_element_type=jnp.float32,
    )


def between(cum_column: jax.Array, cum_row: jax.Array, first_column: jax.Array | None) -> jax.Array:
    """exp(cum_i - cum_j) [Q, Q] for the tokens j that i sees, else 0."""
    size = cum_row.shape[1]
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    seen = j <= i
    if first_column is not None:
        seen = seen & (j.astype(jnp.float32) >= first_column)
    # Masked before the exponential, which could overflow above the diagonal.
    return jnp.exp(jnp.where(seen, cum_column - cum_row, -jnp.inf))
