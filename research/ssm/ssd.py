"""State-space duality (Mamba-2, arXiv 2405.21060): one recurrence in four forms.

    S_t = exp(a_t) S_{t-1} + x_t B_t^T        y_t = S_t C_t                                          (equation 1)

for every head, with log decays a_t <= 0. `ssd` is the chunked form of section 6: products of matrices inside chunks
and a recurrence over chunks alone. `ssd_sequential` is the recurrence itself, `ssd_tree` scores the nodes of a tree
behind a state, and `advance` gives the state behind some of a row's tokens.

Shapes: b rows, T tokens, H heads of P channels, G groups that share B and C (H a multiple of G), N the state's size.
x [b, T, H, P] (dt is multiplied in by the caller), log_decay [b, T, H], B and C [b, T, G, N], a state [b, H, P, N].
Decays and states are float32 whatever the rest is.
"""

import jax
import jax.numpy as jnp

from research.errors import UserError


def ssd(
    x: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    chunk: int,
    state: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-> y [b, T, H, P] in the dtype of x, and the state after the last token, float32.

    chunk: tokens of a chunk; T need not be a multiple of it. state: before the first token, zero by default.
    segments int32[b, T]: the recurrence starts anew wherever they change (not between `state` and the first token).
    Raises `UserError` for a chunk below 1, or heads that the groups don't divide.
    """
    if chunk < 1:
        raise UserError(f"chunk={chunk}: a chunk has at least one token")
    batch, length, heads, channels = x.shape
    groups, size = b.shape[2:]
    if heads % groups:
        raise UserError(f"{heads} heads are not a multiple of {groups} groups")
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    if state is None:
        state = jnp.zeros((batch, heads, channels, size), jnp.float32)
    chunk = min(chunk, length)
    pad = -length % chunk
    # A token that neither decays nor adds leaves the state as it is.
    x, log_decay, b, c = (
        jnp.pad(y, ((0, 0), (0, pad), *[(0, 0)] * (y.ndim - 2))) for y in (x, log_decay, b, c)
    )
    segments = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge")

    def chunked(y: jax.Array) -> jax.Array:
        return y.reshape(batch, -1, chunk, *y.shape[2:])

    xs = chunked(x).reshape(batch, -1, chunk, groups, heads // groups, channels)
    b, c, segments = chunked(b), chunked(c), chunked(segments)
    total = jnp.cumsum(chunked(log_decay.astype(jnp.float32)), axis=2)  # [b, K, Q, H], to and with each token
    grouped = total.reshape(*total.shape[:3], groups, -1)

    # Inside a chunk: y_i = sum_{j <= i} exp(total_i - total_j) (C_i B_j) x_j.
    scores = jnp.einsum("bkign,bkjgn->bkgij", c, b, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones((chunk, chunk), bool)) & (segments[..., :, None] == segments[..., None, :])
    weights = _decay_between(grouped, seen[:, :, None, None]) * scores[:, :, :, None]
    y = jnp.einsum("bkgrij,bkjgrp->bkigrp", weights.astype(x.dtype), xs, preferred_element_type=jnp.float32)

    # What each chunk adds to the state at its end, and how much of the state before it is left there.
    last = grouped[:, :, -1:]
    to_end = jnp.exp(last - grouped) * (segments == segments[..., -1:])[..., None, None]
    added = jnp.einsum(
        "bkjgrp,bkjgn->bkgrpn",
        (xs * to_end[..., None]).astype(x.dtype),
        b,
        preferred_element_type=jnp.float32,
    )
    before = jnp.concatenate([segments[:, :1, 0], segments[:, :-1, -1]], axis=1)  # the segment of the state
    kept = jnp.exp(last[:, :, 0]) * (before == segments[..., -1])[..., None, None]  # [b, K, G, r]

    def step(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, added = chunk
        return kept[..., None, None] * state + added, state

    state = state.astype(jnp.float32).reshape(batch, groups, -1, channels, size)
    final, states = jax.lax.scan(step, state, (kept.swapaxes(0, 1), added.swapaxes(0, 1)))
    from_start = jnp.exp(grouped) * (segments == before[..., None])[..., None, None]
    y = y + from_start[..., None] * jnp.einsum("bkign,kbgrpn->bkigrp", c.astype(jnp.float32), states)
    y = y.reshape(batch, -1, heads, channels)[:, :length].astype(x.dtype)
    return y, final.reshape(batch, heads, channels, size)


def ssd_sequential(
    x: jax.Array, log_decay: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The recurrence, one token after the other: what the other forms are tested against."""
    batch, _, heads, channels = x.shape
    if state is None:
        state = jnp.zeros((batch, heads, channels, b.shape[3]), jnp.float32)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, log_decay, b, c = token
        b, c = (jnp.repeat(y, heads // y.shape[1], axis=1) for y in (b, c))
        state = jnp.exp(log_decay)[..., None, None] * state + x[..., None] * b[:, :, None]
        return state, jnp.einsum("bhpn,bhn->bhp", state, c)

    tokens = (y.swapaxes(0, 1) for y in (x, log_decay, b, c))
    state, y = jax.lax.scan(step, state, tuple(tokens))
    return y.swapaxes(0, 1).astype(x.dtype), state


def ssd_tree(
    x: jax.Array, log_decay: jax.Array, b: jax.Array, c: jax.Array, *, tree: jax.Array, state: jax.Array
) -> jax.Array:
    """y [b, T, H, P] of the nodes of a tree behind `state`: the recurrence runs from the root to each node.

    tree bool[T, T] or [b, T, T]: row j marks the ancestors of node j and itself. Nothing is written: one state serves
    all nodes, as the quadratic form needs none of its own for them.
    """
    groups = b.shape[2]
    tree = jnp.broadcast_to(tree, (x.shape[0], *tree.shape[-2:]))
    along = jnp.einsum("bji,bih->bjh", tree.astype(jnp.float32), log_decay.astype(jnp.float32))
    along = along.reshape(*along.shape[:2], groups, -1)
    xs = x.reshape(*x.shape[:2], groups, -1, x.shape[-1])
    scores = jnp.einsum("bign,bjgn->bgij", c, b, preferred_element_type=jnp.float32)
    weights = _decay_between(along, tree[:, None, None]) * scores[:, :, None]
    y = jnp.einsum("bgrij,bjgrp->bigrp", weights.astype(x.dtype), xs, preferred_element_type=jnp.float32)
    states = state.astype(jnp.float32).reshape(x.shape[0], groups, -1, *state.shape[2:])
    y = y + jnp.exp(along)[..., None] * jnp.einsum("bign,bgrpn->bigrp", c.astype(jnp.float32), states)
    return y.reshape(x.shape).astype(x.dtype)


def advance(
    state: jax.Array, x: jax.Array, log_decay: jax.Array, b: jax.Array, count: jax.Array
) -> jax.Array:
    """The state after the first count[b] of T tokens, float32 [b, H, P, N]."""
    real = jnp.arange(x.shape[1]) < count[:, None]
    total = jnp.cumsum(log_decay.astype(jnp.float32) * real[..., None], axis=1)
    to_end = jnp.exp(total[:, -1:] - total) * real[..., None]
    groups = b.shape[2]
    xs = (x.astype(jnp.float32) * to_end[..., None]).reshape(*x.shape[:2], groups, -1, x.shape[-1])
    added = jnp.einsum("btgrp,btgn->bgrpn", xs, b.astype(jnp.float32)).reshape(state.shape)
    return jnp.exp(total[:, -1])[..., None, None] * state + added


def _decay_between(total: jax.Array, seen: jax.Array) -> jax.Array:
    """total [..., T, G, r], seen bool[..., 1, 1, T, T] -> exp(total_i - total_j) where seen, else 0: [..., G, r, T, T].

    Masked before the exponential: above the diagonal it could overflow, and its gradient would be NaN.
    """
    total = jnp.moveaxis(total, -3, -1)
    return jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], -jnp.inf))
