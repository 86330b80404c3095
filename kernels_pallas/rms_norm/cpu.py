"""RMSNorm on a CPU: a row is read from memory once forward, and once with its cotangent backward.

With i = 1 / sqrt(mean(x^2) + epsilon) of a row, kept from forward to backward:

    y = x i scale
    dx = i scale dy - x i^3 mean(x scale dy)
    dscale = sum over rows of dy x i

A piece is a block of `BLOCK` rows. A block adds up a dscale of its own, row by row, and at the end one thread adds
those of all blocks, one after the other: every sum has one order, whatever the number of threads.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.cpu import Kernel
from kernels_pallas.cpu_code import Function

BLOCK = 64  # rows of a piece
_AT_ONCE = 4  # vectors, whose sums do not wait for each other
_ROWS = 4  # of the backward pass at once: the block's sums are read and written once for all of them
_SHARE = 1 << 16  # floats below which another thread does not pay


def _execute(operands: dict[str, int], lanes: int) -> tuple[Function, str, str, str]:
    """The function that XLA's call runs, after its threads have done their work; rows, groups, width of a group."""
    f = Function("execute", "ptr %frame", lanes=lanes)
    rows, groups, width = _read(f, "%frame", operands)
    size = f.mul(f.mul(rows, groups), width)
    pay = f.div(size, _SHARE)
    f.call("share.long", "ptr %frame", "ptr @block", "ptr %frame", f"i64 {f.ceil(rows, BLOCK)}", f"i64 {pay}")
    return f, rows, groups, width


def _block(operands: dict[str, int], lanes: int) -> tuple[Function, str, str, str, str]:
    """The function of a piece; its first row and the one after its last, groups, width of a group."""
    f = Function("block", "ptr %job", "i64 %index", lanes=lanes)
    rows, groups, width = _read(f, f.field("%job", "%job", 6, "ptr"), operands)
    first = f.mul("%index", BLOCK)
    return f, first, f.min(f.add(first, BLOCK), rows), groups, width


def _read(f: Function, frame: str, operands: dict[str, int]) -> tuple[str, str, str]:
    """Operands by their names, and the sizes of x [rows, groups, width of a group]."""
    rows, groups, width = f.arrays(frame, operands)["x"].dims(3)
    return rows, groups, width


