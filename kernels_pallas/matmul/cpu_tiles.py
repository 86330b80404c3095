"""The parts of the dense product on a CPU as LLVM's intermediate representation: a block of the result, by tiles.

A block takes `DEPTH` terms of the sums at a time, or all where there are at most `WHOLE`, and of the right operand as
many columns as the second-level cache holds. It packs those into panels, and one band of rows of the left operand after
another, which stays in the first:

    for k0 in 0, DEPTH, ...:          right[k, columns] of all panels, k in k0 ... k0 + DEPTH
        for each band:                left[r, k]
            for each panel:           tile[r, :] += left[r, k] right[k, :], in registers while k runs

So the result is written along its rows. Of a transposed left operand a band lies in short pieces far apart: there all
rows of the block are copied at once and the two inner loops are exchanged, one panel packed before each. What is copied
next is announced while sums run, a few lines at a time: more at once would hold up the reading of the operands.

Every element is one chain of fused multiply-adds in the order of k. The form of a product says how its operands lie:
n as they are multiplied, t transposed.
"""

import functools
import os

from kernels_pallas.cpu_code import Function

VECTORS = 2  # of a row of a tile
DEPTH = 256  # terms of the sums at a time,
WHOLE = 512  # but all of them where there are no more: the result is written once, and not read again
MOST_ROWS = 512  # of a block with a transposed left operand: 512 KiB of it, 1 MiB where all terms are taken
_LINE = 16  # floats of a cache line
_GAP = 16  # floats between rows of the copy, so that they do not fall into the same places of a cache


# What a tile announces, see `_tile`.
_ANNOUNCED = ("ptr %next", "ptr %ahead", "i64 %outer", "i64 %inner", "i64 %count")


