"""What a thread computes at once of span attention on a CPU: a section of a head's queries forward, a key head with all
its query heads backward. Written as LLVM's intermediate representation; what they compute is said in `cpu.py`."""

import math
from collections.abc import Callable

from kernels_pallas.cpu_code import Array, Value
from kernels_pallas.cpu_math import constant
from kernels_pallas.span_attention import cpu_tiles as tiles
from kernels_pallas.span_attention.cpu_tiles import Labels, Sizes, Span, down, largest, up

SECTION = 256  # queries of a piece forward
BLOCK = 32  # queries that share a pass over a chunk's gradients backward
# Operands of both calls, then of the backward one, then the segments where there are some.
_OPERANDS = ("query", "key", "value", "window", "sink", "numbers")
_SAVED = ("out", "top", "inverse", "gradient")


class _Piece:
    """The function `piece`: its operands and results, whose names are behind "to ", and what both passes do with them.

    sizes: of heads and tiles. capped, segmented: whether there are a soft cap and segments.
    """

    def __init__(
        self, sizes: Sizes, operands: tuple[str, ...], results: tuple[str, ...], capped: bool, segmented: bool
    ) -> None:
        f = self.f = sizes.function("piece", "ptr %job", "i64 %index")
        self.sizes, self.capped, self.segmented = sizes, capped, segmented
        call = f.field("%job", "%job", 6, "ptr")
        names = [*operands, "segments"] if segmented else operands
        numbers = {name: i for i, name in enumerate(names)}
        numbers |= {"to " + name: -1 - i for i, name in enumerate(results)}
        # All buffers first: in another order LLVM keeps other values on the stack.
        buffers = {name: f.buffer(call, number) for name, number in numbers.items()}
        self.arrays = {name: Array(f, buffer, f.data(buffer)) for name, buffer in buffers.items()}
        self.data = {name: array.data for name, array in self.arrays.items()}
        self.batch, self.length, self.heads = self.arrays["query"].dims(3)
        self.kv_heads = self.arrays["key"].dim(2)
        self.groups = f.div(self.heads, self.kv_heads)
        self.stride, self.kv_stride = f.mul(self.heads, sizes.dim), f.mul(self.kv_heads, sizes.dim)
        # As `cpu._numbers` says.
        self.scale, self.cap_factor, self.cap, self.plain_scale = (
            f.load(f.at(self.data["numbers"], i), "float") for i in range(4)
        )

    # Where things lie.

    def head(self, name: str, row: Value, head: Value, heads: Value) -> str:
        """The first token of a head in an array [B, L, heads, d]."""
        f = self.f
        before = f.add(f.mul(f.mul(row, self.length), heads), head)
        return f.at(self.data[name], f.mul(before, self.sizes.dim))

    def line(self, name: str, row: Value, head: Value) -> str:
        """A head's numbers in an array [B, H, L]."""
        f = self.f
        return f.at(self.data[name], f.mul(f.add(f.mul(row, self.heads), head), self.length))

    def labels_of(self, row: Value) -> str:
        return self.f.at(self.data["segments"], self.f.mul(row, self.length))

    def span(self, head: Value, labels: tuple[Labels, Labels] | None) -> Span:
        f = self.f

        def read(name: str) -> str:
            return f.min(largest(f, self.arrays[name].whole(head), 0), self.length)

        return Span(f, self.sizes, read("window"), read("sink"), labels)

    # Copies.

    def copy(self, pointer: str, stride: Value, count: Value, filled: Value, factor: str, to: str) -> None:
        places = f"ptr {pointer}", f"i64 {stride}", f"i64 {count}", f"i64 {filled}"
        self.f.call("rows", *places, f"float {factor}", f"ptr {to}")

    def panel(self, pointer: str, count: Value, key: str, panels: str) -> None:
        """Copies the `step` keys from `key` on, or `count` of them, into their panel."""
        f, width = self.f, self.sizes.width
        to = f.at(panels, f.mul(down(f, key, width), self.sizes.dim), f.rem(key, width))
        f.call("panel", f"ptr {pointer}", f"i64 {self.kv_stride}", f"i64 {count}", f"ptr {to}")

    def fill(self, to: str, floats: Value, value: str = "zeroinitializer") -> None:
        """floats: a multiple of the lanes."""
        with self.f.loop(floats, step=self.sizes.lanes) as i:
            self.f.store(value, self.f.at(to, i))

    # Products.

    def scores(self, rows: str, panels: str, to: str, low: str, high: str) -> None:
        f, step = self.f, self.sizes.step
        ends = f"i64 {down(f, low, step)}", f"i64 {up(f, high, step)}"
        f.call("scores", f"ptr {rows}", f"ptr {panels}", f"ptr {to}", *ends)

    def mix(self, weights: str, rows: str, to: str, low: str, high: str) -> None:
        """to [rows, dim] += weights [rows, keys] rows [keys, dim], keys low to high - 1."""
        f = self.f
        first, count = f.at(rows, f.mul(low, self.sizes.dim)), f.sub(high, low)
        f.call("mix", f"ptr {f.at(weights, low)}", f"ptr {first}", f"ptr {to}", f"i64 {count}")

    # Vectors of a tile.

    def capped_score(self, score: str) -> tuple[str, str | None]:
        """The score, and where there is a soft cap its derivative after that before the cap."""
        if not self.capped:
            return score, None
        f = self.f
        tanh = tiles.tanh_of(f, score, f.splat(self.cap_factor))
        return f.fmul(tanh, f.splat(self.cap)), f.fsub(constant(1), f.fmul(tanh, tanh))

    def number(self, pointer: str, row: int) -> str:
        """A vector of a row's number."""
        return self.f.splat(self.f.load(self.f.at(pointer, row), "float"))

    def by_row(self, vectors: list[str], combine: Callable[[str, str], str]) -> list[str]:
        """`tiles.across` of a vector for each row, as vectors of at most as many rows as lanes."""
        lanes = self.sizes.lanes
        groups = (vectors[i : i + lanes] for i in range(0, self.sizes.rows, lanes))
        return [tiles.across(self.f, group, combine) for group in groups]


