"""The skinny product on a CPU.

XLA's matrix libraries copy the weights into an order that suits them at every call, which costs more than the product
when there are few rows, and a plain loop over the weights waits for memory. Here the weights lie in the order in which
they are read (panels), and each read is announced ahead (prefetch), so that eight rows cost about what one costs.

A panel's tile of the result, up to `ROWS` rows, stays in registers while a loop runs over the inputs:

    for k in range(K):  tile[r, :] = fma(x[r, k], panel[k, :], tile[r, :])     for every row r

So every element is one chain of fused multiply-adds in the order of k, whatever the number of rows, of threads or of
columns beside it: a row's result has the same bits alone and among others.

The parts of the code serve weights that are kept in fewer bits, too (`kernels_pallas.skinny_matmul.codes`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax

from kernels_pallas.cpu import Kernel, lanes

ROWS = 8  # of a tile
VECTORS = 3  # of a row of a tile: 8 x 3 sums, 3 columns and a row's value fill 32 registers
# Floats of a column between the announcement of a read and the read, for each level of the processor's caches: the
# first has places for few reads that are under way, not enough to keep memory busy.
_AHEAD = {1: 24, 2: 128}
_LINE = 64  # bytes of a cache line
# Takes of a thread, of neighbouring panels: few, so that reads ahead reach into its own next panel.
_TAKES_OF_A_THREAD = 4
_SHARE = 1 << 14  # weights below which another thread does not pay

# What a tile's function takes: x [rows, inputs], whose inputs are groups of `group`, a panel with its scales and zeros,
# and y [rows, columns] with the distance of its rows.
_TAKES = (
    "ptr noalias %x, i64 %inputs, i64 %groups, i64 %group, ptr noalias %panel, ptr noalias %grid, ptr noalias %y, "
    "i64 %stride"
)
_GIVES = "ptr %x.here, i64 %inputs, i64 %groups, i64 %group, ptr %panel, ptr %grid, ptr %y.here, i64 %stride"

# One panel for all rows: x [rows, inputs] times the panel -> columns of y [rows, outputs], `left` of them from %y on.
_ROWS = """
define internal void @rows.{name}(ptr %x, i64 %rows, i64 %inputs, i64 %groups, i64 %group, ptr %panel, ptr %grid,
                                  ptr %y, i64 %outputs, i64 %left) {{
entry:
  %edge = alloca [{edge} x float], align 64
  %whole = icmp uge i64 %left, {columns}
  %stride = select i1 %whole, i64 %outputs, i64 {columns}
  br label %some
some:  ; up to {rows} rows; the panel comes from the processor's cache after the first
  %row = phi i64 [ 0, %entry ], [ %row.next, %stored ]
  %x.row = mul i64 %row, %inputs
  %x.here = getelementptr float, ptr %x, i64 %x.row
  %y.row = mul i64 %row, %outputs
  %y.there = getelementptr float, ptr %y, i64 %y.row
  %y.here = select i1 %whole, ptr %y.there, ptr %edge
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
  %to = getelementptr float, ptr %y.there, i64 %to.c
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
  br i1 %more, label %some, label %end
end:
  ret void
}}
"""

# The job: panels that threads share. Arguments of the call: x [rows, inputs], panels, what `product` reads besides.
_CODE = """
declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})

{functions}

define internal void @panel(ptr %job, i64 %index) {{
entry:
  %frame.at = getelementptr %job, ptr %job, i64 0, i32 6
  %frame = load ptr, ptr %frame.at
  %x.buffer = call ptr @buffer(ptr %frame, i64 0)
  %x = call ptr @data(ptr %x.buffer)
  %panels.buffer = call ptr @buffer(ptr %frame, i64 1)
  %panels = call ptr @data(ptr %panels.buffer)
  %y.buffer = call ptr @buffer(ptr %frame, i64 -1)
  %y.data = call ptr @data(ptr %y.buffer)
  %rows = call i64 @dim(ptr %x.buffer, i64 0)
  %inputs = call i64 @dim(ptr %x.buffer, i64 1)
  %outputs = call i64 @dim(ptr %y.buffer, i64 1)
  %height = call i64 @dim(ptr %panels.buffer, i64 1)
  %size = mul i64 %height, {row_bytes}
  %first = mul i64 %index, %size
  %panel = getelementptr i8, ptr %panels, i64 %first
  %column = mul i64 %index, {columns}
  %left = sub i64 %outputs, %column
  %y = getelementptr float, ptr %y.data, i64 %column
{product}
  ret void
}}

