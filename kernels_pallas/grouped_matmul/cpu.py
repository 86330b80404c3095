"""The grouped product on a CPU, by kernels in panels (`kernels_pallas.skinny_matmul`).

Groups of consecutive rows, each times the matrix of its expert. A piece is a panel of an expert and a block of its
rows; experts without rows make no piece, so their weights are never read and time does not grow with their number.

Every element is one chain of fused multiply-adds in the order of the inputs, as in the skinny product: a row's result
has the same bits alone and among others.
"""

import functools
import itertools

import jax

from kernels_pallas.common import Unsupported
from kernels_pallas.cpu import Kernel
from kernels_pallas.cpu_math import constant, exponential
from kernels_pallas.skinny_matmul import panel_columns
from kernels_pallas.skinny_matmul.cpu import FLOATS, ROWS, VECTORS, tile

_BLOCK = 256  # rows of a piece at most: they stay in the processor's second cache while the panels pass
_TAKES = 4  # of a thread, where reading the weights is all the work
_SHARE = 1 << 16  # bytes of weights, once for every tile of rows, below which another thread does not pay

_CODE = """
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

; x, panels, y, blocks; panels of an expert, inputs, columns of y; panels of the gate or null
%product = type {{ ptr, ptr, ptr, ptr, i64, i64, i64, ptr }}
; rows of one expert: the expert, the first row, their number
%block = type {{ i64, i64, i64 }}

{tiles}

; The tile of a number: vectors times {rows} plus rows.
define internal void @tile(i64 %number, ptr %x, i64 %inputs, ptr %panel, ptr %y, i64 %stride) {{
entry:
  switch i64 %number, label %end [ {cases} ]
{calls}
end:
  ret void
}}

{activation}

; One panel for the rows of one block. Operand 6 of the job is its %product.
define internal void @panel(ptr %job, i64 %index) {{
entry:
  %edge = alloca [{edge} x float], align 64
  %gated = alloca [{edge} x float], align 64
  %product.at = getelementptr %job, ptr %job, i64 0, i32 6
  %product.ptr = load ptr, ptr %product.at
  %product = load %product, ptr %product.ptr
  %x.all = extractvalue %product %product, 0
  %panels = extractvalue %product %product, 1
  %y.all = extractvalue %product %product, 2
  %blocks = extractvalue %product %product, 3
  %count = extractvalue %product %product, 4
  %inputs = extractvalue %product %product, 5
  %outputs = extractvalue %product %product, 6
  %gates = extractvalue %product %product, 7
  %alone = icmp eq ptr %gates, null
  %number = udiv i64 %index, %count
  %place = urem i64 %index, %count
  %block.at = getelementptr %block, ptr %blocks, i64 %number
  %block = load %block, ptr %block.at
  %expert = extractvalue %block %block, 0
  %start = extractvalue %block %block, 1
  %rows = extractvalue %block %block, 2
  %expert.first = mul i64 %expert, %count
  %which = add i64 %expert.first, %place
  %size = mul i64 %inputs, {columns}
  %first = mul i64 %which, %size
  %panel = getelementptr float, ptr %panels, i64 %first
  %gate = getelementptr float, ptr %gates, i64 %first
  %x.start = mul i64 %start, %inputs
  %x = getelementptr float, ptr %x.all, i64 %x.start
  %y.start = mul i64 %start, %outputs
  %y = getelementptr float, ptr %y.all, i64 %y.start
  %column = mul i64 %place, {columns}
  %left = sub i64 %outputs, %column
  %used = call i64 @llvm.smin.i64(i64 %left, i64 {columns})
  %rest.columns = urem i64 %used, {lanes}
  %whole = icmp eq i64 %rest.columns, 0
  %used.up = add i64 %used, {lanes_less}
  %vectors = udiv i64 %used.up, {lanes}
  %kind = mul i64 %vectors, {rows}
  %stride = select i1 %whole, i64 %outputs, i64 {columns}
  br label %group
group:  ; of up to {rows} rows
  %row = phi i64 [ 0, %entry ], [ %row.next, %stored ]
  %x.row = mul i64 %row, %inputs
  %x.here = getelementptr float, ptr %x, i64 %x.row
  %y.row = mul i64 %row, %outputs
  %y.first = add i64 %y.row, %column
  %y.here = getelementptr float, ptr %y, i64 %y.first
  %into = select i1 %whole, ptr %y.here, ptr %edge
  %rest = sub i64 %rows, %row
  %height = call i64 @llvm.smin.i64(i64 %rest, i64 {rows})
  %which.tile = add i64 %kind, %height
  br i1 %alone, label %plain, label %both
plain:
  call void @tile(i64 %which.tile, ptr %x.here, i64 %inputs, ptr %panel, ptr %into, i64 %stride)
  br label %tiled
both:
  call void @tile(i64 %which.tile, ptr %x.here, i64 %inputs, ptr %gate, ptr %gated, i64 {columns})
  call void @tile(i64 %which.tile, ptr %x.here, i64 %inputs, ptr %panel, ptr %edge, i64 {columns})
  call void @activate(i64 %height, i64 %vectors, ptr %gated, ptr %edge, ptr %into, i64 %stride)
  br label %tiled
tiled:
  br i1 %whole, label %stored, label %edges
edges:  ; the last vector is wider than what is left of y
  %bytes = mul i64 %left, 4
  br label %copy
copy:
  %r = phi i64 [ 0, %edges ], [ %r.next, %copy ]
  %from.at = mul i64 %r, {columns}
  %from = getelementptr float, ptr %edge, i64 %from.at
  %to.at = mul i64 %r, %outputs
  %to = getelementptr float, ptr %y.here, i64 %to.at
  call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 %bytes, i1 false)
  %r.next = add i64 %r, 1
  %r.more = icmp ult i64 %r.next, %height
  br i1 %r.more, label %copy, label %stored
stored:
  %row.next = add i64 %row, {rows}
  %more = icmp ult i64 %row.next, %rows
  br i1 %more, label %group, label %end
end:
  ret void
}}

; Fills rows first to last - 1 with zeros.
define internal void @clear(ptr %y, i64 %first, i64 %last, i64 %outputs) {{
entry:
  %any = icmp slt i64 %first, %last
  br i1 %any, label %fill, label %end
fill:
  %count = sub i64 %last, %first
  %row = mul i64 %outputs, 4
  %bytes = mul i64 %count, %row
  %offset = mul i64 %first, %row
  %at = getelementptr i8, ptr %y, i64 %offset
  call void @llvm.memset.p0.i64(ptr %at, i8 0, i64 %bytes, i1 false)
  br label %end
end:
  ret void
}}

define internal void @execute(ptr %frame) {{
entry:
  %product = alloca %product
  %x.buffer = call ptr @buffer(ptr %frame, i64 0)
  %panels.buffer = call ptr @buffer(ptr %frame, i64 1)
  %starts.buffer = call ptr @buffer(ptr %frame, i64 2)
  %sizes.buffer = call ptr @buffer(ptr %frame, i64 3)
  %y.buffer = call ptr @buffer(ptr %frame, i64 -1)
  %arguments.at = getelementptr i8, ptr %frame, i64 56
  %arguments = load i64, ptr %arguments.at
  %has.gate = icmp eq i64 %arguments, 5
  %last.argument = select i1 %has.gate, i64 4, i64 0
  %gate.buffer = call ptr @buffer(ptr %frame, i64 %last.argument)
  %gate.data = call ptr @data(ptr %gate.buffer)
  %gate = select i1 %has.gate, ptr %gate.data, ptr null
  %x = call ptr @data(ptr %x.buffer)
  %panels = call ptr @data(ptr %panels.buffer)
  %starts = call ptr @data(ptr %starts.buffer)
  %sizes = call ptr @data(ptr %sizes.buffer)
  %y = call ptr @data(ptr %y.buffer)
  %groups = call i64 @dim(ptr %starts.buffer, i64 0)
  %experts = call i64 @dim(ptr %panels.buffer, i64 0)
  %count = call i64 @dim(ptr %panels.buffer, i64 1)
  %inputs = call i64 @dim(ptr %panels.buffer, i64 2)
  %rows = call i64 @dim(ptr %y.buffer, i64 0)
  %outputs = call i64 @dim(ptr %y.buffer, i64 1)
  %full = udiv i64 %rows, {block}
  %most = add i64 %full, %groups
  %blocks = alloca %block, i64 %most
  br label %group
group:
  %g = phi i64 [ 0, %entry ], [ %g.next, %next ]
  %made = phi i64 [ 0, %entry ], [ %made.after, %next ]
  %tiles = phi i64 [ 0, %entry ], [ %tiles.after, %next ]
  %end = phi i64 [ 0, %entry ], [ %end.after, %next ]
  %start.at = getelementptr i32, ptr %starts, i64 %g
  %start.32 = load i32, ptr %start.at
  %start.given = sext i32 %start.32 to i64
  %start = call i64 @llvm.smax.i64(i64 %start.given, i64 %end)
  %size.at = getelementptr i32, ptr %sizes, i64 %g
  %size.32 = load i32, ptr %size.at
  %size.given = sext i32 %size.32 to i64
  %room = sub i64 %rows, %start
  %size = call i64 @llvm.smin.i64(i64 %size.given, i64 %room)
  %any = icmp sgt i64 %size, 0
  br i1 %any, label %some, label %next
some:
  call void @clear(ptr %y, i64 %end, i64 %start, i64 %outputs)
  %stop = add i64 %start, %size
  %expert = urem i64 %g, %experts
  br label %block
block:
  %row = phi i64 [ %start, %some ], [ %row.next, %block ]
  %b = phi i64 [ %made, %some ], [ %b.next, %block ]
  %rest = sub i64 %stop, %row
  %taken = call i64 @llvm.smin.i64(i64 %rest, i64 {block})
  %value.0 = insertvalue %block poison, i64 %expert, 0
  %value.1 = insertvalue %block %value.0, i64 %row, 1
  %value.2 = insertvalue %block %value.1, i64 %taken, 2
  %block.at = getelementptr %block, ptr %blocks, i64 %b
  store %block %value.2, ptr %block.at
  %b.next = add i64 %b, 1
  %row.next = add i64 %row, %taken
  %block.more = icmp slt i64 %row.next, %stop
  br i1 %block.more, label %block, label %blocked
blocked:
  %size.up = add i64 %size, {rows_less}
  %size.tiles = udiv i64 %size.up, {rows}
  %tiles.more = add i64 %tiles, %size.tiles
  br label %next
next:
  %made.after = phi i64 [ %made, %group ], [ %b.next, %blocked ]
  %tiles.after = phi i64 [ %tiles, %group ], [ %tiles.more, %blocked ]
  %end.after = phi i64 [ %end, %group ], [ %stop, %blocked ]
  %g.next = add i64 %g, 1
  %more = icmp ult i64 %g.next, %groups
  br i1 %more, label %group, label %share
share:
  call void @clear(ptr %y, i64 %end.after, i64 %rows, i64 %outputs)
  %none = icmp eq i64 %made.after, 0
  br i1 %none, label %done, label %run
run:
  %pieces = mul i64 %made.after, %count
  %panel.bytes = mul i64 %inputs, {panel_bytes}
  %matrix.bytes = mul i64 %panel.bytes, %count
  %bytes = mul i64 %matrix.bytes, %tiles.after
  %pay = udiv i64 %bytes, {share}
  ; Panels that follow each other are read ahead. Where each meets several tiles that matters less than equal shares.
  %thin = icmp eq i64 %tiles.after, %made.after
  %takes = select i1 %thin, i64 {takes}, i64 0
  %product.0 = insertvalue %product poison, ptr %x, 0
  %product.1 = insertvalue %product %product.0, ptr %panels, 1
  %product.2 = insertvalue %product %product.1, ptr %y, 2
  %product.3 = insertvalue %product %product.2, ptr %blocks, 3
  %product.4 = insertvalue %product %product.3, i64 %count, 4
  %product.5 = insertvalue %product %product.4, i64 %inputs, 5
  %product.6 = insertvalue %product %product.5, i64 %outputs, 6
  %product.7 = insertvalue %product %product.6, ptr %gate, 7
  store %product %product.7, ptr %product
  call void @share(ptr @panel, ptr %product, i64 %pieces, i64 %pay, i64 %takes)
  br label %done
done:
  ret void
}}
"""