class _Forward(_Piece):
    def __init__(self, sizes: Sizes, capped: bool, segmented: bool) -> None:
        super().__init__(sizes, _OPERANDS, ("out", "top", "inverse"), capped, segmented)
        f, dim, rows = self.f, sizes.dim, sizes.rows
        self.chunk_keys, self.chunk_values = f.room(sizes.keys * dim), f.room(sizes.keys * dim)
        self.queries, self.sums = f.room(rows * dim), f.room(rows * dim)
        self.weights = f.room(rows * sizes.line)
        # Of a tile's queries, and what their tops' move made of the sums so far.
        self.top, self.total, self.old = (f.room(sizes.step) for _ in range(3))
        labels = (Labels(f, sizes, sizes.step), Labels(f, sizes, sizes.keys)) if segmented else None

        all_heads = f.mul(self.batch, self.heads)
        number = f.rem("%index", all_heads)
        self.row, head = f.div(number, self.heads), f.rem(number, self.heads)
        # The last queries see the most keys: they go first.
        section = f.sub(f.sub(f.ceil(self.length, SECTION), 1), f.div("%index", all_heads))
        self.begin = f.mul(section, SECTION)
        self.end = f.min(f.add(self.begin, SECTION), self.length)
        self.query, self.out = (self.head(x, self.row, head, self.heads) for x in ("query", "to out"))
        kv_head = f.div(head, self.groups)
        self.kv = [self.head(x, self.row, kv_head, self.kv_heads) for x in ("key", "value")]
        self.kept = [(self.top, self.line("to top", self.row, head))]
        self.kept.append((self.total, self.line("to inverse", self.row, head)))
        self.span_of_head = self.span(head, labels)

    def code(self) -> str:
        f, keys = self.f, self.sizes.keys
        with f.loop(self.end, step=keys) as start:
            stop = f.min(f.add(start, keys), self.end)
            low, high = self.span_of_head.keys(self.begin, f.sub(self.end, 1), start, stop)
            ready = f.variable(down(f, low, self.sizes.step), "i64")
            if self.segmented:
                with f.when(f.less(low, high)):
                    count = up(f, f.sub(stop, start), self.sizes.step)
                    self.span_of_head.labels[1].fill(self.labels_of(self.row), start, stop, count)
            with f.loop(self.end, start=largest(f, self.begin, start), step=self.sizes.rows) as first:
                self._tile(first, start, stop, ready)
        return f.text()

    def _tile(self, first: str, start: str, stop: str, ready: str) -> None:
        f, rows, span = self.f, self.sizes.rows, self.span_of_head
        behind = f.min(f.add(first, rows), self.end)
        count, last = f.sub(behind, first), f.sub(behind, 1)
        low, high = span.keys(first, last, start, stop)
        if self.segmented:
            queries, keys = span.labels
            queries.fill(self.labels_of(self.row), first, behind, self.sizes.step)
            low, high = span.meeting(low, high, lambda place: queries.meet(0, keys, place))
        some, opening = f.less(low, high), f.equal(start, 0)
        closing = f.less(last, f.add(start, self.sizes.keys))
        with f.when(tiles.either(f, some, opening, closing)):
            with f.when(opening):
                self.fill(self.top, self.sizes.step, constant(tiles.LOWEST_TOP))
                self.fill(self.total, self.sizes.step)
                self.fill(self.sums, rows * self.sizes.dim)
            with f.when(f.less(0, start)):
                self._move(first, count, save=False)
            with f.when(some):
                self._prepare(start, stop, ready, high)
                for pointer in (self.query, self.out):
                    self._announce(pointer, self.stride, f.add(first, rows), rows)
                there = f.at(self.query, f.mul(first, self.stride))
                self.copy(there, self.stride, count, rows, self.scale, self.queries)
                self.scores(self.queries, self.chunk_keys, self.weights, low, high)
                self._soften(first, last, start, low, high)
                self.mix(self.weights, self.chunk_values, self.sums, low, high)
            with f.when(closing):
                self._divide()
            self._move(first, count, save=True)

    def _prepare(self, start: str, stop: str, ready: str, high: str) -> None:
        """Copies the keys and values of the chunk up to `high`, as far as they are not `ready`."""
        f, step = self.f, self.sizes.step
        with f.loop(high, start=f.load(ready, "i64"), step=step) as k:
            token = f.add(start, k)
            count, offset = f.min(f.sub(stop, token), step), f.mul(token, self.kv_stride)
            for pointer in self.kv:
                self._announce(pointer, self.kv_stride, f.add(token, step), step)
            key, value = (f.at(pointer, offset) for pointer in self.kv)
            self.panel(key, count, k, self.chunk_keys)
            to = f.at(self.chunk_values, f.mul(k, self.sizes.dim))
            self.copy(value, self.kv_stride, count, count, "1.0", to)
        f.store(largest(f, f.load(ready, "i64"), up(f, high, step)), ready, "i64")

    def _announce(self, pointer: str, stride: Value, first: Value, count: Value) -> None:
        """Tokens that the next tile reads or writes."""
        f = self.f
        f.call("announce", f"ptr {f.at(pointer, f.mul(first, stride))}", f"i64 {stride}", f"i64 {count}")

    def _soften(self, first: str, last: str, start: str, low: str, high: str) -> None:
        """Scores become weights; top, total and the sums are moved to the new maximum."""
        f, lanes, rows, line = self.f, self.sizes.lanes, self.sizes.rows, self.sizes.line
        best = [f.variable(constant(tiles.HIDDEN)) for _ in range(rows)]
        parts = self.span_of_head.parts(low, high, first, last, start)
        for begin, end, masked in parts:
            with f.loop(end, start=begin, step=lanes) as k:
                seen = self.span_of_head.masks(first, start, k) if masked else None
                for r in range(rows):
                    at = f.at(self.weights, f.add(k, r * line))
                    score, _ = self.capped_score(f.load(at))
                    if masked:
                        score = tiles.select(f, seen[r], score, constant(tiles.HIDDEN))
                    if masked or self.capped:
                        f.store(score, at)
                    f.store(f.fmax(score, f.load(best[r])), best[r])
        for i, most in enumerate(self.by_row([f.load(x) for x in best], f.fmax)):
            at = f.at(self.top, i * lanes)
            before = f.load(at)
            after = f.fmax(most, before)
            f.store(after, at)
            f.store(tiles.power_of_two(f, f.fsub(before, after)), f.at(self.old, i * lanes))
        added = [f.variable() for _ in range(rows)]
        with f.loop(parts[-1][1], start=parts[0][0], step=lanes) as k:
            for r in range(rows):
                at = f.at(self.weights, f.add(k, r * line))
                weight = tiles.power_of_two(f, f.fsub(f.load(at), self.number(self.top, r)))
                f.store(weight, at)
                f.store(f.fadd(f.load(added[r]), weight), added[r])
        for i, more in enumerate(self.by_row([f.load(x) for x in added], f.fadd)):
            at = f.at(self.total, i * lanes)
            f.store(f.fma(f.load(at), f.load(f.at(self.old, i * lanes)), more), at)
        with f.when(f.less(0, start)):
            self._scale_sums(self.old)

    def _scale_sums(self, factors: str) -> None:
        f, dim = self.f, self.sizes.dim
        for r in range(self.sizes.rows):
            factor = self.number(factors, r)
            for j in range(0, dim, self.sizes.lanes):
                at = f.at(self.sums, r * dim + j)
                f.store(f.fmul(f.load(at), factor), at)

    def _divide(self) -> None:
        """The end of a tile: sums over totals, which become their inverses."""
        f = self.f
        for i in range(0, self.sizes.step, self.sizes.lanes):
            top, total = f.at(self.top, i), f.at(self.total, i)
            divisor = f.load(total)
            none = f.value(f"fcmp oeq {f.vector} {divisor}, zeroinitializer")
            f.store(tiles.select(f, none, "zeroinitializer", f.fdiv(constant(1), divisor)), total)
            f.store(tiles.select(f, none, constant(tiles.NOTHING_SEEN), f.load(top)), top)
        self._scale_sums(self.total)

    def _move(self, first: str, count: str, save: bool) -> None:
        """A tile's numbers and sums into the results, or from there."""
        f, dim = self.f, self.sizes.dim
        with f.loop(count) as r:
            token = f.add(first, r)
            for here, there in self.kept:
                ends = f.at(there, token), f.at(here, r)
                f.store(f.load(ends[save], "float"), ends[not save], "float")
            ends = f.at(self.out, f.mul(token, self.stride)), f.at(self.sums, f.mul(r, dim))
            for j in range(0, dim, self.sizes.lanes):
                f.store(f.load(f.at(ends[save], j)), f.at(ends[not save], j))