@functools.cache
def _most_columns(lanes: int) -> int:
    """Of the right operand at a time: `WHOLE` rows of them fill three quarters of the second-level cache, which is
    taken to have half a megabyte where the system doesn't say."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    columns = VECTORS * lanes
    return max((size if size > 0 else 1 << 19) * 3 // 4 // (4 * WHOLE * columns), 1) * columns


def rows_of_a_tile(lanes: int) -> int:
    """24 sums, 2 columns and a value fill 32 registers; AVX2 has 16."""
    return 6 if lanes == 8 else 12


def _tile_floats(by_rows: bool, lanes: int) -> int:
    """Of the copied left operand."""
    rows = rows_of_a_tile(lanes)
    return rows * (WHOLE + _GAP) if by_rows else rows * WHOLE + _GAP


def _tile(rows: int, by_rows: bool, lanes: int) -> str:
    """The function `tile.ROWS`: y [rows, columns] = left panel, plus what y holds where `%more`.

    left [rows, WHOLE + gap] where `by_rows`, else [depth, rows of a whole tile]. Announced are the tile at `%next` and,
    for each row, `%count` lines behind `%ahead`, `%inner` floats apart, those of two rows `%outer` apart.
    """
    f = Function(
        f"tile.{rows}",
        "ptr noalias %left",
        "ptr noalias %panel",
        "i64 %depth",
        "ptr noalias %y",
        "i64 %stride",
        "i1 %more",
        *_ANNOUNCED,
        lanes=lanes,
    )
    places = [(r, j) for r in range(rows) for j in range(VECTORS)]
    sums = {place: f.variable() for place in places}
    with f.when("%more"):
        for r, j in places:
            f.store(f.load(f.at("%y", f.mul("%stride", r), j * lanes)), sums[r, j])
    part = f.ceil("%depth", rows)
    with f.loop(rows) as row:
        for j in range(VECTORS):
            f.announce(f.at("%next", f.mul("%stride", row), j * lanes), write=True)
        with f.loop("%count") as i:
            f.announce(f.at("%ahead", f.mul("%outer", row), f.mul("%inner", i)), level=2)
        start = f.mul(row, part)
        with f.loop(f.min("%depth", f.add(start, part)), start=start) as k:
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


def _inside(lanes: int) -> str:
    """The function `inside`: a tile of which `rows` x `columns` are there, as `tile.ROWS`."""
    columns, rows = VECTORS * lanes, rows_of_a_tile(lanes)
    f = Function(
        "inside",
        "ptr %left",
        "ptr %panel",
        "i64 %depth",
        "ptr %y",
        "i64 %stride",
        "i64 %rows",
        "i64 %columns",
        "i1 %more",
        *_ANNOUNCED,
        lanes=lanes,
    )
    edge = f.room(rows * columns)
    outside = f.value(f"or i1 {f.less('%columns', columns)}, {f.less('%rows', rows)}")
    to, stride = f.choose(outside, edge, "%y", "ptr"), f.choose(outside, columns, "%stride")
    next_ = f.choose(outside, edge, "%next", "ptr")
    there = f.min("%rows", rows), f.min("%columns", columns)
    part = [f"ptr {edge}", "ptr %y", "i64 %stride", *(f"i64 {x}" for x in there)]
    with f.when(f.value(f"and i1 {outside}, %more")):
        f.call("move.edge", *part, "i1 true")
    few = 0
    for height in _heights(lanes):
        fits = f.value(f"icmp sgt i64 %rows, {few}")
        if height < rows:
            fits = f.value(f"and i1 {fits}, {f.less('%rows', height + 1)}")
        with f.when(fits):
            operands = "ptr %left", "ptr %panel", "i64 %depth", f"ptr {to}", f"i64 {stride}"
            f.call(f"tile.{height}", *operands, "i1 %more", f"ptr {next_}", *_ANNOUNCED[1:])
        few = height
    with f.when(outside):
        f.call("move.edge", *part, "i1 false")
    return f.text()


def _heights(lanes: int) -> tuple[int, ...]:
    """Rows that tiles have; those of the last one are rounded up."""
    rows = rows_of_a_tile(lanes)
    return rows // 3, 2 * rows // 3, rows


class _Block:
    """The function `block`: y [rows, columns] = left right, where the rows of each lie so far apart."""

    def __init__(self, form: str, lanes: int, onto: bool) -> None:
        operands = (
            "ptr %left",
            "i64 %left.apart",
            "ptr %right",
            "i64 %right.apart",
            "ptr %y",
            "i64 %y.apart",
        )
        sizes = "i64 %rows", "i64 %columns", "i64 %depth"
        f = self.f = Function("block", *operands, *sizes, *(["i1 %onto"] if onto else []), lanes=lanes)
        self.form, self.lanes, self.columns, self.rows = form, lanes, VECTORS * lanes, rows_of_a_tile(lanes)
        self.tile = _tile_floats(form[0] == "n", lanes)
        held = f.choose("%onto", 1, 0) if onto else 0  # whether there are terms before the first
        step = f.choose(f.less("%depth", WHOLE + 1), WHOLE, DEPTH)
        memory = self._by_bands(step, held) if form[0] == "n" else self._by_panels(step, held)
        # A sum of nothing.
        with f.when(f.equal(f.add("%depth", held), 0)), f.loop("%rows") as i:
            y = f.at("%y", f.mul(i, "%y.apart"))
            f.line(f"call void @llvm.memset.p0.i64(ptr {y}, i8 0, i64 {f.mul('%columns', 4)}, i1 false)")
        f.line(f"call void @free(ptr {memory})")

    def _by_bands(self, step: str, held: str | int) -> str:
        """A left operand as it is multiplied. -> the memory to be freed"""
        f, most = self.f, _most_columns(self.lanes)
        wide = f.mul(f.ceil(f.min("%columns", most), self.columns), self.columns)
        deep = f.min("%depth", step)
        memory, band = self._memory(f.add(f.mul(wide, deep), self.tile))
        panels = f.at(band, self.tile)
        # Rows of the last tile that are not there are multiplied, too: what lies there must not be a slow number.
        f.line(f"call void @llvm.memset.p0.i64(ptr {band}, i8 0, i64 {4 * self.tile}, i1 false)")
        with f.loop("%columns", step=most) as first, f.loop("%depth", step=step) as k:
            some, more = f.min(step, f.sub("%depth", k)), f.less(0, f.add(k, held))
            end = f.min("%columns", f.add(first, most))
            # Of each row of the next band, while one panel's sums run.
            lines = f.ceil(some, f.mul(_LINE, f.ceil(f.sub(end, first), self.columns)))

            def panel(j: str) -> str:
                return f.at(panels, f.mul(f.sub(j, first), some))  # noqa: B023

            with f.loop(end, start=first, step=self.columns) as j:
                self._pack(j, k, some, panel(j))
            with f.loop("%rows", step=self.rows) as r:
                with f.loop(f.min(self.rows, f.sub("%rows", r))) as i:
                    from_ = f.at("%left", f.mul(f.add(r, i), "%left.apart"), k)
                    to = f.at(band, f.mul(i, WHOLE + _GAP))
                    f.call("copy", f"ptr {to}", f"ptr {from_}", f"i64 {some}")
                with f.loop(end, start=first, step=self.columns) as j:
                    y = f.at("%y", f.mul(r, "%y.apart"), j)
                    before = f.mul(f.div(f.sub(j, first), self.columns), f.mul(lines, _LINE))
                    ahead = f.at("%left", f.mul(f.add(r, self.rows), "%left.apart"), k, before)
                    announced = f.at(y, self.columns), ahead, "%left.apart", _LINE, lines
                    self._inside(band, panel(j), some, (r, y), j, more, announced)
        return memory

    def _by_panels(self, step: str, held: str | int) -> str:
        """A transposed left operand. -> the memory to be freed"""
        f = self.f
        size = f.mul(f.ceil("%rows", self.rows), self.tile)
        memory, panel = self._memory(f.add(size, WHOLE * self.columns))
        copied = f.at(panel, WHOLE * self.columns)
        # As above.
        start = f.mul(f.div("%rows", self.rows), self.tile)
        count = f.mul(f.sub(size, start), 4)
        f.line(f"call void @llvm.memset.p0.i64(ptr {f.at(copied, start)}, i8 0, i64 {count}, i1 false)")
        with f.loop("%depth", step=step) as k:
            some, more = f.min(step, f.sub("%depth", k)), f.less(0, f.add(k, held))
            from_, sizes = f.at("%left", f.mul(k, "%left.apart")), (f"i64 {some}", "i64 %rows")
            f.call("gather", f"ptr {copied}", f"ptr {from_}", "i64 %left.apart", *sizes)
            # Of the next terms, while one panel's sums run: each band announces the columns that are its rows.
            next_ = f.add(k, some)
            terms = f.ceil(f.min(step, f.sub("%depth", next_)), f.ceil("%columns", self.columns))
            terms = f.ceil(terms, self.rows)
            with f.loop("%columns", step=self.columns) as j:
                self._pack(j, k, some, panel)
                term = f.add(next_, f.mul(f.div(j, self.columns), f.mul(terms, self.rows)))
                with f.loop("%rows", step=self.rows) as r:
                    left = f.at(copied, f.mul(f.div(r, self.rows), self.tile))
                    y = f.at("%y", f.mul(r, "%y.apart"), j)
                    ahead = f.at("%left", f.mul(term, "%left.apart"), r), f.mul("%left.apart", terms)
                    announced = f.at(y, f.mul("%y.apart", self.rows)), *ahead, "%left.apart", terms
                    self._inside(left, panel, some, (r, y), j, more, announced)
        return memory

    def _memory(self, floats: str) -> tuple[str, str]:
        """Memory for so many floats: as it is to be freed, and where it begins."""
        f = self.f
        memory = f.value(f"call ptr @malloc(i64 {f.add(f.mul(floats, 4), 64)})")
        address = f.value(f"ptrtoint ptr {memory} to i64")
        return memory, f.value(f"inttoptr i64 {f.value(f'and i64 {f.add(address, 63)}, -64')} to ptr")

    def _pack(self, j: str, k: str, some: str, panel: str) -> None:
        """Columns from j on, rows from k on of the right operand."""
        f = self.f
        offsets = (f.mul(k, "%right.apart"), j) if self.form[1] == "n" else (f.mul(j, "%right.apart"), k)
        sizes = "i64 %right.apart", f"i64 {some}", f"i64 {f.sub('%columns', j)}"
        f.call("pack.panel", f"ptr {f.at('%right', *offsets)}", *sizes, f"ptr {panel}")

    def _inside(
        self,
        left: str,
        panel: str,
        some: str,
        row: tuple[str, str],
        j: str,
        more: str,
        announced: tuple[str | int, ...],
    ) -> None:
        """The tile of the band that begins with the row (its number, where it lies in y), columns from j on."""
        f, (r, y) = self.f, row
        sizes = f"i64 {f.sub('%rows', r)}", f"i64 {f.sub('%columns', j)}"
        announced = [
            f"{place.split()[0]} {value}" for place, value in zip(_ANNOUNCED, announced, strict=True)
        ]
        operands = f"ptr {left}", f"ptr {panel}", f"i64 {some}", f"ptr {y}", "i64 %y.apart"
        f.call("inside", *operands, *sizes, f"i1 {more}", *announced)


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
    `apart` floats lie between the rows of each. With a transposed left operand at most `MOST_ROWS` rows suit the
    caches. With `onto` it has one more parameter, i1 onto: the product is added to what y holds, as further terms of
    its sums.
    """
    by_rows = form[0] == "n"
    code = [
        _DECLARE.format(vector=f"<{lanes} x float>", kind=f"v{lanes}f32"),
        _copy(lanes),
        *([] if by_rows else [_gather(lanes)]),
        _pack_panel(form[1] == "t", lanes),
        *(_tile(height, by_rows, lanes) for height in _heights(lanes)),
        _move_edge(lanes),
        _inside(lanes),
        _Block(form, lanes, onto).f.text(),
    ]
    return "\n\n".join(code)