def _silu(lanes: int) -> str:
    """The function `activate`: silu(gate) * up of a tile, gate and up [rows, columns] -> y of that stride."""
    vector, columns = f"<{lanes} x float>", VECTORS * lanes
    return "\n".join(
        [
            "define internal void @activate(i64 %rows, i64 %vectors, ptr %gate, ptr %up, ptr %y, i64 %stride) {",
            "entry:",
            "  br label %row",
            "row:",
            "  %r = phi i64 [ 0, %entry ], [ %r.next, %row.end ]",
            f"  %from.row = mul i64 %r, {columns}",
            "  %to.row = mul i64 %r, %stride",
            "  br label %vector",
            "vector:",
            "  %v = phi i64 [ 0, %row ], [ %v.next, %vector ]",
            f"  %column = mul i64 %v, {lanes}",
            "  %from = add i64 %from.row, %column",
            "  %to = add i64 %to.row, %column",
            "  %g.at = getelementptr float, ptr %gate, i64 %from",
            f"  %g = load {vector}, ptr %g.at, align 4",
            "  %u.at = getelementptr float, ptr %up, i64 %from",
            f"  %u = load {vector}, ptr %u.at, align 4",
            f"  %minus = fneg {vector} %g",
            f"  %e = call {vector} @exp({vector} %minus)",
            f"  %below = fadd {vector} %e, {constant(1)}",
            f"  %silu = fdiv {vector} %g, %below",
            f"  %product = fmul {vector} %silu, %u",
            "  %y.at = getelementptr float, ptr %y, i64 %to",
            f"  store {vector} %product, ptr %y.at, align 4",
            "  %v.next = add i64 %v, 1",
            "  %v.more = icmp ult i64 %v.next, %vectors",
            "  br i1 %v.more, label %vector, label %row.end",
            "row.end:",
            "  %r.next = add i64 %r, 1",
            "  %r.more = icmp ult i64 %r.next, %rows",
            "  br i1 %r.more, label %row, label %end",
            "end:",
            "  ret void",
            "}",
        ]
    )


