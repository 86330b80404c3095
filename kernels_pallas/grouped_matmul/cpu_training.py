"""Grouped products on a CPU in the forms of training: consecutive rows, each group with its expert's matrix.

    nn   y[rows of e] = x[rows of e] w[e]
    nt   dx[rows of e] = dy[rows of e] w[e]^T
    tn   dw[e] = x[rows of e]^T dy[rows of e]

What is cut is known when the sizes of the groups are: a piece is a block of an expert's rows and of columns, or a
rectangle of an expert's gradient, and each is a block of the dense product (`kernels_pallas.matmul.cpu_tiles`). Every
element is one chain of fused multiply-adds in the order of the sum, whatever is cut and by how many threads. What
follows elementwise is computed while the block is in the processor's cache.

Groups come in the order of their rows, with any gaps between them, whose rows become 0.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import cpu
from kernels_pallas.cpu import Kernel, cores
from kernels_pallas.cpu_code import Array, Function
from kernels_pallas.cpu_math import exponential
from kernels_pallas.matmul.cpu_tiles import MOST_ROWS, VECTORS, block, rows_of_a_tile

_SHARE = 1 << 18  # multiply-adds below which another thread does not pay
_RECTANGLES = 4  # of a thread, of all experts' gradients together
_COPY = 16  # multiply-adds that take as long as reading and copying a value
_AT_ONCE = 2  # vectors of an elementwise loop

# XLA's call, the pieces, columns of a piece, pieces side by side
_WORK = "%work = type { ptr, ptr, i64, i64 }"
# rows of an expert: the expert, the first row, their number
_ROWS = "%rows = type { i64, i64, i64 }"
# a rectangle of an expert's gradient: which gradient, the expert, its first row and their number; row, rows, column,
# columns
_RECTANGLE = "%rectangle = type { i64, i64, i64, i64, i64, i64, i64, i64 }"

# The first operands of every call.
_STARTS, _SIZES, _CUT, _FIRST = 0, 1, 2, 3


class _Piece:
    """The function of a piece of rows, written step by step."""

    def __init__(self, form: str, lanes: int) -> None:
        self.form = form
        self.f = f = Function("piece", "ptr %job", "i64 %index", lanes=lanes)
        work = f.field("%job", "%job", 6, "ptr")
        self.frame, table = (f.field(work, "%work", i, "ptr") for i in range(2))
        wide, across = (f.field(work, "%work", i) for i in (2, 3))
        rows = f.at(table, f.div("%index", across), kind="%rows")
        self.expert, self.row, self.rows = (f.field(rows, "%rows", i) for i in range(3))
        self.column = f.mul(f.rem("%index", across), wide)
        columns = f.array(self.frame, -1).dim(1)
        self.columns = f.min(wide, f.sub(columns, self.column))

    def array(self, number: int) -> Array:
        return self.f.array(self.frame, number)

    def place(self, array: Array, row: str | int = 0) -> str:
        """Where the piece begins in an array of rows like the result, or a row of the piece."""
        f = self.f
        return f.at(array.data, f.mul(f.add(self.row, row), array.dim(1)), self.column)

    def multiply(self, left: Array, w: Array, y: Array, onto: bool = False) -> None:
        """The piece of y, or what is added to it."""
        f, depth = self.f, left.dim(1)
        matrix = f.at(w.data, f.mul(self.expert, f.mul(w.dim(1), w.dim(2))))
        right = f.at(matrix, self.column if self.form == "nn" else f.mul(self.column, depth))
        f.call(
            "block",
            f"ptr {f.at(left.data, f.mul(self.row, depth))}",
            f"i64 {depth}",
            f"ptr {right}",
            f"i64 {w.dim(2)}",
            f"ptr {self.place(y)}",
            f"i64 {y.dim(1)}",
            f"i64 {self.rows}",
            f"i64 {self.columns}",
            f"i64 {depth}",
            f"i1 {'true' if onto else 'false'}",
        )

    def silu(self, gate: str) -> tuple[str, str]:
        """-> sigmoid(gate), silu(gate)."""
        f = self.f
        minus = f.value(f"fneg {f.vector} {gate}")
        sigmoid = f.fdiv(f.number(1), f.fadd(f.exp(minus), f.number(1)))
        return sigmoid, f.fmul(gate, sigmoid)


def _product(form: str, lanes: int) -> _Piece:
    """left, w -> y."""
    piece = _Piece(form, lanes)
    piece.multiply(piece.array(_FIRST), piece.array(_FIRST + 1), piece.array(-1))
    return piece


def _sum(form: str, lanes: int) -> _Piece:
    """a, b, v, w -> a v + b w."""
    piece = _Piece(form, lanes)
    a, b, v, w = (piece.array(_FIRST + i) for i in range(4))
    y = piece.array(-1)
    piece.multiply(a, v, y)
    piece.multiply(b, w, y, onto=True)
    return piece


def _gated(form: str, lanes: int) -> _Piece:
    """x, w of the gate, w of up -> gate, up, hidden = silu(gate) up."""
    piece = _Piece(form, lanes)
    f, x, arrays = piece.f, piece.array(_FIRST), [piece.array(i) for i in (-1, -2, -3)]
    for i in range(2):
        piece.multiply(x, piece.array(_FIRST + 1 + i), arrays[i])
    with f.loop(piece.rows) as row:
        gate, up, hidden = (piece.place(array, row) for array in arrays)
        for here, _, mask in f.vectors(piece.columns, _AT_ONCE):
            _, silu = piece.silu(f.read(f.at(gate, here), mask))
            f.write(f.fmul(silu, f.read(f.at(up, here), mask)), f.at(hidden, here), mask)
    return piece


def _gated_backward(form: str, lanes: int) -> _Piece:
    """dy, w of down, gate, up -> d_gate, d_up."""
    piece = _Piece(form, lanes)
    f, d_gate, d_up = piece.f, piece.array(-1), piece.array(-2)
    piece.multiply(piece.array(_FIRST), piece.array(_FIRST + 1), d_up)  # d_hidden, for a while
    with f.loop(piece.rows) as row:
        gate, up, to_gate, to_up = (
            piece.place(array, row)
            for array in (piece.array(_FIRST + 2), piece.array(_FIRST + 3), d_gate, d_up)
        )
        for here, _, mask in f.vectors(piece.columns, _AT_ONCE):
            d_hidden = f.read(f.at(to_up, here), mask)
            sigmoid, silu = piece.silu(f.read(f.at(gate, here), mask))
            # silu' = s + silu (1 - s)
            slope = f.fma(silu, f.fsub(f.number(1), sigmoid), sigmoid)
            value = f.fmul(f.fmul(d_hidden, f.read(f.at(up, here), mask)), slope)
            f.write(value, f.at(to_gate, here), mask)
            f.write(f.fmul(d_hidden, silu), f.at(to_up, here), mask)
    return piece


def _groups(f: Function, starts: Array, sizes: Array, rows: str, expert: str, end: str) -> tuple[str, str]:
    """-> the first row of an expert, not before `end`, and how many it has that there are."""
    start = starts.whole(expert)
    start = f.choose(f.less(start, end), end, start)
    size = f.min(sizes.whole(expert), f.sub(rows, start))
    return start, f.choose(f.less(size, 0), 0, size)


def _execute_rows(outputs: int, products: int, lanes: int) -> str:
    """The function that XLA's call runs, of pieces of rows."""
    f = Function("execute", "ptr %frame", lanes=lanes)
    starts, sizes, cut = (f.array("%frame", i) for i in (_STARTS, _SIZES, _CUT))
    results = [f.array("%frame", -1 - i) for i in range(outputs)]
    depth = f.array("%frame", _FIRST).dim(1)
    tall, wide = cut.whole(0), cut.whole(1)
    experts, (rows, columns) = starts.dim(0), results[0].dims(2)
    # At most one block of an expert is not whole.
    count = f.add(f.div(rows, tall), experts)
    table = f.value(f"call ptr @malloc(i64 {f.mul(count, 24)})")

    def clear(first: str, last: str) -> None:
        with f.when(f.less(first, last)):
            count = f.mul(f.mul(f.sub(last, first), columns), 4)
            for result in results:
                at = f.at(result.data, f.mul(first, columns))
                f.line(f"call void @llvm.memset.p0.i64(ptr {at}, i8 0, i64 {count}, i1 false)")

    made, end, total = (f.variable(0, "i64") for _ in range(3))
    with f.loop(experts) as expert:
        before = f.load(end, "i64")
        start, size = _groups(f, starts, sizes, rows, expert, before)
        with f.when(f.less(0, size)):
            clear(before, start)
            stop = f.add(start, size)
            f.store(stop, end, "i64")
            f.store(f.add(f.load(total, "i64"), size), total, "i64")
            # Blocks of one expert are equally tall, of whole tiles.
            parts = f.div(f.add(size, f.sub(tall, 1)), tall)
            each = f.div(f.add(size, f.sub(parts, 1)), parts)
            each = f.mul(f.ceil(each, rows_of_a_tile(lanes)), rows_of_a_tile(lanes))
            with f.loop(stop, start=start, step=each) as row:
                number = f.load(made, "i64")
                place = f.at(table, number, kind="%rows")
                for i, value in enumerate((expert, row, f.min(each, f.sub(stop, row)))):
                    f.set_field(value, place, "%rows", i)
                f.store(f.add(number, 1), made, "i64")
    clear(f.load(end, "i64"), rows)
    across = f.div(f.add(columns, f.sub(wide, 1)), wide)
    pieces = f.mul(f.load(made, "i64"), across)
    work = f.mul(f.mul(f.load(total, "i64"), columns), f.mul(depth, products))
    _share(f, table, pieces, work, (wide, across))
    return f.text()


