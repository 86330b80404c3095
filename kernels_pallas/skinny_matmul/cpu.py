"""The skinny product on a CPU.

XLA's matrix libraries copy the weights into an order that suits them at every call, which costs more than the product
when there are few rows, and a plain loop over the weights waits for memory. Here the weights lie in the order in which
they are read (panels), and each read is announced ahead (prefetch), so that eight rows cost about what one costs.

A panel's tile of the result, up to `ROWS` rows, stays in registers while a loop runs over the inputs:

    for k in range(K):  tile[r, :] = fma(x[r, k], panel[k, :], tile[r, :])     for every row r

So every element is one chain of fused multiply-adds in the order of k, whatever the number of rows, of threads or of
columns beside it: a row's result has the same bits alone and among others.
"""

import functools
import itertools

import jax

from kernels_pallas.cpu import Kernel, cores, lanes

ROWS = 8  # of a tile
_VECTORS = 3  # of a row of a tile: 8 x 3 sums, 3 columns and a row's value fill 32 registers
# Rows of a panel between the announcement of a read and the read, for each level of the processor's caches: the first
# has places for few reads that are under way, not enough to keep memory busy.
_AHEAD = {1: 24, 2: 128}
_LINE = 64  # bytes of a cache line
_PIECES = (
    4  # that a thread takes, one after the other: few, so that reads ahead reach into its own next panel
)
_SHARE = 1 << 16  # bytes of weights below which another thread does not pay

