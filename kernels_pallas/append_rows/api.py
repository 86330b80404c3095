"""Appending rows: which implementation runs, and what it can compute."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.append_rows import reference
from kernels_pallas.common import Unsupported, check_name, needs_llvm


def append_rows(
    buffers: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    start: jax.Array,
    *,
    implementation: Literal["reference", "cpu"] = "cpu",
) -> tuple[jax.Array, ...]:
    """The buffers with new rows, all of them by one call, which writes into the buffers themselves where they are not
    used again.

    A buffer of its own for every key and value of every layer is an operation each, and another for every row of the
    batch; small ones cost XLA's dispatch, and more than eight that are ready at once wake a thread.

    Args:
        buffers: float32[B, H, S, d] each; H, S and d may differ.
        rows: float32[B, H, N, d], for every buffer.
        start: int32[B], where the rows of a batch's row go: rows[b, h, n] to slot start[b] + n. Below 0 it is taken as
            0, above S - N as that.

    Raises:
        Unsupported: other shapes and dtypes, or a processor without a kernel.
    """
    check_name(implementation, "cpu")
    if len(buffers) != len(rows):
        raise Unsupported(f"{len(buffers)} buffers, and rows for {len(rows)}")
    if start.dtype != jnp.int32:
        raise Unsupported(f"start is {start.dtype}, not int32")
    for buffer, new in zip(buffers, rows, strict=True):
        if buffer.ndim != 4 or new.ndim != 4:
            raise Unsupported(f"a buffer {list(buffer.shape)} or its rows {list(new.shape)} have not 4 dimensions")
        batch, heads, slots, dim = buffer.shape
        if new.shape != (batch, heads, new.shape[2], dim) or new.shape[2] > slots or start.shape != (batch,):
            raise Unsupported(
                f"rows {list(new.shape)} at {list(start.shape)} places do not fit a buffer {list(buffer.shape)}"
            )
    if implementation == "reference" or not buffers:
        return reference.append_rows(buffers, rows, start)
    for array in (*buffers, *rows):
        if array.dtype != jnp.float32:
            raise Unsupported(f"an array is {array.dtype}: the kernel takes float32")
    with needs_llvm():
        from kernels_pallas.append_rows import cpu
    return cpu.append_rows(tuple(buffers), tuple(rows), start)