def _share(f: Function, table: str, pieces: str, work: str, fields: Sequence[str]) -> None:
    """The pieces of a table are computed."""
    operand = f.variable("zeroinitializer", "%work")
    for i, value in enumerate(("%frame", table, *fields)):
        f.set_field(value, operand, "%work", i, "ptr" if i < 2 else "i64")
    with f.when(f.less(0, pieces)):
        pay = f.div(work, _SHARE)
        f.call("share.long", "ptr %frame", "ptr @piece", f"ptr {operand}", f"i64 {pieces}", f"i64 {pay}")
    f.line(f"call void @free(ptr {table})")


def _gradient_piece(products: int, lanes: int) -> str:
    """One rectangle of one of the gradients: x and dy of each -> dw of each."""
    f = Function("piece", "ptr %job", "i64 %index", lanes=lanes)
    work = f.field("%job", "%job", 6, "ptr")
    frame, table = (f.field(work, "%work", i, "ptr") for i in range(2))
    place = f.at(table, "%index", kind="%rectangle")
    which, expert, start, size, row, rows, column, columns = (
        f.field(place, "%rectangle", i) for i in range(8)
    )
    for number in range(products):
        with f.when(f.equal(which, number)):
            x, dy = (f.array(frame, _FIRST + 2 * number + i) for i in range(2))
            dw = f.array(frame, -1 - number)
            height, width = x.dim(1), dy.dim(1)
            f.call(
                "block",
                f"ptr {f.at(x.data, f.mul(start, height), row)}",
                f"i64 {height}",
                f"ptr {f.at(dy.data, f.mul(start, width), column)}",
                f"i64 {width}",
                f"ptr {f.at(dw.data, f.mul(f.add(f.mul(expert, height), row), width), column)}",
                f"i64 {width}",
                f"i64 {rows}",
                f"i64 {columns}",
                f"i64 {size}",
                "i1 false",
            )
    return f.text()


