"""The parts of the dense product on a CPU as LLVM's intermediate representation: a block of the result, by tiles.

A block copies its part of the left operand into memory of its own, `DEPTH` terms of the sums at a time, which stays in
the second-level cache, and of the right operand one panel of `columns` after another, which stays in the first:

    for k0 in 0, DEPTH, ...:          left[m, k] of the block, k in k0 ... k0 + DEPTH
        for each panel:               right[k, columns]
            for each tile of rows:    tile[r, :] += left[r, k] right[k, :], in registers while k runs

Every element is one chain of fused multiply-adds in the order of k. The form of a product says how its operands lie:
n as they are multiplied, t transposed.
"""

from kernels_pallas.cpu_code import Function

VECTORS = 2  # of a row of a tile
DEPTH = 256  # terms of the sums at a time: a panel of 32 KiB,
WHOLE = 512  # but all of them where there are no more: the result is written once, and not read again
MOST_ROWS = 512  # of a block: 0.5 to 1 MiB of the left operand
_GAP = 16  # floats between rows of the copy, so that they do not fall into the same places of a cache


def rows_of_a_tile(lanes: int) -> int:
    """24 sums, 2 columns and a value fill 32 registers; AVX2 has 16."""
    return 6 if lanes == 8 else 12


def _tile_floats(by_rows: bool, lanes: int) -> int:
    """Of the copied left operand."""
    rows = rows_of_a_tile(lanes)
    return rows * (WHOLE + _GAP) if by_rows else rows * WHOLE + _GAP


def _tile(rows: int, by_rows: bool, lanes: int) -> str:
    """The function `tile.ROWS`: y [rows, columns] = left panel, plus what y holds where `%more`.

    left [rows, WHOLE + gap] where `by_rows`, else [depth, rows of a whole tile].
    """
    f = Function(
        f"tile.{rows}",
        "ptr noalias %left",
        "ptr noalias %panel",
        "i64 %depth",
        "ptr noalias %y",
        "i64 %stride",
        "i1 %more",
        lanes=lanes,
    )
    places = [(r, j) for r in range(rows) for j in range(VECTORS)]
    sums = {place: f.variable() for place in places}
    for r, j in places:
        f.announce(f.at("%y", f.mul("%stride", r), j * lanes), write=True)
    with f.when("%more"):
        for r, j in places:
            f.store(f.load(f.at("%y", f.mul("%stride", r), j * lanes)), sums[r, j])
    with f.loop("%depth") as k:
        panel = f.at("%panel", f.mul(k, VECTORS * lanes))
        columns = [f.load(f.at(panel, j * lanes)) for j in range(VECTORS)]
        here = f.at("%left", k if by_rows else f.mul(k, rows_of_a_tile(lanes)))
        for r in range(rows):
            value = f.splat(f.load(f.at(here, r * (WHOLE + _GAP) if by_rows else r), "float"))
            for j in range(VECTORS):
                f.store(f.fma(value, columns[j], f.load(sums[r, j])), sums[r, j])
    for r, j in places:
        f.store(f.load(sums[r, j]), f.at("%y", f.mul("%stride", r), j * lanes))
    return f.text()


def _copy(lanes: int) -> str:
    """Some floats."""
    f = Function("copy", "ptr noalias %to", "ptr noalias %from", "i64 %count", lanes=lanes)
    whole = f.sub("%count", f.rem("%count", lanes))
    with f.loop(whole, step=lanes) as i:
        f.store(f.load(f.at("%from", i)), f.at("%to", i))
    with f.loop("%count", start=whole) as i:
        f.store(f.load(f.at("%from", i), "float"), f.at("%to", i), "float")
    return f.text()