def _mean(f: Function, sums: list[str], width: str) -> str:
    """The sum of all floats of the vectors, divided by the width."""
    while len(sums) > 1:
        sums = [f.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    count = f.value(f"uitofp i64 {width} to float")
    return f.value(f"fdiv float {f.total(sums[0])}, {count}")


@functools.cache
def forward_kernel(lanes: int) -> Kernel:
    """x [N, G, P], scale [G, P], epsilon [1] -> y [N, G, P], i [N, G]."""
    operands = {"x": 0, "scale": 1, "epsilon": 2, "y": -1, "inverse": -2}
    f, first, last, groups, width = _block(operands, lanes)
    epsilon = f.load("%epsilon", "float")
    with f.loop(last, start=first) as row, f.loop(groups) as group:
        place = f.add(f.mul(row, groups), group)
        x, y = (f.at(name, f.mul(place, width)) for name in ("%x", "%y"))
        scale = f.at("%scale", f.mul(group, width))
        sums = [f.variable() for _ in range(_AT_ONCE)]
        for here, i, mask in f.vectors(width, _AT_ONCE):
            value = f.read(f.at(x, here), mask)
            f.store(f.fma(value, value, f.load(sums[i])), sums[i])
        square = f.value(f"fadd float {_mean(f, [f.load(s) for s in sums], width)}, {epsilon}")
        inverse = f.value(f"fdiv float 1.0, {f.value(f'call float @llvm.sqrt.f32(float {square})')}")
        f.store(inverse, f.at("%inverse", place), "float")
        factor = f.splat(inverse)
        for here, _, mask in f.vectors(width, _AT_ONCE):
            value = f.fmul(f.read(f.at(x, here), mask), factor)
            f.write(f.fmul(value, f.read(f.at(scale, here), mask)), f.at(y, here), mask)
    execute, *_ = _execute(operands, lanes)
    return Kernel(f"lathe_rms_norm_{lanes}", "\n".join([f.text(), execute.text()]))


def _rows_backward(f: Function, count: int, row: str, groups: str, width: str) -> None:
    """dx of `count` rows from `row` on, and what they add to their block's dscale."""
    with f.loop(groups) as group:
        places = [f.add(f.mul(f.add(row, r), groups), group) for r in range(count)]
        offsets = [f.mul(place, width) for place in places]
        scale, sums = (f.at(start, f.mul(group, width)) for start in ("%scale", "%sums"))
        factors, shares = [], []
        for place, offset in zip(places, offsets, strict=True):
            x, dy = f.at("%x", offset), f.at("%dy", offset)
            dots = [f.variable() for _ in range(_AT_ONCE)]
            for here, i, mask in f.vectors(width, _AT_ONCE):
                scaled = f.fmul(f.read(f.at(dy, here), mask), f.read(f.at(scale, here), mask))
                f.store(f.fma(scaled, f.read(f.at(x, here), mask), f.load(dots[i])), dots[i])
            inverse = f.load(f.at("%inverse", place), "float")
            share = _mean(f, [f.load(d) for d in dots], width)
            for _ in range(3):
                share = f.value(f"fmul float {share}, {inverse}")
            factors.append(f.splat(inverse))
            shares.append(f.splat(share))
        for here, _, mask in f.vectors(width):
            factor = f.read(f.at(scale, here), mask)
            total = f.read(f.at(sums, here), mask)
            for offset, inverse, share in zip(offsets, factors, shares, strict=True):
                value = f.read(f.at("%x", offset, here), mask)
                scaled = f.fmul(f.read(f.at("%dy", offset, here), mask), inverse)
                total = f.fma(scaled, value, total)
                dx = f.fsub(f.fmul(scaled, factor), f.fmul(value, share))
                f.write(dx, f.at("%dx", offset, here), mask)
            f.write(total, f.at(sums, here), mask)


@functools.cache
def backward_kernel(lanes: int) -> Kernel:
    """x [N, G, P], scale [G, P], i [N, G], dy [N, G, P] -> dx [N, G, P], dscale [G, P], dscale of blocks [B, G, P]."""
    operands = {"x": 0, "scale": 1, "inverse": 2, "dy": 3, "dx": -1, "dscale": -2, "blocks": -3}
    f, first, last, groups, width = _block(operands, lanes)
    whole = f.mul(groups, width)
    f.line(f"%sums = getelementptr float, ptr %blocks, i64 {f.mul('%index', whole)}")
    for here, _, mask in f.vectors(whole):
        f.write("zeroinitializer", f.at("%sums", here), mask)
    even = f.sub(last, f.rem(last, _ROWS))  # blocks begin at a multiple
    with f.loop(even, start=first, step=_ROWS) as row:
        _rows_backward(f, _ROWS, row, groups, width)
    with f.loop(last, start=even) as row:
        _rows_backward(f, 1, row, groups, width)

    execute, rows, groups, width = _execute(operands, lanes)
    whole = execute.mul(groups, width)
    for here, _, mask in execute.vectors(whole, _AT_ONCE):
        total = execute.variable()
        with execute.loop(execute.ceil(rows, BLOCK)) as block:
            more = execute.read(execute.at("%blocks", execute.mul(block, whole), here), mask)
            execute.store(execute.fadd(execute.load(total), more), total)
        execute.write(execute.load(total), execute.at("%dscale", here), mask)
    return Kernel(f"lathe_rms_norm_backward_{lanes}", "\n".join([f.text(), execute.text()]))


@functools.cache
def register(lanes: int) -> tuple[str, str]:
    """XLA's names of the kernels for vectors of so many floats, forward and backward; makes them known once.

    Raises Unsupported where XLA refuses them.
    """
    return forward_kernel(lanes).register(), backward_kernel(lanes).register()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, lanes: int) -> jax.Array:
    """x float32[N, G, P], scale [G, P] -> [N, G, P], by vectors of so many floats."""
    return _forward(x, scale, epsilon, lanes)[0]


def _forward(
    x: jax.Array, scale: jax.Array, epsilon: float, lanes: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[:2], x.dtype)
    call = jax.ffi.ffi_call(register(lanes)[0], out, vmap_method="sequential")
    y, inverse = call(x, scale, jnp.full(1, epsilon, x.dtype))
    return y, (x, scale, inverse)


def _backward(
    epsilon: float, lanes: int, saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, scale, _ = saved
    blocks = (-(-len(x) // BLOCK), *scale.shape)
    out = tuple(jax.ShapeDtypeStruct(shape, x.dtype) for shape in (x.shape, scale.shape, blocks))
    call = jax.ffi.ffi_call(register(lanes)[1], out, vmap_method="sequential")
    dx, dscale, _ = call(*saved, dy)
    return dx, dscale


rms_norm.defvjp(_forward, _backward)