def _execute_gradient(products: int, lanes: int) -> str:
    """The function that XLA's call runs, of rectangles of gradients: more of them for an expert of more rows."""
    f = Function("execute", "ptr %frame", lanes=lanes)
    starts, sizes = (f.array("%frame", i) for i in (_STARTS, _SIZES))
    experts, rows = starts.dim(0), f.array("%frame", _FIRST).dim(0)
    tile = {"rows": rows_of_a_tile(lanes), "columns": VECTORS * lanes}
    wanted = _RECTANGLES * cores()

    total, end = (f.variable(0, "i64") for _ in range(2))
    with f.loop(experts) as expert:
        start, size = _groups(f, starts, sizes, rows, expert, f.load(end, "i64"))
        f.store(f.add(start, size), end, "i64")
        f.store(f.add(f.load(total, "i64"), size), total, "i64")
    all_rows = f.load(total, "i64")

    made, most, work = (f.variable(0, "i64") for _ in range(3))
    results = [f.array("%frame", -1 - number) for number in range(products)]
    for result in results:
        least = f.mul(f.ceil(result.dim(1), MOST_ROWS), experts)
        f.store(f.add(f.load(most, "i64"), f.add(least, f.mul(f.add(experts, wanted), 2))), most, "i64")
        size = f.mul(result.dim(1), result.dim(2))
        f.store(f.add(f.load(work, "i64"), f.mul(size, all_rows)), work, "i64")
    table = f.value(f"call ptr @malloc(i64 {f.mul(f.load(most, 'i64'), 64)})")
    for which, result in enumerate(results):
        height, width = result.dim(1), result.dim(2)
        f.store(0, end, "i64")
        with f.loop(experts) as expert:
            start, size = _groups(f, starts, sizes, rows, expert, f.load(end, "i64"))
            f.store(f.add(start, size), end, "i64")
            # Its share of all rectangles, rounded, and 1 at least.
            share = f.add(f.mul(size, 2 * wanted), all_rows)
            share = f.div(share, f.mul(f.choose(f.less(0, all_rows), all_rows, 1), 2))
            tall, wide = f.variable(f.min(height, MOST_ROWS), "i64"), f.variable(width, "i64")
            with f.loop(wanted.bit_length() + 1):
                down, across = f.load(tall, "i64"), f.load(wide, "i64")
                count = f.mul(_parts(f, height, down), _parts(f, width, across))
                lower = f.less(
                    across, down
                )  # halves of the longer side: what is copied for a piece grows least
                large = f.less(4 * tile["columns"], f.choose(lower, down, across))
                with f.when(f.value(f"and i1 {f.less(count, share)}, {large}")):
                    for place, side, lies in ((tall, "rows", True), (wide, "columns", False)):
                        old = f.load(place, "i64")
                        half = f.mul(f.ceil(f.ceil(old, 2), tile[side]), tile[side])
                        new = f.choose(lower, half, old) if lies else f.choose(lower, old, half)
                        f.store(new, place, "i64")
            down, across = f.load(tall, "i64"), f.load(wide, "i64")
            with f.loop(height, step=down) as row, f.loop(width, step=across) as column:
                number = f.load(made, "i64")
                place = f.at(table, number, kind="%rectangle")
                inside = f.min(down, f.sub(height, row)), f.min(across, f.sub(width, column))
                values = which, expert, start, size, row, inside[0], column, inside[1]
                for i, value in enumerate(values):
                    f.set_field(value, place, "%rectangle", i)
                f.store(f.add(number, 1), made, "i64")
    _share(f, table, f.load(made, "i64"), f.load(work, "i64"), (0, 0))
    return f.text()