@functools.cache
def kernel(lanes: int) -> Kernel:
    """The code for vectors of so many floats."""
    columns = VECTORS * lanes
    kinds = list(itertools.product(range(1, ROWS + 1), range(1, VECTORS + 1)))
    calls = [
        f"tile.{n}.{v}:\n"
        f"  call void @tile.{FLOATS.name}.{n}.{v}(ptr %x, i64 %inputs, i64 1, i64 %inputs, ptr %panel, ptr null, "
        "ptr %y, i64 %stride)\n"
        "  ret void"
        for n, v in kinds
    ]
    code = _CODE.format(
        vector=f"<{lanes} x float>",
        lanes=lanes,
        lanes_less=lanes - 1,
        columns=columns,
        panel_bytes=4 * columns,
        rows=ROWS,
        rows_less=ROWS - 1,
        activation=exponential(lanes) + "\n\n" + _silu(lanes),
        edge=ROWS * columns,
        block=_BLOCK,
        share=_SHARE,
        takes=_TAKES,
        tiles="\n\n".join(tile(n, FLOATS, lanes, v) for n, v in kinds),
        cases=" ".join(f"i64 {v * ROWS + n}, label %tile.{n}.{v}" for n, v in kinds),
        calls="\n".join(calls),
    )
    return Kernel(f"lathe_grouped_matmul_{lanes}", code)


