"""State-space duality (Mamba-2, arXiv 2405.21060): one recurrence in four forms.

    S_t = exp(a_t) S_{t-1} + x_t B_t^T        y_t = S_t C_t                                          (equation 1)

for every head, with log decays a_t <= 0. `ssd` is the chunked form of section 6: products of matrices inside chunks
and a recurrence over chunks alone. `ssd_sequential` is the recurrence itself, `ssd_tree` scores the nodes of a tree
behind a state, and `advance` gives the state behind some of a row's tokens.

Shapes: b rows, T tokens, H heads of P channels, G groups that share B and C (H a multiple of G), N the state's size.
x [b, T, H, P] (dt is multiplied in by the caller), log_decay [b, T, H], B and C [b, T, G, N], a state [b, H, P, N].
Decays and states are float32 whatever the rest is.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

import kernels_pallas.ssd
from kernels_pallas.ssd import Unsupported
from kernels_pallas.ssd.reference import decay_between
from research.errors import UserError


class Scan(Protocol):
    """How the chunked form is computed; arguments and results as of `ssd`."""

    def __call__(
        self,
        x: jax.Array,
        log_decay: jax.Array,
        b: jax.Array,
        c: jax.Array,
        *,
        chunk: int,
        state: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class PlainScan:
    """Products of all chunks at once, in plain jnp, everywhere."""

    def __call__(self, x, log_decay, b, c, *, chunk, state=None, segments=None):
        try:
            return kernels_pallas.ssd.ssd(
                x, log_decay, b, c, state, segments, chunk=chunk, implementation="reference"
            )
        except Unsupported as error:
            raise UserError(str(error)) from error


PLAIN = PlainScan()


@dataclasses.dataclass(frozen=True)
class PallasScan:
    """The Pallas kernel: scores and states of a chunk stay in the processor.

    Args:
        implementation: "auto" takes the kernel of the backend.
        interpret: run the kernel in Pallas' interpreter, anywhere and slowly.

    Raises:
        UserError: when called, where the kernel cannot run. Nothing else is run instead.
    """

    implementation: Literal["auto", "tpu", "gpu"] = "auto"
    interpret: bool = False

    def __call__(self, x, log_decay, b, c, *, chunk, state=None, segments=None):
        implementation = None if self.implementation == "auto" else self.implementation
        try:
            return kernels_pallas.ssd.ssd(
                x,
                log_decay,
                b,
                c,
                state,
                segments,
                chunk=chunk,
                implementation=implementation,
                interpret=self.interpret,
            )
        except Unsupported as error:
            raise UserError(f"scan={self} cannot run: {error}; PlainScan runs everywhere") from error


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
    return PLAIN(x, log_decay, b, c, chunk=chunk, state=state, segments=segments)


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
    weights = decay_between(along, tree[:, None, None]) * scores[:, :, None]
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
    # xs is the larger operand, and the second one is multiplied as it lies in memory.
    added = jnp.einsum("btgn,btgrp->bgnrp", b.astype(jnp.float32), xs)
    added = jnp.moveaxis(added, 2, -1).reshape(state.shape)
    return jnp.exp(total[:, -1])[..., None, None] * state + added