def _parts(f: Function, whole: str, part: str) -> str:
    return f.div(f.add(whole, f.sub(part, 1)), part)


# Form, function of a piece, results, products.
_KINDS = {
    "nn": ("nn", _product, 1, 1),
    "nt": ("nt", _product, 1, 1),
    "sum": ("nt", _sum, 1, 2),
    "gated": ("nn", _gated, 3, 2),
    "gated_backward": ("nt", _gated_backward, 2, 1),
}


def _join(name: str, code: Sequence[str]) -> Kernel:
    """The kernel; what several parts declare is declared once."""
    lines: dict[str, None] = {}
    rest = []
    for line in "\n\n".join(code).splitlines():
        if line.startswith("declare "):
            lines[line] = None
        else:
            rest.append(line)
    return Kernel(name, "\n".join([*lines, *rest]))


@functools.cache
def kernel(kind: str, lanes: int) -> Kernel:
    """The code of a product of rows, for vectors of so many floats."""
    form, piece, outputs, products = _KINDS[kind]
    code = [_WORK, _ROWS, block(form, lanes, onto=True), exponential(lanes), piece(form, lanes).f.text()]
    return _join(f"lathe_grouped_{kind}_{lanes}", [*code, _execute_rows(outputs, products, lanes)])


@functools.cache
def gradient_kernel(products: int, lanes: int) -> Kernel:
    """The code of so many gradients of matrices, for vectors of so many floats."""
    code = [_WORK, _RECTANGLE, block("tn", lanes, onto=True), _gradient_piece(products, lanes)]
    return _join(f"lathe_grouped_tn{products}_{lanes}", [*code, _execute_gradient(products, lanes)])


@functools.cache
def register(kind: str | int, lanes: int) -> str:
    """XLA's name of the kernel of a kind, or of so many gradients, for vectors of so many floats; makes it known once.

    Raises Unsupported where XLA refuses it.
    """
    return (gradient_kernel if isinstance(kind, int) else kernel)(kind, lanes).register()