@functools.cache
def register(lanes: int) -> str:
    """XLA's name of the kernel for vectors of so many floats; makes it known once.

    Raises Unsupported where XLA refuses it.
    """
    return kernel(lanes).register()


def grouped_panels(
    x: jax.Array,
    panels: jax.Array,
    starts: jax.Array,
    sizes: jax.Array,
    columns: int,
    gate: jax.Array | None = None,
) -> jax.Array:
    """x float32 [M, K] by panels float32 [E, ceil(N / P), K, P] of experts (`pack`) -> [M, N], N = `columns`.

    Rows starts[g] to starts[g] + sizes[g] - 1 are multiplied by the kernel of expert g mod E; starts, sizes int32[G],
    G a multiple of E. Groups that have rows lie in the order of g and do not overlap. Rows of no group become 0. There
    is no gradient.

    gate: panels as `panels`, for silu(x gate) * (x panels) instead.

    Raises Unsupported for other dtypes and shapes.
    """
    experts, count, inputs, width = panels.shape
    if not x.dtype == panels.dtype == "float32":
        raise Unsupported(f"x is {x.dtype}, the weights are {panels.dtype}: the kernel takes float32")
    if width != panel_columns():
        raise Unsupported(f"panels of {width} columns: this processor's have {panel_columns()}")
    if x.shape[1] != inputs or not inputs:
        raise Unsupported(f"x has {x.shape[1]} columns, the weights have {inputs} rows")
    if not (count - 1) * width < columns <= count * width:
        raise Unsupported(f"{count} panels of {width} columns do not hold {columns} columns")
    if starts.shape != sizes.shape or not experts or not starts.size or starts.size % experts:
        raise Unsupported(
            f"{starts.shape} starts and {sizes.shape} sizes are not of groups of {experts} experts"
        )
    if gate is not None and (gate.shape, gate.dtype) != (panels.shape, panels.dtype):
        raise Unsupported(
            f"the gate is {gate.dtype}{list(gate.shape)}, the weights {panels.dtype}{list(panels.shape)}"
        )
    name = register(width // VECTORS)
    call = jax.ffi.ffi_call(
        name, jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype), vmap_method="sequential"
    )
    return call(x, panels, starts.astype("int32"), sizes.astype("int32"), *([] if gate is None else [gate]))
