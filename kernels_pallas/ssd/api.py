"""The SSD scan: which implementation runs, and what it can compute.

    S_t = exp(a_t) S_{t-1} + x_t B_t^T        y_t = S_t C_t                     (arXiv 2405.21060, equation 1)

Shapes: b rows, T tokens, H heads of P channels, G groups of heads that share B and C, N the state's size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import Implementation, Unsupported, choose, pad_axis
from kernels_pallas.ssd import reference
from kernels_pallas.ssd.common import decays


def ssd(
    x: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    chunk: int = 128,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence over T tokens, in chunks: products of matrices inside chunks, a recurrence over chunks alone.

    Args:
        x: [b, T, H, P], the step size multiplied in.
        log_decay: [b, T, H], at most 0.
        b, c: [b, T, G, N]; head h reads group h // (H / G).
        state: [b, H, P, N] before the first token, zero by default.
        segments: int32[b, T]; the recurrence starts anew wherever they change (not between `state` and the first
            token).
        chunk: tokens of a chunk, which changes speed alone; T need not be a multiple. A multiple of 16 on tpu, a power
            of two from 16 on on gpu, where no more than 64 are taken at a time.
        implementation: None takes the kernel of the default backend.
        interpret: run the kernel in Pallas' interpreter, on any backend.

    Returns:
        y [b, T, H, P] in the dtype of x, and the state behind the last token, float32. Both have gradients with respect
        to x, log_decay, b, c and state.

    Raises:
        Unsupported: there is no such kernel for the backend, or it cannot compute these arguments. Another
            implementation is never taken instead.
    """
    implementation = choose("SSD", implementation)
    batch, length, heads, channels = x.shape
    groups, size = b.shape[2:]
    if chunk < 1:
        raise Unsupported(f"chunk={chunk}: a chunk has at least one token")
    if heads % groups:
        raise Unsupported(f"{heads} heads are not a multiple of {groups} groups")
    _check_shapes(
        log_decay=(log_decay, (batch, length, heads)),
        b=(b, (batch, length, groups, size)),
        c=(c, (batch, length, groups, size)),
        state=(state, (batch, heads, channels, size)),
        segments=(segments, (batch, length)),
    )
    if state is None:
        state = jnp.zeros((batch, heads, channels, size), jnp.float32)
    if implementation == "reference":
        return reference.ssd(x, log_decay, b, c, state, segments, chunk)
    _check_dtypes(x=x, b=b, c=c)
    kernel = _kernel(implementation)
    chunk = kernel.chunk_of(chunk, x.shape, b.shape)
    padded = -(-length // chunk) * chunk
    # A token that neither decays nor adds leaves the state as it is.
    x, log_decay, b, c = (pad_axis(y, 1, padded) for y in (x, log_decay, b, c))
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, padded - length)), mode="edge")
    rows, first = decays(log_decay, segments, chunk)
    y, final = _scan(x, rows, first, b, c, state.astype(jnp.float32), implementation, interpret)
    return y[:, :length], final


def ssd_step(
    state: jax.Array,
    x: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """One token: state [b, H, P, N], x [b, H, P], log_decay [b, H], b and c [b, G, N] -> y [b, H, P], the new state.

    The state is read once and written once, in place where the caller gives it away. For decoding: the kernels have no
    gradient. Raises as `ssd`.
    """
    implementation = choose("SSD", implementation)
    batch, heads, channels = x.shape
    groups, size = b.shape[1:]
    if heads % groups:
        raise Unsupported(f"{heads} heads are not a multiple of {groups} groups")
    _check_shapes(
        state=(state, (batch, heads, channels, size)),
        log_decay=(log_decay, (batch, heads)),
        b=(b, (batch, groups, size)),
        c=(c, (batch, groups, size)),
    )
    if implementation == "reference":
        return reference.ssd_step(state, x, log_decay, b, c)
    _check_dtypes(x=x, b=b, c=c)
    kernel = _kernel(implementation)
    return kernel.step(state.astype(jnp.float32), x, log_decay.astype(jnp.float32), b, c, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _scan(x, rows, first, b, c, state, implementation: Implementation, interpret: Any):
    return _kernel(implementation).forward(x, rows, first, b, c, state, interpret=interpret)[:2]


def _scan_forward(x, rows, first, b, c, state, implementation: Implementation, interpret: Any):
    y, final, states = _kernel(implementation).forward(
        x, rows, first, b, c, state, save=True, interpret=interpret
    )
    return (y, final), (x, rows, first, b, c, states)


def _scan_backward(implementation: Implementation, interpret: Any, saved, cotangents):
    """Chunks again, from the states before them, in the opposite order."""
    x, rows, first, b, c, states = saved
    d_y, d_final = cotangents
    dx, d_rows, d_b, d_c, d_state = _kernel(implementation).backward(
        x, rows, first, b, c, states, d_y, d_final, interpret=interpret
    )
    return dx, d_rows, None, d_b.astype(b.dtype), d_c.astype(c.dtype), d_state


_scan.defvjp(_scan_forward, _scan_backward)


def _kernel(implementation: Implementation):
    # Imported here: Pallas takes half a second to import, and most programs run no kernel.
    if implementation == "tpu":
        from kernels_pallas.ssd import tpu as kernel
    else:
        from kernels_pallas.ssd import gpu as kernel
    return kernel


def _check_shapes(**arguments: tuple[jax.Array | None, tuple[int, ...]]) -> None:
    for name, (array, shape) in arguments.items():
        if array is not None and array.shape != shape:
            raise Unsupported(f"{name} has shape {array.shape}, expected {shape}")


def _check_dtypes(**arguments: jax.Array) -> None:
    for name, array in arguments.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise Unsupported(f"{name} is {array.dtype}: the kernels take float32 and bfloat16")