class _Backward(_Piece):
    def __init__(self, sizes: Sizes, capped: bool, segmented: bool) -> None:
        super().__init__(sizes, _OPERANDS + _SAVED, ("query", "key", "value"), capped, segmented)
        f, dim = self.f, sizes.dim
        # Of a chunk: keys as rows and in panels, values in panels, gradients.
        chunk = [f.room(sizes.keys * dim) for _ in range(5)]
        self.key_rows, self.key_panels, self.value_panels, self.d_key, self.d_value = chunk
        # Of a block of queries: rows, gradients of the output, of the query; scores and weights, and their gradients.
        self.queries, self.d_out, self.d_query = (f.room(BLOCK * dim) for _ in range(3))
        self.weights, self.d_scores = f.room(BLOCK * sizes.line), f.room(BLOCK * sizes.line)
        self.top, self.delta = f.room(BLOCK), f.room(BLOCK + sizes.lanes)  # a vector is stored for every tile
        self.labels = (Labels(f, sizes, BLOCK), Labels(f, sizes, sizes.keys)) if segmented else None

        self.row, self.kv_head = f.div("%index", self.kv_heads), f.rem("%index", self.kv_heads)
        names = ("key", "value", "to key", "to value")
        self.kv = {name: self.head(name, self.row, self.kv_head, self.kv_heads) for name in names}

    def code(self) -> str:
        f, keys = self.f, self.sizes.keys
        with f.loop(self.length, step=keys) as start:
            stop = f.min(f.add(start, keys), self.length)
            count, ready = f.sub(stop, start), f.variable(0, "i64")
            if self.segmented:
                self.labels[1].fill(self.labels_of(self.row), start, stop, up(f, count, self.sizes.step))
            with f.loop(self.groups) as group:
                head = f.add(f.mul(self.kv_head, self.groups), group)
                names = ("query", "out", "gradient", "to query")
                at = {name: self.head(name, self.row, head, self.heads) for name in names}
                at |= {name: self.line(name, self.row, head) for name in ("top", "inverse")}
                span = self.span(head, self.labels)
                with f.loop(self.length, start=start, step=BLOCK) as begin:
                    self._block(at, span, begin, start, stop, ready)
            self._prepare(start, stop, ready, count)
            self._write_keys(start, count)
        return f.text()

    def _block(self, at: dict[str, str], span: Span, begin: str, start: str, stop: str, ready: str) -> None:
        f, rows = self.f, self.sizes.rows
        end = f.min(f.add(begin, BLOCK), self.length)
        size = f.sub(end, begin)
        low, high = span.keys(begin, f.sub(end, 1), start, stop)
        some = f.less(low, high)
        with f.when(tiles.either(f, some, f.equal(start, 0))):
            self.fill(self.d_query, f.mul(up(f, size, rows), self.sizes.dim))
            with f.when(some):
                self._prepare(start, stop, ready, high)
                self._read(at, begin, size)
                if self.segmented:
                    count = up(f, size, self.sizes.step)
                    self.labels[0].fill(self.labels_of(self.row), begin, end, count)
                with f.loop(size, step=rows) as tile:
                    self._tile_of_queries(span, tile, f.add(begin, tile), end, start, stop)
                with f.loop(high, start=down(f, low, rows), step=rows) as place:
                    self._tile_of_keys(span, place, begin, end, start)
            self._write_queries(at["to query"], begin, size, start)

    def _prepare(self, start: str, stop: str, ready: str, high: str) -> None:
        """Copies the keys and values of the chunk up to `high`, as far as they are not `ready`; gradients become 0."""
        f, dim, step = self.f, self.sizes.dim, self.sizes.step
        with f.loop(high, start=f.load(ready, "i64"), step=step) as k:
            token = f.add(start, k)
            count, offset = f.min(f.sub(stop, token), step), f.mul(token, self.kv_stride)
            key, value = (f.at(self.kv[name], offset) for name in ("key", "value"))
            self.copy(key, self.kv_stride, count, count, "1.0", f.at(self.key_rows, f.mul(k, dim)))
            self.panel(key, count, k, self.key_panels)
            self.panel(value, count, k, self.value_panels)
            for gradient in (self.d_key, self.d_value):
                self.fill(f.at(gradient, f.mul(k, dim)), step * dim)
        f.store(largest(f, f.load(ready, "i64"), up(f, high, step)), ready, "i64")

    def _read(self, at: dict[str, str], first: str, count: str) -> None:
        """Rows of a block: queries, gradients over totals, and these gradients' products with the output."""
        f, dim, lanes, rows = self.f, self.sizes.dim, self.sizes.lanes, self.sizes.rows
        there = f.at(at["query"], f.mul(first, self.stride))
        self.copy(there, self.stride, count, up(f, count, rows), self.scale, self.queries)
        with f.loop(count, step=rows) as tile:
            products = []
            for r in range(rows):
                place = f.add(tile, r)
                token = f.add(first, f.min(place, f.sub(count, 1)))
                f.store(f.load(f.at(at["top"], token), "float"), f.at(self.top, place), "float")
                inverse = f.splat(f.load(f.at(at["inverse"], token), "float"))
                offset, product = f.mul(token, self.stride), "zeroinitializer"
                for j in range(0, dim, lanes):
                    gradient = f.fmul(f.load(f.at(at["gradient"], offset, j)), inverse)
                    f.store(gradient, f.at(self.d_out, f.mul(place, dim), j))
                    product = f.fma(gradient, f.load(f.at(at["out"], offset, j)), product)
                products.append(product)
            for i, sums in enumerate(self.by_row(products, f.fadd)):
                f.store(sums, f.at(self.delta, tile, i * lanes))

    def _tile_of_queries(self, span: Span, tile: str, first: str, end: str, start: str, stop: str) -> None:
        """Weights, gradients of scores and of queries. tile: of the block, whose queries end before `end`."""
        f, dim, step = self.f, self.sizes.dim, self.sizes.step
        last = f.sub(f.min(f.add(first, self.sizes.rows), end), 1)
        low, high = span.keys(first, last, start, stop)
        if self.segmented:
            queries, keys = self.labels
            begin, behind = down(f, low, step), up(f, high, step)
            low, high = span.meeting(low, high, lambda place: queries.meet(tile, keys, place))
            self._clear(tile, begin, f.min(down(f, low, step), behind))
            self._clear(tile, largest(f, up(f, high, step), begin), behind)
        with f.when(f.less(low, high)):
            queries, d_out, d_query = (
                f.at(x, f.mul(tile, dim)) for x in (self.queries, self.d_out, self.d_query)
            )
            weights, d_scores = (f.at(x, f.mul(tile, self.sizes.line)) for x in (self.weights, self.d_scores))
            self.scores(queries, self.key_panels, weights, low, high)
            self.scores(d_out, self.value_panels, d_scores, low, high)
            self._soften(span, tile, first, last, start, low, high)
            self.mix(d_scores, self.key_rows, d_query, low, high)

    def _clear(self, tile: str, low: str, high: str) -> None:
        """Keys of no segment of the tile's: the products over queries read them."""
        f = self.f
        with f.loop(high, start=low, step=self.sizes.lanes) as k:
            for r in range(self.sizes.rows):
                at = f.add(f.mul(f.add(tile, r), self.sizes.line), k)
                for matrix in (self.weights, self.d_scores):
                    f.store("zeroinitializer", f.at(matrix, at))

    def _soften(self, span: Span, tile: str, first: str, last: str, start: str, low: str, high: str) -> None:
        """Scores become weights, and gradients of weights become those of scores."""
        f, lanes = self.f, self.sizes.lanes
        top, delta = f.at(self.top, tile), f.at(self.delta, tile)
        for begin, end, masked in span.parts(low, high, first, last, start):
            with f.loop(end, start=begin, step=lanes) as k:
                seen = span.masks(first, start, k, tile) if masked else None
                for r in range(self.sizes.rows):
                    place = f.add(f.mul(f.add(tile, r), self.sizes.line), k)
                    at, d_at = f.at(self.weights, place), f.at(self.d_scores, place)
                    score, slope = self.capped_score(f.load(at))
                    weight = tiles.power_of_two(f, f.fsub(score, self.number(top, r)))
                    if masked:
                        weight = tiles.select(f, seen[r], weight)
                    gradient = f.fmul(weight, f.fsub(f.load(d_at), self.number(delta, r)))
                    if self.capped:
                        gradient = f.fmul(gradient, slope)
                    if masked:
                        gradient = tiles.select(f, seen[r], gradient)
                    f.store(weight, at)
                    f.store(gradient, d_at)

    def _tile_of_keys(self, span: Span, place: str, begin: str, end: str, start: str) -> None:
        """Gradients of keys and values over the block's queries, begin to end - 1. place: of the keys in the chunk."""
        f, dim = self.f, self.sizes.dim
        key = f.add(start, place)
        first, behind = f.sub(largest(f, begin, key), begin), f.sub(span.queries(key, end), begin)
        if self.segmented:
            queries, keys = self.labels
            first, behind = span.meeting(first, behind, lambda tile: queries.meet(tile, keys, place))
        with f.when(f.less(first, behind)):
            at = f.add(f.mul(first, self.sizes.line), place)
            sums = (self.weights, self.d_out, self.d_value), (self.d_scores, self.queries, self.d_key)
            for matrix, rows, to in sums:
                places = (f.at(matrix, at), f.at(rows, f.mul(first, dim)), f.at(to, f.mul(place, dim)))
                f.call("mix_turned", *(f"ptr {x}" for x in places), f"i64 {f.sub(behind, first)}")

    def _write_queries(self, to: str, first: str, count: str, start: str) -> None:
        f, dim, lanes = self.f, self.sizes.dim, self.sizes.lanes
        factor = f.splat(self.plain_scale)
        with f.loop(count) as r:
            there = f.at(to, f.mul(f.add(first, r), self.stride))
            parts = [
                f.fmul(f.load(f.at(self.d_query, f.mul(r, dim), j)), factor) for j in range(0, dim, lanes)
            ]
            with f.when(f.equal(start, 0)):
                for j, part in enumerate(parts):
                    f.store(part, f.at(there, j * lanes))
            with f.when(f.less(0, start)):
                for j, part in enumerate(parts):
                    f.store(f.fadd(f.load(f.at(there, j * lanes)), part), f.at(there, j * lanes))

    def _write_keys(self, start: str, count: str) -> None:
        f, dim = self.f, self.sizes.dim
        # The queries that the scores' gradients were multiplied with hold log2(e).
        results = ("to key", self.d_key, math.log(2)), ("to value", self.d_value, 1)
        with f.loop(count) as r:
            there = f.mul(f.add(start, r), self.kv_stride)
            for name, gradient, factor in results:
                for j in range(0, dim, self.sizes.lanes):
                    part = f.fmul(f.load(f.at(gradient, f.mul(r, dim), j)), constant(factor))
                    f.store(part, f.at(self.kv[name], there, j))


def forward(sizes: Sizes, capped: bool, segmented: bool) -> str:
    """The function `piece` of the forward pass."""
    return _Forward(sizes, capped, segmented).code()


def backward(sizes: Sizes, capped: bool, segmented: bool) -> str:
    """The function `piece` of the backward pass."""
    return _Backward(sizes, capped, segmented).code()