def _gather(lanes: int) -> str:
    """Rows of a transposed left operand, `%depth` of them `%width` apart, as tiles [WHOLE, rows of a tile]."""
    rows = rows_of_a_tile(lanes)
    f = Function(
        "gather",
        "ptr noalias %to",
        "ptr noalias %from",
        "i64 %width",
        "i64 %depth",
        "i64 %rows",
        lanes=lanes,
    )
    vectors, apart = -(-rows // lanes), _tile_floats(False, lanes)
    # A tile is moved by whole vectors: what is too much is written over by the next row's.
    with f.loop("%depth") as k:
        from_, to = f.at("%from", f.mul(k, "%width")), f.at("%to", f.mul(k, rows))
        last = f.sub("%rows", vectors * lanes - 1)

        def tile(r: str) -> str:
            return f.at(to, f.mul(f.div(r, rows), apart))  # noqa: B023

        done = f.variable(0, "i64")
        with f.loop(last, step=rows) as r:
            for j in range(vectors):
                f.store(f.load(f.at(from_, r, j * lanes)), f.at(tile(r), j * lanes))
            f.store(f.add(r, rows), done, "i64")
        with f.loop("%rows", start=f.load(done, "i64"), step=rows) as r:
            count = f.min(rows, f.sub("%rows", r))
            f.call("copy", f"ptr {tile(r)}", f"ptr {f.at(from_, r)}", f"i64 {count}")
    return f.text()


def _pack_panel(transposed: bool, lanes: int) -> str:
    """A panel [depth, columns] of the right operand, of which `%left` columns are there; the others become zero."""
    columns = VECTORS * lanes
    f = Function(
        "pack.panel",
        "ptr noalias %from",
        "i64 %width",
        "i64 %depth",
        "i64 %left",
        "ptr noalias %panel",
        lanes=lanes,
    )
    # What is done by vectors: all of it, but of a transposed operand only as many terms as fill vectors.
    whole = f.choose(f.less("%left", columns), 0, "%depth")
    even = f.sub(whole, f.rem(whole, lanes)) if transposed else whole
    if transposed:
        with f.loop(even, step=lanes) as k:
            for j in range(VECTORS):
                rows = [f.load(f.at("%from", f.mul("%width", j * lanes + i), k)) for i in range(lanes)]
                for i, column in enumerate(f.transposed(rows)):
                    f.store(column, f.at("%panel", f.mul(f.add(k, i), columns), j * lanes))
    else:
        with f.loop(even) as k:
            from_, to = f.at("%from", f.mul(k, "%width")), f.at("%panel", f.mul(k, columns))
            for j in range(VECTORS):
                f.store(f.load(f.at(from_, j * lanes)), f.at(to, j * lanes))
    with f.loop("%depth", start=even) as k:
        to = f.at("%panel", f.mul(k, columns))
        for j in range(VECTORS):
            f.store("zeroinitializer", f.at(to, j * lanes))
        with f.loop(f.min("%left", columns)) as j:
            offsets = (f.mul("%width", j), k) if transposed else (f.mul("%width", k), j)
            f.store(f.load(f.at("%from", *offsets), "float"), f.at(to, j), "float")
    return f.text()


def _move_edge(lanes: int) -> str:
    """The part of a tile that is inside the result: `rows` x `columns` to y, or from it where `%back`."""
    f = Function(
        "move.edge",
        "ptr %tile",
        "ptr %y",
        "i64 %stride",
        "i64 %rows",
        "i64 %columns",
        "i1 %back",
        lanes=lanes,
    )
    with f.loop("%rows") as r:
        tile, y = f.at("%tile", f.mul(r, VECTORS * lanes)), f.at("%y", f.mul(r, "%stride"))
        to, from_ = f.choose("%back", tile, y, "ptr"), f.choose("%back", y, tile, "ptr")
        f.call("copy", f"ptr {to}", f"ptr {from_}", "i64 %columns")
    return f.text()


def _tiles(by_rows: bool, lanes: int) -> str:
    """The tiles of a panel: y [rows, columns of the panel that are there], whose rows lie `%stride` apart."""
    columns, rows = VECTORS * lanes, rows_of_a_tile(lanes)
    f = Function(
        "tiles",
        "ptr %left",
        "ptr %panel",
        "i64 %depth",
        "ptr %y",
        "i64 %stride",
        "i64 %rows",
        "i64 %columns",
        "i1 %more",
        lanes=lanes,
    )
    edge = f.room(rows * columns)
    narrow = f.less("%columns", columns)
    with f.loop("%rows", step=rows) as r:
        rest = f.sub("%rows", r)
        y = f.at("%y", f.mul(r, "%stride"))
        left = f.at("%left", f.mul(f.div(r, rows), _tile_floats(by_rows, lanes)))
        outside = f.value(f"or i1 {narrow}, {f.less(rest, rows)}")
        to, stride = f.choose(outside, edge, y, "ptr"), f.choose(outside, columns, "%stride")
        inside = f.min(rest, rows), f.min("%columns", columns)
        part = [f"ptr {edge}", f"ptr {y}", "i64 %stride", *(f"i64 {x}" for x in inside)]
        with f.when(f.value(f"and i1 {outside}, %more")):
            f.call("move.edge", *part, "i1 true")
        few = 0
        for height in _heights(lanes):
            fits = f.value(f"icmp sgt i64 {rest}, {few}")
            if height < rows:
                fits = f.value(f"and i1 {fits}, {f.less(rest, height + 1)}")
            with f.when(fits):
                f.call(
                    f"tile.{height}",
                    f"ptr {left}",
                    "ptr %panel",
                    "i64 %depth",
                    f"ptr {to}",
                    f"i64 {stride}",
                    "i1 %more",
                )
            few = height
        with f.when(outside):
            f.call("move.edge", *part, "i1 false")
    return f.text()


def _heights(lanes: int) -> tuple[int, ...]:
    """Rows that tiles have; those of the last one are rounded up."""
    rows = rows_of_a_tile(lanes)
    return rows // 3, 2 * rows // 3, rows


def _block(form: str, lanes: int, onto: bool) -> str:
    """The function `block`: y [rows, columns] = left right, where the rows of each lie so far apart."""
    columns, rows, by_rows = VECTORS * lanes, rows_of_a_tile(lanes), form[0] == "n"
    operands = ("ptr %left", "i64 %left.apart", "ptr %right", "i64 %right.apart", "ptr %y", "i64 %y.apart")
    sizes = "i64 %rows", "i64 %columns", "i64 %depth"
    f = Function("block", *operands, *sizes, *(["i1 %onto"] if onto else []), lanes=lanes)
    tile = _tile_floats(by_rows, lanes)
    held = f.choose("%onto", 1, 0) if onto else 0  # whether there are terms before the first
    size = f.mul(f.ceil("%rows", rows), tile)
    memory = f.value(f"call ptr @malloc(i64 {f.add(f.mul(size, 4), 4 * WHOLE * columns + 128)})")
    address = f.value(f"ptrtoint ptr {memory} to i64")
    panel = f.value(f"inttoptr i64 {f.value(f'and i64 {f.add(address, 63)}, -64')} to ptr")
    copied = f.at(panel, WHOLE * columns)
    # Rows of the last tile that are not there are multiplied, too: they are zeros, or a number might be a slow one.
    start = f.mul("%rows", WHOLE + _GAP) if by_rows else f.mul(f.div("%rows", rows), tile)
    count = f.mul(f.sub(size, start), 4)
    f.line(f"call void @llvm.memset.p0.i64(ptr {f.at(copied, start)}, i8 0, i64 {count}, i1 false)")
    step = f.choose(f.less("%depth", WHOLE + 1), WHOLE, DEPTH)
    with f.loop("%depth", step=step) as k:
        some = f.min(step, f.sub("%depth", k))
        more = f.less(0, f.add(k, held))
        if by_rows:
            with f.loop("%rows") as i:
                from_, to = f.at("%left", f.mul(i, "%left.apart"), k), f.at(copied, f.mul(i, WHOLE + _GAP))
                f.call("copy", f"ptr {to}", f"ptr {from_}", f"i64 {some}")
        else:
            from_ = f.at("%left", f.mul(k, "%left.apart"))
            sizes = "i64 %left.apart", f"i64 {some}", "i64 %rows"
            f.call("gather", f"ptr {copied}", f"ptr {from_}", *sizes)
        with f.loop("%columns", step=columns) as j:
            left = f.sub("%columns", j)
            offsets = (f.mul(k, "%right.apart"), j) if form[1] == "n" else (f.mul(j, "%right.apart"), k)
            sizes = "i64 %right.apart", f"i64 {some}", f"i64 {left}"
            f.call("pack.panel", f"ptr {f.at('%right', *offsets)}", *sizes, f"ptr {panel}")
            y = f"ptr {f.at('%y', j)}", "i64 %y.apart"
            sizes = "i64 %rows", f"i64 {left}", f"i1 {more}"
            f.call("tiles", f"ptr {copied}", f"ptr {panel}", f"i64 {some}", *y, *sizes)
    # A sum of nothing.
    with f.when(f.equal(f.add("%depth", held), 0)), f.loop("%rows") as i:
        y = f.at("%y", f.mul(i, "%y.apart"))
        f.line(f"call void @llvm.memset.p0.i64(ptr {y}, i8 0, i64 {f.mul('%columns', 4)}, i1 false)")
    f.line(f"call void @free(ptr {memory})")
    return f.text()


_DECLARE = """
declare {vector} @llvm.fma.{kind}({vector}, {vector}, {vector})
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare ptr @malloc(i64)
declare void @free(ptr)
"""


def block(form: str, lanes: int, onto: bool = False) -> str:
    """The function `block` of a form ("nn", "nt", "tn"), and what it calls and declares:

    block(ptr left, i64 apart, ptr right, i64 apart, ptr y, i64 apart, i64 rows, i64 columns, i64 depth)

    for y [rows, columns]; left [rows, depth] or, transposed, [depth, rows]; right [depth, columns] or [columns, depth];
    `apart` floats lie between the rows of each. At most `MOST_ROWS` rows suit the caches. With `onto` it has one more
    parameter, i1 onto: the product is added to what y holds, as further terms of its sums.
    """
    by_rows = form[0] == "n"
    code = [
        _DECLARE.format(vector=f"<{lanes} x float>", kind=f"v{lanes}f32"),
        _copy(lanes),
        *([] if by_rows else [_gather(lanes)]),
        _pack_panel(form[1] == "t", lanes),
        *(_tile(height, by_rows, lanes) for height in _heights(lanes)),
        _move_edge(lanes),
        _tiles(by_rows, lanes),
        _block(form, lanes, onto),
    ]
    return "\n\n".join(code)