_CODE = """
declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})

{tiles}

; Operands of a job: 6 x, 7 panels, 8 y, 9 rows, 10 inputs, 11 columns of y.
; One panel for all rows: x [rows, inputs] times panel [inputs, {columns}] -> its columns of y [rows, columns].
define internal void @panel(ptr %job, i64 %index) {{
entry:
  %edge = alloca [{edge} x float], align 64
  %x.at = getelementptr %job, ptr %job, i64 0, i32 6
  %x = load ptr, ptr %x.at
  %panels.at = getelementptr %job, ptr %job, i64 0, i32 7
  %panels = load ptr, ptr %panels.at
  %y.at = getelementptr %job, ptr %job, i64 0, i32 8
  %y = load ptr, ptr %y.at
  %rows.at = getelementptr %job, ptr %job, i64 0, i32 9
  %rows = load i64, ptr %rows.at
  %inputs.at = getelementptr %job, ptr %job, i64 0, i32 10
  %inputs = load i64, ptr %inputs.at
  %outputs.at = getelementptr %job, ptr %job, i64 0, i32 11
  %outputs = load i64, ptr %outputs.at
  %size = mul i64 %inputs, {columns}
  %first = mul i64 %index, %size
  %panel = getelementptr float, ptr %panels, i64 %first
  %column = mul i64 %index, {columns}
  %left = sub i64 %outputs, %column
  %whole = icmp uge i64 %left, {columns}
  %stride = select i1 %whole, i64 %outputs, i64 {columns}
  br label %group
group:  ; of up to {rows} rows; the panel comes from the processor's cache after the first
  %row = phi i64 [ 0, %entry ], [ %row.next, %stored ]
  %x.row = mul i64 %row, %inputs
  %x.here = getelementptr float, ptr %x, i64 %x.row
  %y.row = mul i64 %row, %outputs
  %y.first = add i64 %y.row, %column
  %y.here = getelementptr float, ptr %y, i64 %y.first
  %into = select i1 %whole, ptr %y.here, ptr %edge
  %rest = sub i64 %rows, %row
  switch i64 %rest, label %tile.{rows} [ {cases} ]
{calls}
tiled:
  br i1 %whole, label %stored, label %edges
edges:  ; the last panel may be wider than what is left of y
  %height = call i64 @llvm.smin.i64(i64 %rest, i64 {rows})
  br label %copy.row
copy.row:
  %r = phi i64 [ 0, %edges ], [ %r.next, %copy.end ]
  %from.row = mul i64 %r, {columns}
  %to.row = mul i64 %r, %outputs
  br label %copy
copy:
  %c = phi i64 [ 0, %copy.row ], [ %c.next, %copy ]
  %from.c = add i64 %from.row, %c
  %from = getelementptr float, ptr %edge, i64 %from.c
  %value = load float, ptr %from
  %to.c = add i64 %to.row, %c
  %to = getelementptr float, ptr %y.here, i64 %to.c
  store float %value, ptr %to
  %c.next = add i64 %c, 1
  %c.more = icmp ult i64 %c.next, %left
  br i1 %c.more, label %copy, label %copy.end
copy.end:
  %r.next = add i64 %r, 1
  %r.more = icmp ult i64 %r.next, %height
  br i1 %r.more, label %copy.row, label %stored
stored:
  %row.next = add i64 %row, {rows}
  %more = icmp ult i64 %row.next, %rows
  br i1 %more, label %group, label %end
end:
  ret void
}}

define internal void @execute(ptr %frame) {{
  %job = alloca %job
  %x = call ptr @buffer(ptr %frame, i64 0)
  %panels = call ptr @buffer(ptr %frame, i64 1)
  %y = call ptr @buffer(ptr %frame, i64 -1)
  %x.data = call ptr @data(ptr %x)
  %panels.data = call ptr @data(ptr %panels)
  %y.data = call ptr @data(ptr %y)
  %count = call i64 @dim(ptr %panels, i64 0)
  %inputs = call i64 @dim(ptr %panels, i64 1)
  %rows = call i64 @dim(ptr %y, i64 0)
  %outputs = call i64 @dim(ptr %y, i64 1)
  %bytes.panel = mul i64 %inputs, {panel_bytes}
  %bytes = mul i64 %bytes.panel, %count
  %pay = udiv i64 %bytes, {share}
  %count.less = sub i64 %count, 1
  %helpers = call i64 @llvm.smin.i64(i64 %pay, i64 %count.less)
  %threads.all = add i64 %helpers, 1
  %threads = call i64 @llvm.smin.i64(i64 %threads.all, i64 {threads})
  %takes = mul i64 %threads, {pieces}
  %takes.less = sub i64 %takes, 1
  %sum = add i64 %count, %takes.less
  %at.once = udiv i64 %sum, %takes
  store %job zeroinitializer, ptr %job
  %job.count = getelementptr %job, ptr %job, i64 0, i32 2
  store i64 %count, ptr %job.count
  %job.at.once = getelementptr %job, ptr %job, i64 0, i32 3
  store i64 %at.once, ptr %job.at.once
  %job.helpers = getelementptr %job, ptr %job, i64 0, i32 4
  store i64 %helpers, ptr %job.helpers
  %job.function = getelementptr %job, ptr %job, i64 0, i32 5
  store ptr @panel, ptr %job.function
  %job.x = getelementptr %job, ptr %job, i64 0, i32 6
  store ptr %x.data, ptr %job.x
  %job.panels = getelementptr %job, ptr %job, i64 0, i32 7
  store ptr %panels.data, ptr %job.panels
  %job.y = getelementptr %job, ptr %job, i64 0, i32 8
  store ptr %y.data, ptr %job.y
  %job.rows = getelementptr %job, ptr %job, i64 0, i32 9
  store i64 %rows, ptr %job.rows
  %job.inputs = getelementptr %job, ptr %job, i64 0, i32 10
  store i64 %inputs, ptr %job.inputs
  %job.outputs = getelementptr %job, ptr %job, i64 0, i32 11
  store i64 %outputs, ptr %job.outputs
  call void @lathe_run(ptr %job)
  ret void
}}
"""