define internal void @execute(ptr %frame) {{
  %x = call ptr @buffer(ptr %frame, i64 0)
  %panels = call ptr @buffer(ptr %frame, i64 1)
  %inputs = call i64 @dim(ptr %x, i64 1)
  %count = call i64 @dim(ptr %panels, i64 0)
  %columns = mul i64 %count, {columns}
  %weights = mul i64 %columns, %inputs
  %pay = udiv i64 %weights, {share}
  call void @share(ptr @panel, ptr %frame, i64 %count, i64 %pay, i64 {takes})
  ret void
}}
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the weights of a panel lie.

    name: of the functions for it.
    inputs: that share a row of the panel.
    bytes: of a column of such a row.
    grid: IR at the beginning of a group, from %grid and the group's number %g.
    weights: IR that makes the weights %w.I.J, vector J of input I, of the row at %w.
    """

    name: str
    inputs: int
    bytes: int
    grid: Callable[[int], list[str]]
    weights: Callable[[int], list[str]]


def loop(layout: Layout, lanes: int, sums: list[str], body: list[str], vectors: int = VECTORS) -> list[str]:
    """IR that runs over the rows of a panel, from the label `entry` to the label `end`, with the number %k of the
    first input of a row. sums: names of vectors %sum.NAME that begin as zeros, and that `body` makes %new.NAME of, from
    the first `vectors` of a row of the panel."""
    vector, row_bytes = f"<{lanes} x float>", layout.bytes * VECTORS * lanes
    lines = [
        "  br label %group.begin",
        "group.begin:",
        "  %g = phi i64 [ 0, %entry ], [ %g.next, %group.end ]",
        "  %k.first = phi i64 [ 0, %entry ], [ %k.next, %group.end ]",
        "  %w.first = phi ptr [ %panel, %entry ], [ %w.next, %group.end ]",
        *(
            f"  %first.{name} = phi {vector} [ zeroinitializer, %entry ], [ %new.{name}, %group.end ]"
            for name in sums
        ),
        *layout.grid(lanes),
        "  %k.last = add i64 %k.first, %group",
        "  br label %loop",
        "loop:",
        "  %k = phi i64 [ %k.first, %group.begin ], [ %k.next, %loop ]",
        "  %w = phi ptr [ %w.first, %group.begin ], [ %w.next, %loop ]",
        *(
            f"  %sum.{name} = phi {vector} [ %first.{name}, %group.begin ], [ %new.{name}, %loop ]"
            for name in sums
        ),
    ]
    for (level, ahead), offset in itertools.product(
        _AHEAD.items(), range(0, layout.bytes * vectors * lanes, _LINE)
    ):
        lines += [
            f"  %ahead.{level}.{offset} = getelementptr i8, ptr %w, i64 {4 * VECTORS * lanes * ahead + offset}",
            f"  call void @llvm.prefetch.p0(ptr %ahead.{level}.{offset}, i32 0, i32 {4 - level}, i32 1)",
        ]
    return [
        *lines,
        *layout.weights(lanes),
        *body,
        f"  %w.next = getelementptr i8, ptr %w, i64 {row_bytes}",
        f"  %k.next = add i64 %k, {layout.inputs}",
        "  %more = icmp ult i64 %k.next, %k.last",
        "  br i1 %more, label %loop, label %group.end",
        "group.end:",
        "  %g.next = add i64 %g, 1",
        "  %more.groups = icmp ult i64 %g.next, %groups",
        "  br i1 %more.groups, label %group.begin, label %end",
        "end:",
    ]


def tile(rows: int, layout: Layout, lanes: int, vectors: int = VECTORS) -> str:
    """The function `tile.LAYOUT.ROWS.VECTORS`: x [rows, inputs] times the first vectors of a panel, in registers until
    it is whole."""
    vector = f"<{lanes} x float>"
    sums = [(r, j) for r in range(rows) for j in range(vectors)]
    body = []
    for i, r in itertools.product(range(layout.inputs), range(rows)):
        body += [
            f"  %v.{i}.{r}.at = getelementptr float, ptr %x.{r}, i64 %k",
            f"  %v.{i}.{r}.here = getelementptr float, ptr %v.{i}.{r}.at, i64 {i}",
            f"  %v.{i}.{r} = load float, ptr %v.{i}.{r}.here",
            f"  %v.{i}.{r}.first = insertelement {vector} poison, float %v.{i}.{r}, i32 0",
            f"  %v.{i}.{r}.all = shufflevector {vector} %v.{i}.{r}.first, {vector} poison, "
            f"<{lanes} x i32> zeroinitializer",
        ]
        for j in range(vectors):
            before = f"%sum.{r}.{j}" if i == 0 else f"%new.{r}.{j}.{i - 1}"
            after = f"%new.{r}.{j}" if i == layout.inputs - 1 else f"%new.{r}.{j}.{i}"
            body.append(
                f"  {after} = call {vector} @llvm.fma.v{lanes}f32({vector} %v.{i}.{r}.all, {vector} %w.{i}.{j}, "
                f"{vector} {before})"
            )
    lines = [
        f"define internal void @tile.{layout.name}.{rows}.{vectors}({_TAKES}) {{",
        "entry:",
        *(f"  %x.{r}.at = mul i64 %inputs, {r}" for r in range(rows)),
        *(f"  %x.{r} = getelementptr float, ptr %x, i64 %x.{r}.at" for r in range(rows)),
        *loop(layout, lanes, [f"{r}.{j}" for r, j in sums], body, vectors),
    ]
    for r, j in sums:
        lines += [
            *([f"  %y.{r}.at = mul i64 %stride, {r}"] if j == 0 else []),
            f"  %y.{r}.{j}.at = add i64 %y.{r}.at, {j * lanes}",
            f"  %y.{r}.{j} = getelementptr float, ptr %y, i64 %y.{r}.{j}.at",
            f"  store {vector} %new.{r}.{j}, ptr %y.{r}.{j}, align 4",
        ]
    return "\n".join([*lines, "  ret void", "}"])


def functions(layout: Layout, lanes: int) -> str:
    """The function `rows.LAYOUT` (`_ROWS`) and its tiles."""
    numbers = range(1, ROWS + 1)
    calls = [
        f"tile.{n}:\n  call void @tile.{layout.name}.{n}.{VECTORS}({_GIVES})\n  br label %tiled"
        for n in numbers
    ]
    rows = _ROWS.format(
        name=layout.name,
        columns=VECTORS * lanes,
        rows=ROWS,
        edge=ROWS * VECTORS * lanes,
        cases=" ".join(f"i64 {n}, label %tile.{n}" for n in numbers),
        calls="\n".join(calls),
    )
    return "\n\n".join([*(tile(n, layout, lanes) for n in numbers), rows])


def make_kernel(name: str, lanes: int, row_bytes: int, functions: str, product: str) -> Kernel:
    """The kernel of a call with x and panels as its first arguments. row_bytes: of a row of a panel. product: IR that
    computes a panel's columns of the result, from %x, %rows, %inputs, %panel, %index, %y, %outputs and %left."""
    code = _CODE.format(
        vector=f"<{lanes} x float>",
        lanes=lanes,
        columns=VECTORS * lanes,
        row_bytes=row_bytes,
        share=_SHARE,
        takes=_TAKES_OF_A_THREAD,
        functions=functions,
        product=product,
    )
    return Kernel(name, code)


