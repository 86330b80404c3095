"""The SSD scan: which implementation runs, and what it can compute.

    S_t = exp(a_t) S_{t-1} + x_t B_t^T        y_t = S_t C_t                     (arXiv 2405.21060, equation 1)

Shapes: b rows, T tokens, H heads of P channels, G groups of heads that share B and C, N the state's size.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels_pallas.common import Implementation, Unsupported, check_name, choose, needs_llvm, pad_axis
from kernels_pallas.rms_norm import rms_norm
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


def mixer(
    projected: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    a_log: jax.Array,
    skip: jax.Array,
    dt_bias: jax.Array,
    scale: jax.Array,
    segments: jax.Array | None = None,
    count: jax.Array | None = None,
    *,
    head_dim: int,
    state_dim: int,
    epsilon: float = 1e-5,
    chunk: int = 128,
    implementation: Literal["reference", "cpu"] = "cpu",
) -> tuple[jax.Array, jax.Array]:
    """What Mamba-2's mixer computes between its two projections: convolution, scan, skip, gate and norm.

        x, B, C = silu(conv(inputs) + bias)    dt = softplus(steps + dt_bias)
        S_t = exp(-exp(a_log) dt_t) S_{t-1} + dt_t x_t B_t^T
        y_t = RMSNorm((S_t C_t + skip x_t) silu(z_t)) scale

    Args:
        projected: float32[b, T, 2 H P + 2 G N + H], of each token z [H P], inputs of x [H P], B and C [G N], steps [H].
        kernel: [K, H P + 2 G N], taps of the depthwise causal convolution, the last one on the token itself.
        bias: [H P + 2 G N].
        a_log, skip, dt_bias: [H].
        scale: [H P]; every one of G groups of heads is normalised by itself, with `epsilon` beside its mean square.
        segments: int32[b, T]; convolution and recurrence start anew wherever they change.
        count: int32[b], tokens that the state is behind, by default T; 0 <= count <= T.
        head_dim, state_dim: P and N.
        chunk: tokens of a chunk of the reference, which changes speed alone; the kernel has its own.

    Returns:
        y [b, T, H P], and the state [b, H, P, N]. Both have gradients in reverse mode, those of the reference, with
        respect to all floating arguments. On a CPU a row has the same bits alone and in a batch.

    Raises:
        Unsupported: other dtypes and shapes, and sizes or a processor that the kernel is not for.
    """
    batch, length, width = projected.shape
    heads, channels = a_log.shape[0], kernel.shape[1]
    inner = heads * head_dim
    groups, rest = divmod(channels - inner, 2 * state_dim)
    if rest or groups < 1 or heads % groups:
        raise Unsupported(
            f"{channels} channels are not {heads} heads of {head_dim} and groups of {state_dim}"
        )
    _check_shapes(
        projected=(projected, (batch, length, inner + channels + heads)),
        bias=(bias, (channels,)),
        skip=(skip, (heads,)),
        dt_bias=(dt_bias, (heads,)),
        scale=(scale, (inner,)),
        segments=(segments, (batch, length)),
        count=(count, (batch,)),
    )
    operands = (projected, kernel, bias, a_log, skip, dt_bias, scale)
    count = jnp.full(batch, length, jnp.int32) if count is None else count.astype(jnp.int32)
    segments = None if segments is None else segments.astype(jnp.int32)
    options = (head_dim, state_dim, float(epsilon), chunk)
    check_name(implementation, "cpu")
    if implementation == "reference":
        y, state = _before_norm(options, *operands[:-1], segments, count)
        return rms_norm(y, scale, epsilon, groups, implementation="reference"), state
    if any(operand.dtype != jnp.float32 for operand in operands):
        raise Unsupported("the kernel takes float32")
    _mixer_kernel().sizes(head_dim, state_dim, len(kernel))  # raises
    return _mixer(options, *operands, segments, count)


def takes_on_cpu(head_dim: int, state_dim: int, taps: int) -> bool:
    """Whether `mixer` has a kernel for these sizes, with so many taps of the convolution, on this processor.

    Raises Unsupported for a processor without a kernel.
    """
    return _mixer_kernel().refusal(head_dim, state_dim, taps) is None


def _mixer_kernel() -> Any:
    with needs_llvm():
        from kernels_pallas.ssd import cpu
    return cpu


def _before_norm(options, *operands):
    head_dim, state_dim, _, chunk = options
    return reference.mixer(*operands, head_dim=head_dim, state_dim=state_dim, chunk=chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixer(options, *operands):
    head_dim, state_dim, epsilon, _ = options
    cpu = _mixer_kernel()
    return cpu.mixer(*operands, epsilon, cpu.sizes(head_dim, state_dim, len(operands[1])))


def _mixer_forward(options, *operands):
    """By the reference and the norm's own kernel, which keep what the gradient needs."""
    *arrays, scale, segments, count = jax.tree.map(lambda operand: operand.value, operands)
    head_dim, state_dim, epsilon, _ = options
    groups = (arrays[1].shape[1] - scale.size) // (2 * state_dim)

    def normed(scale, *arrays):
        y, _ = _before_norm(options, *arrays, segments, count)
        return rms_norm(y, scale, epsilon, groups)

    y, pull = jax.vjp(normed, scale, *arrays)
    state = _before_norm(options, *arrays, segments, count)[
        1
    ]  # which the compiler leaves out if nobody reads it
    return (y, state), (pull, arrays, segments, count)


def _mixer_backward(options, saved, cotangents):
    pull, arrays, segments, count = saved
    d_y, d_state = cotangents
    d_scale, *found = pull(jnp.zeros(d_y.shape, d_y.dtype) if isinstance(d_y, SymbolicZero) else d_y)
    if not isinstance(d_state, SymbolicZero):
        _, pull = jax.vjp(lambda *arrays: _before_norm(options, *arrays, segments, count)[1], *arrays)
        found = jax.tree.map(jnp.add, found, list(pull(d_state)))
    return *found, d_scale, None, None


_mixer.defvjp(_mixer_forward, _mixer_backward, symbolic_zeros=True)


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
