"""The SSD scan in plain jnp: what the kernels must compute, and a path for every backend."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 64  # chunks between which states move by one product


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
    segments = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge").reshape(batch, -1, chunk)

    # Heads before tokens, so that every product is one of the last two dimensions as they lie in memory: with heads
    # among the channels XLA turns decays, states and outputs around each product. K chunks of Q tokens.
    def chunked(y: jax.Array) -> jax.Array:
        """[b, T, n, *] -> [b, n, K, Q, *]."""
        return jnp.moveaxis(y.reshape(batch, -1, chunk, *y.shape[2:]), 3, 1)

    xs = chunked(x).reshape(batch, groups, heads // groups, -1, chunk, channels)
    turned, c = chunked(b).swapaxes(-1, -2), chunked(c)  # [b, G, K, N, Q], [b, G, K, Q, N]
    decays = chunked(log_decay.astype(jnp.float32)).reshape(xs.shape[:-1])
    # To and with each token, [b, G, r, K, Q]: a product, as a cumulative sum is computed anew by all that reads it.
    up_to = jnp.triu(jnp.ones((chunk, chunk), jnp.float32))
    total = jnp.matmul(decays.reshape(-1, chunk), up_to, precision="highest").reshape(decays.shape)

    # Inside a chunk: y_i = sum_{j <= i} exp(total_i - total_j) (C_i B_j) x_j.
    scores = jnp.matmul(c, turned, preferred_element_type=jnp.float32)[:, :, None]
    seen = jnp.tril(jnp.ones((chunk, chunk), bool)) & (segments[..., :, None] == segments[..., None, :])
    weights = _decay(total, seen[:, None, None]) * scores
    y = jnp.matmul(weights.astype(x.dtype), xs, preferred_element_type=jnp.float32)

    # What each chunk adds to the state at its end, [b, G, r, K, N, P], and how much of the state before it is left.
    last = total[..., -1:]
    to_end = _once(jnp.exp(last - total) * (segments == segments[..., -1:])[:, None, None])
    inputs = (turned[:, :, None] * to_end[..., None, :]).astype(x.dtype)
    added = jnp.matmul(inputs, xs, preferred_element_type=jnp.float32)
    before = jnp.concatenate([segments[:, :1, 0], segments[:, :-1, -1]], axis=1)  # the segment of the state
    anew = before != segments[..., -1]
    state = state.astype(jnp.float32).reshape(batch, groups, -1, channels, size).swapaxes(-1, -2)
    states, final = _states(state, last[..., 0], anew, added)

    from_start = jnp.exp(total) * (segments == before[..., None])[:, None, None]
    y = y + jnp.matmul(c.astype(jnp.float32)[:, :, None] * from_start[..., None], states)
    y = jnp.moveaxis(y.reshape(batch, heads, -1, channels), 1, 2)[:, :length].astype(x.dtype)
    return y, final.swapaxes(-1, -2).reshape(batch, heads, channels, size)


def mixer(
    projected: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    a_log: jax.Array,
    skip: jax.Array,
    dt_bias: jax.Array,
    segments: jax.Array | None,
    count: jax.Array,
    *,
    head_dim: int,
    state_dim: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as in the api, but for the norm: y is what it normalises."""
    batch, length, _ = projected.shape
    inner = a_log.shape[0] * head_dim
    z, inputs, dt = jnp.split(projected, [inner, inner + kernel.shape[1]], axis=-1)
    mixed = _once(jax.nn.silu(convolve(inputs, kernel, segments) + bias))
    x, b, c = jnp.split(mixed, [inner, (inner + mixed.shape[-1]) // 2], axis=-1)
    x = x.reshape(batch, length, -1, head_dim)
    b, c = (y.reshape(batch, length, -1, state_dim) for y in (b, c))
    dt = jax.nn.softplus(dt + dt_bias)
    scaled, log_decay = x * dt[..., None], -jnp.exp(a_log) * dt
    start = jnp.zeros((batch, len(a_log), head_dim, state_dim), jnp.float32)
    y = ssd(scaled, log_decay, b, c, start, segments, chunk)[0]
    y = (y + x * skip[:, None]).reshape(batch, length, inner) * jax.nn.silu(z)

    # The state behind `count` tokens: others neither decay nor add, and change no segment.
    real = jnp.arange(length) < count[:, None]
    if segments is not None:
        newest = jnp.take_along_axis(segments, jnp.maximum(count - 1, 0)[:, None], axis=1)
        segments = jnp.where(real, segments, newest)
    scaled, log_decay = jnp.where(real[..., None, None], scaled, 0), jnp.where(real[..., None], log_decay, 0)
    return y, ssd(scaled, log_decay, b, c, start, segments, chunk)[1]


def convolve(inputs: jax.Array, kernel: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Depthwise and causal, within a segment: inputs [b, T, channels], kernel [taps, channels], the last one on the
    token itself, segments int[b, T] -> [b, T, channels]."""

    def earlier(back: int) -> jax.Array:
        found = _earlier(inputs, back)
        if segments is None:
            return found
        return jnp.where((_earlier(segments, back) == segments)[..., None], found, 0)

    return sum_taps(inputs, kernel, earlier)


def sum_taps(inputs: jax.Array, kernel: jax.Array, earlier: Callable[[int], jax.Array]) -> jax.Array:
    """The convolution of tokens in any order; earlier(back): the inputs `back` places earlier."""
    y = inputs * kernel[-1]
    for back in range(1, len(kernel)):
        y = y + earlier(back) * kernel[-1 - back]
    return y


def _earlier(y: jax.Array, back: int) -> jax.Array:
    """y [b, T, ...] of the token `back` places earlier, 0 where there is none."""
    return jnp.pad(y, ((0, 0), (back, 0), *[(0, 0)] * (y.ndim - 2)))[:, : y.shape[1]]


def _states(
    state: jax.Array, last: jax.Array, anew: jax.Array, added: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The states in front of each chunk [b, G, r, K, N, P] and behind the last one.

    state [b, G, r, N, P]; last [b, G, r, K], log decays of a whole chunk; anew bool[b, K]: nothing older passes
    through the chunk; added [b, G, r, K, N, P]. One product for up to `BLOCK` chunks, then the next.
    """
    count = last.shape[-1]
    block = min(BLOCK, count)
    pad = -count % block
    if pad:
        last, anew = jnp.pad(last, ((0, 0),) * 3 + ((0, pad),)), jnp.pad(anew, ((0, 0), (0, pad)))
        added = jnp.pad(added, ((0, 0),) * 3 + ((0, pad), (0, 0), (0, 0)))
    place = jnp.arange(block)
    older = place[:, None] > place

    def step(state: jax.Array, chunks: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        last, anew, added = chunks
        # Log decays between chunk j and chunk k: sums of those between, not differences of sums from the start, whose
        # roundings grow with the length.
        between = jnp.where(older, last[..., :, None], 0)
        between = jnp.einsum("km,bgrmj->bgrkj", older.astype(jnp.float32), between, precision="highest")
        starts = jnp.cumsum(anew, axis=-1)
        before = starts - anew
        passed = older & (before[:, :, None] == starts[:, None, :])
        carry = jnp.exp(jnp.where(passed[:, None, None], between, -jnp.inf))
        flat = added.reshape(*added.shape[:-2], -1)
        states = jnp.matmul(carry, flat, precision="highest").reshape(added.shape)
        kept = jnp.einsum("km,bgrm->bgrk", older.astype(jnp.float32), last, precision="highest")
        kept = jnp.exp(kept) * (before == 0)[:, None, None]
        states = states + kept[..., None, None] * state[:, :, :, None]
        through = jnp.exp(last[..., -1]) * ~anew[:, -1, None, None]
        return through[..., None, None] * states[:, :, :, -1] + added[:, :, :, -1], states

    def blocks(y: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(y.reshape(*y.shape[:axis], -1, block, *y.shape[axis + 1 :]), axis, 0)

    final, states = jax.lax.scan(step, state, (blocks(last, 3), blocks(anew, 1), blocks(added, 3)))
    states = jnp.moveaxis(states, 0, 3)
    return states.reshape(*states.shape[:3], -1, *states.shape[5:])[:, :, :, :count], final


def _once(x: jax.Array) -> jax.Array:
    """x [..., n] as a product with the identity: XLA:CPU computes anew, for each element of a larger array, whatever
    is not the result of a product."""
    size = math.gcd(x.shape[-1], 64) if x.shape[-1] > 64 else x.shape[-1]
    identity = jnp.eye(size, dtype=x.dtype)
    return jnp.matmul(x.reshape(-1, size), identity, precision="highest").reshape(x.shape)


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
