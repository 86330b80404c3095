"""Appending rows on a CPU: a piece is a buffer, whose new rows are copied head by head."""

import functools

import jax
import numpy as np

from kernels_pallas import cpu
from kernels_pallas.append_rows import reference
from kernels_pallas.cpu import Kernel
from kernels_pallas.cpu_code import Function

_SHARE = 1 << 14  # numbers below which another thread does not pay


def _buffer(lanes: int) -> str:
    """One buffer. Operands: the places, how many buffers there are, the buffers, their rows."""
    f = Function("piece", "ptr %job", "i64 %index", lanes=lanes)
    frame = f.field("%job", "%job", 6, "ptr")
    start, count = f.array(frame, 0), f.array(frame, 1).whole(0)
    rows = f.array(frame, f.add(f.add("%index", 2), count))
    # XLA has put the buffer there: it is the same memory, or a copy.
    result = f.array(frame, f.sub(-1, "%index"))
    batch, heads, slots, dim = result.dims(4)
    new = f.mul(rows.dim(2), dim)
    with f.loop(batch) as b:
        wanted = start.whole(b)
        place = f.min(f.choose(f.less(wanted, 0), 0, wanted), f.sub(slots, rows.dim(2)))
        with f.loop(heads) as h:
            head = f.add(f.mul(b, heads), h)
            from_ = f.at(rows.data, f.mul(head, new))
            to = f.at(result.data, f.mul(f.add(f.mul(head, slots), place), dim))
            for here, _, mask in f.vectors(new):
                f.write(f.read(f.at(from_, here), mask), f.at(to, here), mask)
    return f.text()


@functools.cache
def kernel(lanes: int) -> Kernel:
    """The code for vectors of so many floats."""
    f = Function("execute", "ptr %frame", lanes=lanes)
    count = f.array("%frame", 1).whole(0)
    batch, heads, new, dim = f.array("%frame", f.add(count, 2)).dims(4)
    work = f.mul(f.mul(f.mul(batch, heads), f.mul(new, dim)), count)
    f.call("share", "ptr @piece", "ptr %frame", f"i64 {count}", f"i64 {f.div(work, _SHARE)}", "i64 0")
    return Kernel(f"lathe_append_rows_{lanes}", "\n".join([_buffer(lanes), f.text()]))


@functools.cache
def _register(lanes: int) -> str:
    return kernel(lanes).register()


@jax.custom_vjp
def append_rows(
    buffers: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], start: jax.Array
) -> tuple[jax.Array, ...]:
    """Arguments as in the api. The gradient is that of the reference."""
    count = len(buffers)
    call = jax.ffi.ffi_call(
        _register(cpu.lanes()),
        [jax.ShapeDtypeStruct(buffer.shape, buffer.dtype) for buffer in buffers],
        vmap_method="sequential",
        input_output_aliases={2 + i: i for i in range(count)},
    )
    return tuple(call(start, np.array([count], np.int32), *buffers, *rows))


def _forward(buffers, rows, start):
    return append_rows(buffers, rows, start), (buffers, rows, start)


def _backward(saved, cotangent):
    buffers, rows, start = saved
    _, pull = jax.vjp(lambda *x: reference.append_rows(*x, start), buffers, rows)
    return *pull(cotangent), None


append_rows.defvjp(_forward, _backward)
