"""The dense product of many rows on a CPU, in the three forms that training needs: x w, g w^T and x^T g.

The result is cut into rectangles, which threads share; each is a block (`kernels_pallas.matmul.cpu_tiles`). Every
element is one chain of fused multiply-adds in the order of the sum, whatever the number of threads and of rows and
columns beside it.
"""

import functools

import jax
import numpy as np

from kernels_pallas import cpu
from kernels_pallas.cpu import Kernel, cores
from kernels_pallas.cpu_code import Function
from kernels_pallas.matmul.cpu_tiles import MOST_ROWS, VECTORS, block, rows_of_a_tile

_SHARE = 1 << 18  # multiply-adds below which another thread does not pay

FORMS = ("nn", "nt", "tn")  # n: an operand lies as it is multiplied, t: transposed

# left, right and result; rows and columns of the result, terms of a sum; rows and columns of a rectangle, rectangles
# side by side
_PRODUCT = "%product = type { ptr, ptr, ptr, i64, i64, i64, i64, i64, i64 }"


def _rectangle(form: str, lanes: int) -> str:
    """One rectangle of the result."""
    f = Function("rectangle", "ptr %job", "i64 %index", lanes=lanes)
    product = f.field("%job", "%job", 6, "ptr")
    left, right, y = (f.field(product, "%product", i, "ptr") for i in range(3))
    height, width, depth, tall, wide, across = (f.field(product, "%product", i) for i in range(3, 9))
    row, column = f.mul(f.div("%index", across), tall), f.mul(f.rem("%index", across), wide)
    tall, wide = f.min(tall, f.sub(height, row)), f.min(wide, f.sub(width, column))
    left, apart = (f.at(left, f.mul(row, depth)), depth) if form[0] == "n" else (f.at(left, row), height)
    operands = [f"ptr {left}", f"i64 {apart}"]
    right, apart = (
        (f.at(right, column), width) if form[1] == "n" else (f.at(right, f.mul(column, depth)), depth)
    )
    operands += [f"ptr {right}", f"i64 {apart}", f"ptr {f.at(y, f.mul(row, width), column)}", f"i64 {width}"]
    f.call("block", *operands, f"i64 {tall}", f"i64 {wide}", f"i64 {depth}")
    return f.text()


def _execute(form: str, lanes: int) -> str:
    f = Function("execute", "ptr %frame", lanes=lanes)
    left, right, cut, y = (f.array("%frame", i) for i in (0, 1, 2, -1))
    height, width = y.dims(2)
    depth = left.dim(1 if form[0] == "n" else 0)
    tall, wide, across, count = (cut.whole(i) for i in range(4))
    product = f.variable("zeroinitializer", "%product")
    pointers = left.data, right.data, y.data
    for i, value in enumerate([*pointers, height, width, depth, tall, wide, across]):
        f.set_field(value, product, "%product", i, "ptr" if i < 3 else "i64")
    pay = f.div(f.mul(f.mul(height, width), depth), _SHARE)
    f.call("share.long", "ptr %frame", "ptr @rectangle", f"ptr {product}", f"i64 {count}", f"i64 {pay}")
    return f.text()


@functools.cache
def kernel(form: str, lanes: int) -> Kernel:
    """The code for vectors of so many floats."""
    code = [block(form, lanes), _PRODUCT, _rectangle(form, lanes), _execute(form, lanes)]
    return Kernel(f"lathe_matmul_{form}_{lanes}", "\n\n".join(code))


@functools.cache
def register(form: str, lanes: int) -> str:
    """XLA's name of the kernel of a form for vectors of so many floats; makes it known once.

    Raises Unsupported where XLA refuses it.
    """
    return kernel(form, lanes).register()


@functools.cache
def plan(form: str, height: int, width: int, threads: int, lanes: int) -> tuple[int, int, int, int]:
    """How a result [height, width] is cut: rows and columns of a rectangle, rectangles side by side, and all of them.

    Of the cuts whose rectangles are low enough for the form, one that leaves the fewest tiles to the busiest thread,
    counting what is copied for them.
    """
    rows, columns = rows_of_a_tile(lanes), VECTORS * lanes
    tiles, panels = -(-height // rows), -(-width // columns)
    fewest = 1 if form[0] == "n" else -(-height // MOST_ROWS)
    best = None
    for down in range(fewest, min(tiles, max(fewest, 4 * threads)) + 1):
        for across in range(1, min(panels, 4 * threads) + 1):
            tall, wide = -(-tiles // down), -(-panels // across)
            # In multiply-adds of one term: a value that is read from memory and copied costs about 16 of them.
            cost = tall * rows * wide * columns + 16 * (tall * rows + wide * columns)
            count = -(-tiles // tall) * -(-panels // wide)
            busiest = -(-count // threads) * cost
            if best is None or busiest < best[0]:
                best = busiest, (tall * rows, wide * columns, -(-panels // wide), count)
    return best[1]


def matmul(left: jax.Array, right: jax.Array, form: str, lanes: int | None = None) -> jax.Array:
    """float32 left times right, either of which is transposed where the form ("nn", "nt", "tn") says so. By vectors of
    so many floats, by default those of the processor's registers."""
    lanes = lanes or cpu.lanes()
    name = register(form, lanes)
    height = left.shape[0 if form[0] == "n" else 1]
    width = right.shape[1 if form[1] == "n" else 0]
    cut = np.array(plan(form, height, width, cores(), lanes), np.int32)
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((height, width), left.dtype), vmap_method="sequential")
    return call(left, right, cut)