def _tile(rows: int, lanes: int) -> str:
    """The function `tile.ROWS`: x [rows, inputs] times a panel [inputs, columns], in registers until it is whole."""
    vector, columns = f"<{lanes} x float>", _VECTORS * lanes
    sums = [(r, j) for r in range(rows) for j in range(_VECTORS)]
    lines = [
        f"define internal void @tile.{rows}(ptr noalias %x, i64 %inputs, ptr noalias %panel, ptr noalias %y, "
        "i64 %stride) {",
        "entry:",
        *(f"  %x.{r}.at = mul i64 %inputs, {r}" for r in range(rows)),
        *(f"  %x.{r} = getelementptr float, ptr %x, i64 %x.{r}.at" for r in range(rows)),
        "  br label %loop",
        "loop:",
        "  %k = phi i64 [ 0, %entry ], [ %k.next, %loop ]",
        "  %w = phi ptr [ %panel, %entry ], [ %w.next, %loop ]",
        *(
            f"  %sum.{r}.{j} = phi {vector} [ zeroinitializer, %entry ], [ %new.{r}.{j}, %loop ]"
            for r, j in sums
        ),
    ]
    for (level, ahead), offset in itertools.product(_AHEAD.items(), range(0, 4 * columns, _LINE)):
        lines += [
            f"  %ahead.{level}.{offset} = getelementptr i8, ptr %w, i64 {4 * columns * ahead + offset}",
            f"  call void @llvm.prefetch.p0(ptr %ahead.{level}.{offset}, i32 0, i32 {4 - level}, i32 1)",
        ]
    for j in range(_VECTORS):
        lines += [
            f"  %w.{j}.at = getelementptr float, ptr %w, i64 {j * lanes}",
            f"  %w.{j} = load {vector}, ptr %w.{j}.at, align 4",
        ]
    for r in range(rows):
        lines += [
            f"  %v.{r}.at = getelementptr float, ptr %x.{r}, i64 %k",
            f"  %v.{r} = load float, ptr %v.{r}.at",
            f"  %v.{r}.first = insertelement {vector} poison, float %v.{r}, i32 0",
            f"  %v.{r}.all = shufflevector {vector} %v.{r}.first, {vector} poison, <{lanes} x i32> zeroinitializer",
        ]
        lines += [
            f"  %new.{r}.{j} = call {vector} @llvm.fma.v{lanes}f32({vector} %v.{r}.all, {vector} %w.{j}, "
            f"{vector} %sum.{r}.{j})"
            for j in range(_VECTORS)
        ]
    lines += [
        f"  %w.next = getelementptr float, ptr %w, i64 {columns}",
        "  %k.next = add i64 %k, 1",
        "  %more = icmp ult i64 %k.next, %inputs",
        "  br i1 %more, label %loop, label %end",
        "end:",
    ]
    for r, j in sums:
        lines += [
            *([f"  %y.{r}.at = mul i64 %stride, {r}"] if j == 0 else []),
            f"  %y.{r}.{j}.at = add i64 %y.{r}.at, {j * lanes}",
            f"  %y.{r}.{j} = getelementptr float, ptr %y, i64 %y.{r}.{j}.at",
            f"  store {vector} %new.{r}.{j}, ptr %y.{r}.{j}, align 4",
        ]
    return "\n".join([*lines, "  ret void", "}"])


@functools.cache
def kernel(lanes: int) -> Kernel:
    """The code for vectors of so many floats."""
    columns, numbers = _VECTORS * lanes, range(1, ROWS + 1)
    calls = [
        f"tile.{n}:\n  call void @tile.{n}(ptr %x.here, i64 %inputs, ptr %panel, ptr %into, i64 %stride)\n"
        "  br label %tiled"
        for n in numbers
    ]
    code = _CODE.format(
        vector=f"<{lanes} x float>",
        lanes=lanes,
        columns=columns,
        panel_bytes=4 * columns,
        rows=ROWS,
        edge=ROWS * columns,
        share=_SHARE,
        pieces=_PIECES,
        threads=cores(),
        tiles="\n\n".join(_tile(n, lanes) for n in numbers),
        cases=" ".join(f"i64 {n}, label %tile.{n}" for n in numbers),
        calls="\n".join(calls),
    )
    return Kernel(f"lathe_skinny_matmul_{lanes}", code)


def panel_columns() -> int:
    """Columns of a panel on this processor."""
    return _VECTORS * lanes()


@functools.cache
def register(lanes: int) -> str:
    """XLA's name of the kernel for vectors of so many floats; makes it known once.

    Raises Unsupported where XLA refuses it.
    """
    return kernel(lanes).register()


def skinny_matmul(x: jax.Array, panels: jax.Array, columns: int) -> jax.Array:
    """x float32 [M, K] times panels float32 [ceil(N / P), K, P] -> [M, N], N = `columns`."""
    name = register(panels.shape[2] // _VECTORS)
    out = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
    return jax.ffi.ffi_call(name, out, vmap_method="sequential")(x, panels)
