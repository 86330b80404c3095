"""The skinny product with weights of 8 or 4 bits on a CPU.

    w[k, n] = (code[k, n] - zero[k // group, n]) * scale[k // group, n]

Codes lie in panels as floats do, of 4 bits two neighbouring inputs in a byte, the first one in its low half. Up to
`cpu.ROWS` rows: a row of a panel becomes floats in registers, each rounded as on a float copy of the weights, and goes
into the sums in the same order, so that the result has the bits of the product with that copy. More rows: each panel
becomes floats once, in the processor's cache.
"""

import functools

import jax

from kernels_pallas.cpu import Kernel
from kernels_pallas.skinny_matmul import cpu
from kernels_pallas.skinny_matmul.cpu import VECTORS

_LINE = 64  # bytes of a cache line
_AHEAD = 2  # groups between the announcement of their scales and zeros and their read

_DECODE = """
declare ptr @malloc(i64)
declare void @free(ptr)
declare ptr @llvm.ptrmask.p0.i64(ptr, i64)

; A panel of codes -> floats [inputs, {columns}].
define internal void @decode(ptr noalias %panel, ptr noalias %grid, i64 %groups, i64 %group, ptr noalias %floats) {{
entry:
{loop}
  ret void
}}
"""

_PRODUCT = """
  %grids.buffer = call ptr @buffer(ptr %frame, i64 2)
  %grids = call ptr @data(ptr %grids.buffer)
  %groups = call i64 @dim(ptr %grids.buffer, i64 1)
  %group = udiv i64 %inputs, %groups
  %grid.size = mul i64 %groups, {grid_bytes}
  %grid.first = mul i64 %index, %grid.size
  %grid = getelementptr i8, ptr %grids, i64 %grid.first
  %few = icmp ule i64 %rows, {rows}
  br i1 %few, label %fused, label %copied
fused:
  call void @rows.codes(ptr %x, i64 %rows, i64 %inputs, i64 %groups, i64 %group, ptr %panel, ptr %grid, ptr %y,
                        i64 %outputs, i64 %left)
  ret void
copied:
  %bytes = mul i64 %inputs, {float_bytes}
  %bytes.more = add i64 %bytes, {line}
  %memory = call ptr @malloc(i64 %bytes.more)
  %none = icmp eq ptr %memory, null
  br i1 %none, label %fused, label %decoded
decoded:
  %line = getelementptr i8, ptr %memory, i64 {line}
  %floats = call ptr @llvm.ptrmask.p0.i64(ptr %line, i64 -{line})  ; rows of floats begin cache lines
  call void @decode(ptr %panel, ptr %grid, i64 %groups, i64 %group, ptr %floats)
  call void @rows.floats(ptr %x, i64 %rows, i64 %inputs, i64 1, i64 %inputs, ptr %floats, ptr null, ptr %y,
                         i64 %outputs, i64 %left)
  call void @free(ptr %memory)"""


def _grid(lanes: int) -> list[str]:
    columns = VECTORS * lanes
    lines = [
        f"  %grid.at = mul i64 %g, {8 * columns}",
        "  %grid.g = getelementptr i8, ptr %grid, i64 %grid.at",
    ]
    for offset in range(0, 8 * columns, _LINE):
        lines += [
            f"  %grid.ahead.{offset} = getelementptr i8, ptr %grid.g, i64 {8 * columns * _AHEAD + offset}",
            f"  call void @llvm.prefetch.p0(ptr %grid.ahead.{offset}, i32 0, i32 3, i32 1)",
        ]
    for number, name in enumerate(("scale", "zero")):
        for j in range(VECTORS):
            lines += [
                f"  %{name}.{j}.at = getelementptr float, ptr %grid.g, i64 {number * columns + j * lanes}",
                f"  %{name}.{j} = load <{lanes} x float>, ptr %{name}.{j}.at, align 4",
            ]
    return lines


def _decode(bits: int, lanes: int) -> list[str]:
    wide, vector = f"<{lanes} x i32>", f"<{lanes} x float>"
    lines = []
    for j in range(VECTORS):
        lines += [
            f"  %byte.{j}.at = getelementptr i8, ptr %w, i64 {j * lanes}",
            f"  %byte.{j} = load <{lanes} x i8>, ptr %byte.{j}.at, align 1",
            f"  %code.{j} = zext <{lanes} x i8> %byte.{j} to {wide}",
        ]
    for i in range(8 // bits):
        for j in range(VECTORS):
            code = f"%code.{j}"
            if bits == 4:
                operation, number = ("and", 15) if i == 0 else ("lshr", 4)
                numbers = ", ".join([f"i32 {number}"] * lanes)
                lines.append(f"  %code.{i}.{j} = {operation} {wide} {code}, <{numbers}>")
                code = f"%code.{i}.{j}"
            lines += [
                f"  %float.{i}.{j} = sitofp {wide} {code} to {vector}",
                f"  %steps.{i}.{j} = fsub {vector} %float.{i}.{j}, %zero.{j}",
                f"  %w.{i}.{j} = fmul {vector} %steps.{i}.{j}, %scale.{j}",
            ]
    return lines


def _store(inputs: int, lanes: int) -> list[str]:
    """Writes a row's weights to their places in %floats."""
    columns = VECTORS * lanes
    lines = [
        f"  %to.first = mul i64 %k, {columns}",
        "  %to = getelementptr float, ptr %floats, i64 %to.first",
    ]
    for i in range(inputs):
        for j in range(VECTORS):
            lines += [
                f"  %to.{i}.{j} = getelementptr float, ptr %to, i64 {i * columns + j * lanes}",
                f"  store <{lanes} x float> %w.{i}.{j}, ptr %to.{i}.{j}, align 4",
            ]
    return lines


@functools.cache
def kernel(bits: int, lanes: int) -> Kernel:
    """The code for codes of so many bits and vectors of so many floats."""
    columns = VECTORS * lanes
    layout = cpu.Layout("codes", 8 // bits, 1, _grid, functools.partial(_decode, bits))
    functions = [
        cpu.functions(cpu.FLOATS, lanes),
        cpu.functions(layout, lanes),
        _DECODE.format(
            columns=columns, loop="\n".join(cpu.loop(layout, lanes, [], _store(layout.inputs, lanes)))
        ),
    ]
    product = _PRODUCT.format(grid_bytes=8 * columns, float_bytes=4 * columns, rows=cpu.ROWS, line=_LINE)
    return cpu.make_kernel(
        f"lathe_skinny_code_matmul_{bits}_{lanes}", lanes, columns, "\n\n".join(functions), product
    )


@functools.cache
def register(bits: int, lanes: int) -> str:
    """XLA's name of the kernel; makes it known once.

    Raises Unsupported where XLA refuses it.
    """
    return kernel(bits, lanes).register()


def skinny_code_matmul(x: jax.Array, codes: jax.Array, grid: jax.Array, bits: int, columns: int) -> jax.Array:
    """x float32 [M, K] times codes uint8 [ceil(N / P), K * bits / 8, P] on the grid float32 [ceil(N / P), groups, 2, P]
    of scales and zeros -> [M, N], N = `columns`."""
    name = register(bits, codes.shape[2] // VECTORS)
    out = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
    return jax.ffi.ffi_call(name, out, vmap_method="sequential")(x, codes, grid)