@functools.cache
def plan(rows: int, columns: int, depth: int, threads: int, lanes: int) -> tuple[int, int]:
    """Rows and columns of a piece, of products of this size: those with which all threads are done first, counting what
    is copied for a piece, and that the last one to finish is half a piece behind."""
    tile, panel = rows_of_a_tile(lanes), VECTORS * lanes
    best = None
    for wide in sorted({-(-columns // (parts * panel)) * panel for parts in range(1, 4 * threads + 1)}):
        for tall in range(tile, MOST_ROWS + 1, tile):
            cost = depth * (tall * wide + _COPY * (tall + wide))
            pieces = max(rows / tall, 1) * -(-columns // wide)
            time = max(pieces / threads, 1) * cost + cost / 2
            if best is None or time < best[0]:
                best = time, (tall, wide)
    return best[1]


def _call(
    kind: str,
    groups: tuple[jax.Array, jax.Array],
    operands: Sequence[jax.Array],
    columns: int,
    lanes: int | None,
) -> list[jax.Array]:
    lanes = lanes or cpu.lanes()
    rows, depth = operands[0].shape
    cut = np.array(plan(rows, columns, depth, cores(), lanes), np.int32)
    out = [jax.ShapeDtypeStruct((rows, columns), jnp.float32)] * _KINDS[kind][2]
    call = jax.ffi.ffi_call(register(kind, lanes), out, vmap_method="sequential")
    return call(*groups, cut, *operands)


def product(
    x: jax.Array, w: jax.Array, groups: tuple[jax.Array, jax.Array], form: str, lanes: int | None = None
) -> jax.Array:
    """x [M, K] times w [E, K, N] ("nn") or w [E, N, K] ("nt") -> [M, N]; groups: starts and sizes int32[E]."""
    return _call(form, groups, (x, w), w.shape[2 if form == "nn" else 1], lanes)[0]


def summed(
    rows: tuple[jax.Array, jax.Array],
    matrices: tuple[jax.Array, jax.Array],
    groups: tuple[jax.Array, jax.Array],
    lanes: int | None = None,
) -> jax.Array:
    """Two arrays [M, K] times two transposed w [E, N, K], and their sum -> [M, N]."""
    return _call("sum", groups, (*rows, *matrices), matrices[0].shape[1], lanes)[0]


def gated(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    groups: tuple[jax.Array, jax.Array],
    lanes: int | None = None,
) -> list[jax.Array]:
    """x [M, K]; gate, up [E, K, N] -> x gate, x up, silu(x gate) (x up), [M, N] each."""
    return _call("gated", groups, (x, gate, up), gate.shape[2], lanes)


def gated_backward(
    dy: jax.Array,
    down: jax.Array,
    inputs: Sequence[jax.Array],
    groups: tuple[jax.Array, jax.Array],
    lanes: int | None = None,
) -> list[jax.Array]:
    """The cotangents of the inputs [M, N] of silu(gate) up, where dy [M, K] times the transposed down [E, N, K] is its
    own."""
    return _call("gated_backward", groups, (dy, down, *inputs), down.shape[1], lanes)


def gradients(
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    groups: tuple[jax.Array, jax.Array],
    lanes: int | None = None,
) -> list[jax.Array]:
    """x^T dy of every expert's rows, for every pair x [M, K], dy [M, N] -> [E, K, N] each; 0 for one without rows."""
    lanes = lanes or cpu.lanes()
    experts = groups[0].shape[0]
    out = [jax.ShapeDtypeStruct((experts, x.shape[1], dy.shape[1]), jnp.float32) for x, dy in pairs]
    call = jax.ffi.ffi_call(register(len(pairs), lanes), out, vmap_method="sequential")
    cut = np.zeros(1, np.int32)  # in the place of a plan
    return call(*groups, cut, *(array for pair in pairs for array in pair))


@jax.custom_vjp
def grouped_dot(x: jax.Array, w: jax.Array, starts: jax.Array, sizes: jax.Array) -> jax.Array:
    """x float32[M, K] times the matrices w [E, K, N] of its rows' groups -> [M, N]; starts, sizes int32[E]."""
    return product(x, w, (starts, sizes), "nn")


def _dot_forward(x, w, starts, sizes):
    return grouped_dot(x, w, starts, sizes), (x, w, starts, sizes)


def _dot_backward(saved, dy):
    x, w, *groups = saved
    return product(dy, w, groups, "nt"), gradients([(x, dy)], groups)[0], None, None


grouped_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def grouped_ffn(
    x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, starts: jax.Array, sizes: jax.Array
) -> jax.Array:
    """(silu(x gate) (x up)) down, each row by the matrices of its group: x float32[M, K], gate, up [E, K, N],
    down [E, N, K] -> [M, K]; starts, sizes int32[E]."""
    return _ffn_forward(x, gate, up, down, starts, sizes)[0]


def _ffn_forward(x, gate, up, down, *groups):
    *inputs, hidden = gated(x, gate, up, groups)
    return product(hidden, down, groups, "nn"), (x, gate, up, down, groups, inputs, hidden)


def _ffn_backward(saved, dy):
    x, gate, up, down, groups, inputs, hidden = saved
    d_gate, d_up = gated_backward(dy, down, inputs, groups)
    dx = summed((d_gate, d_up), (gate, up), groups)
    return dx, *gradients([(x, d_gate), (x, d_up), (hidden, dy)], groups), None, None


grouped_ffn.defvjp(_ffn_forward, _ffn_backward)