def _load(lanes: int) -> list[str]:
    lines = []
    for j in range(VECTORS):
        lines += [
            f"  %w.{j}.at = getelementptr float, ptr %w, i64 {j * lanes}",
            f"  %w.0.{j} = load <{lanes} x float>, ptr %w.{j}.at, align 4",
        ]
    return lines


FLOATS = Layout("floats", 1, 4, lambda lanes: [], _load)


@functools.cache
def kernel(lanes: int) -> Kernel:
    """The code for vectors of so many floats."""
    product = """
  call void @rows.floats(ptr %x, i64 %rows, i64 %inputs, i64 1, i64 %inputs, ptr %panel, ptr null, ptr %y,
                         i64 %outputs, i64 %left)"""
    name, row_bytes = f"lathe_skinny_matmul_{lanes}", 4 * VECTORS * lanes
    return make_kernel(name, lanes, row_bytes, functions(FLOATS, lanes), product)


def panel_columns() -> int:
    """Columns of a panel on this processor."""
    return VECTORS * lanes()


@functools.cache
def register(lanes: int) -> str:
    """XLA's name of the kernel for vectors of so many floats; makes it known once.

    Raises Unsupported where XLA refuses it.
    """
    return kernel(lanes).register()


def skinny_matmul(x: jax.Array, panels: jax.Array, columns: int) -> jax.Array:
    """x float32 [M, K] times panels float32 [ceil(N / P), K, P] -> [M, N], N = `columns`."""
    name = register(panels.shape[2] // VECTORS)
    out = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
    return jax.ffi.ffi_call(name, out, vmap_method="sequential")(x, panels)
