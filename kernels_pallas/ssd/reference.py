"""The SSD scan in plain jnp: what the kernels must compute, and a path for every backend."""

import jax
import jax.numpy as jnp


def ssd(
    x: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in the api."""
    batch, length, heads, channels = x.shape
    groups, size = b.shape[2:]
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    chunk = min(chunk, length)
    pad = -length % chunk
    # A token that neither decays nor adds leaves the state as it is.
    x, log_decay, b, c = (
        jnp.pad(y, ((0, 0), (0, pad), *[(0, 0)] * (y.ndim - 2))) for y in (x, log_decay, b, c)
    )
    segments = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge")

    def chunked(y: jax.Array) -> jax.Array:
        return y.reshape(batch, -1, chunk, *y.shape[2:])

    # Of two operands that share a dimension the second stays as it lies in memory and the first is turned: so the
    # larger one is second, and states are [N, r, P] here.
    xs = chunked(x).reshape(batch, -1, chunk, groups, heads // groups, channels)
    b, c, segments = chunked(b), chunked(c), chunked(segments)
    decays = chunked(log_decay.astype(jnp.float32)).reshape(*xs.shape[:-1])
    # To and with each token, [b, K, G, r, Q]: a product, as a cumulative sum is computed anew by all that reads it.
    before_and_with = jnp.tril(jnp.ones((chunk, chunk), jnp.float32))
    total = jnp.einsum("bkjgr,ij->bkgri", decays, before_and_with, precision="highest")

    # Inside a chunk: y_i = sum_{j <= i} exp(total_i - total_j) (C_i B_j) x_j.
    scores = jnp.einsum("bkign,bkjgn->bkgij", c, b, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones((chunk, chunk), bool)) & (segments[..., :, None] == segments[..., None, :])
    weights = _decay(total, seen[:, :, None, None]) * scores[:, :, :, None]
    y = jnp.einsum("bkgrij,bkjgrp->bkigrp", weights.astype(x.dtype), xs, preferred_element_type=jnp.float32)

    # What each chunk adds to the state at its end, and how much of the state before it is left there.
    last = total[..., -1:]
    to_end = jnp.exp(last - total) * (segments == segments[..., -1:])[:, :, None, None]
    added = jnp.einsum(
        "bkjgn,bkjgrp->bkgnrp",
        b,
        (xs * jnp.moveaxis(to_end, -1, 2)[..., None]).astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    before = jnp.concatenate([segments[:, :1, 0], segments[:, :-1, -1]], axis=1)  # the segment of the state
    kept = jnp.exp(last[..., 0]) * (before == segments[..., -1])[..., None, None]  # [b, K, G, r]

    def step(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, added = chunk
        return kept[:, :, None, :, None] * state + added, state

    state = jnp.moveaxis(state.astype(jnp.float32).reshape(batch, groups, -1, channels, size), -1, 2)
    final, states = jax.lax.scan(step, state, (kept.swapaxes(0, 1), added.swapaxes(0, 1)))
    from_start = jnp.exp(total) * (segments == before[..., None])[:, :, None, None]
    carried = jnp.einsum("bkign,kbgnrp->bkigrp", c.astype(jnp.float32), states)
    y = y + jnp.moveaxis(from_start, -1, 2)[..., None] * carried
    y = y.reshape(batch, -1, heads, channels)[:, :length].astype(x.dtype)
    return y, jnp.moveaxis(final, 2, -1).reshape(batch, heads, channels, size)


def ssd_step(
    state: jax.Array, x: jax.Array, log_decay: jax.Array, b: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in the api."""
    repeats = x.shape[1] // b.shape[1]
    b, c = (jnp.repeat(y.astype(jnp.float32), repeats, axis=1) for y in (b, c))
    decay = jnp.exp(log_decay.astype(jnp.float32))[..., None, None]
    state = decay * state.astype(jnp.float32) + x.astype(jnp.float32)[..., None] * b[:, :, None]
    # Products and sums in float32, whatever the precision of matrix products.
    return jnp.sum(state * c[:, :, None], axis=-1).astype(x.dtype), state


def decay_between(total: jax.Array, seen: jax.Array) -> jax.Array:
    """total [..., T, G, r], seen bool[..., 1, 1, T, T] -> exp(total_i - total_j) where seen, else 0,
    [..., G, r, T, T]."""
    return _decay(jnp.moveaxis(total, -3, -1), seen)


def _decay(total: jax.Array, seen: jax.Array) -> jax.Array:
    """total [..., T], seen bool[..., T, T] -> exp(total_i - total_j) where seen, else 0.

    Masked before the exponential: above the diagonal it could overflow, and its gradient would be NaN.
    """
    return jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], -jnp.inf))
