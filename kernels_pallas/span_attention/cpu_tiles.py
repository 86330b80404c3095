"""The parts of span attention on a CPU, written as LLVM's intermediate representation: products of tiles that stay in
registers, copies in the orders in which they read, powers of two, and which keys a tile of queries sees.

A tile of a product has `Sizes.rows` rows of two vectors. Each step of its loop multiplies a number of every row with
the same two vectors, so no sum runs across a vector:

    c[r, :] += a[r, k] b[k, :]    for k = 0, 1, ...
"""

import dataclasses
from collections.abc import Callable, Sequence

from kernels_pallas.cpu_code import Function, Value
from kernels_pallas.cpu_math import constant

VECTORS = 2  # of a row of a tile
# What is not seen scores less than any top begins with: 2^(score - top) is 0 even where nothing is seen.
HIDDEN, LOWEST_TOP = -1e30, -1e29
NOTHING_SEEN = 1e30  # the top that is kept of a query that sees no key
# 2^x for |x| <= 1/2, from the highest power on: the relative error is below 2e-9 before rounding.
_POWERS = (1.5353361e-4, 1.3398875e-3, 9.6184369e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1, 1.0)
_ROUND = 1.5 * 2**23  # what is added to this is rounded to a whole number, which the lowest bits then hold
_LEAST = -125  # below, 2^x counts as 0
_LINE = 16  # floats of a cache line


@dataclasses.dataclass(frozen=True)
class Sizes:
    """dim: of a head. lanes: floats of a vector. keys: of a chunk, whose copies stay in the processor's cache."""

    dim: int
    lanes: int
    keys: int

    @property
    def rows(self) -> int:
        """Of a tile: its sums, two columns and a number must find registers, 16 where vectors are 8 floats."""
        return 4 if self.lanes == 8 else 8

    @property
    def width(self) -> int:
        """Columns of a tile; keys of a panel."""
        return VECTORS * self.lanes

    @property
    def line(self) -> int:
        """Floats from one row of a tile's scores to the next: no power of two, whose rows would share few places of
        the processor's first cache."""
        return self.keys + self.lanes

    @property
    def step(self) -> int:
        """What ranges of keys are rounded to: whole vectors, and whole tiles where keys are rows."""
        return max(self.lanes, self.rows)

    def function(self, name: str, *parameters: str) -> Function:
        return Function(name, *parameters, lanes=self.lanes)


# Numbers.


def largest(f: Function, a: Value, b: Value) -> str:
    return f.choose(f.less(a, b), b, a)


def down(f: Function, a: Value, unit: int) -> str:
    """The last multiple of a power of two."""
    return f.value(f"and i64 {a}, {-unit}")


def up(f: Function, a: Value, unit: int) -> str:
    return down(f, f.add(a, unit - 1), unit)


def either(f: Function, *conditions: str) -> str:
    result, *others = conditions
    for other in others:
        result = f.value(f"or i1 {result}, {other}")
    return result


# Vectors.


def select(f: Function, mask: str, a: str, b: str = "zeroinitializer") -> str:
    return f.value(f"select <{f.lanes} x i1> {mask}, {f.vector} {a}, {f.vector} {b}")


def power_of_two(f: Function, x: str) -> str:
    """2^x of a vector with x < 127, to one unit in the last place; 0 below -125; not a number where x is not."""
    ints = f"<{f.lanes} x i32>"
    low = f.value(f"fcmp olt {f.vector} {x}, {constant(_LEAST)}")
    x = select(f, low, constant(_LEAST), x)
    rounded = f.fadd(x, constant(_ROUND))
    rest = f.fsub(x, f.fsub(rounded, constant(_ROUND)))
    result = constant(_POWERS[0])
    for power in _POWERS[1:]:
        result = f.fma(result, rest, constant(power))
    exponent = f.value(f"shl {ints} {f.value(f'bitcast {f.vector} {rounded} to {ints}')}, splat (i32 23)")
    bits = f.value(f"add {ints} {f.value(f'bitcast {f.vector} {result} to {ints}')}, {exponent}")
    return select(f, low, "zeroinitializer", f.value(f"bitcast {ints} {bits} to {f.vector}"))


def tanh_of(f: Function, x: str, factor: str) -> str:
    """tanh(y), where x factor = 2 log2(e) y."""
    twice = f.fmul(x, factor)
    high = f.value(f"fcmp ogt {f.vector} {twice}, {constant(126)}")
    power = power_of_two(f, select(f, high, constant(126), twice))
    return f.fsub(constant(1), f.fdiv(constant(2), f.fadd(power, constant(1))))


def across(f: Function, vectors: Sequence[str], combine: Callable[[str, str], str]) -> str:
    """A vector whose float i combines all floats of vector i; there are at most as many as lanes, a power of two."""
    vectors, part = list(vectors), f.lanes
    while part > 1:
        part //= 2
        # The first and the second half of every part, of two vectors or of the last one.
        firsts = [at for at in range(2 * f.lanes) if at // part % 2 == 0]
        seconds = [at for at in range(2 * f.lanes) if at // part % 2]
        pairs = (
            list(zip(vectors[::2], vectors[1::2], strict=True))
            if len(vectors) > 1
            else [(*vectors, *vectors)]
        )
        vectors = [combine(_shuffle(f, a, b, firsts), _shuffle(f, a, b, seconds)) for a, b in pairs]
    return vectors[0]


def _shuffle(f: Function, a: str, b: str, places: Sequence[int]) -> str:
    order = ", ".join(f"i32 {place}" for place in places)
    return f.value(f"shufflevector {f.vector} {a}, {f.vector} {b}, <{f.lanes} x i32> <{order}>")


# Products.


def _product(
    name: str, sizes: Sizes, vectors: int, *, row: int, step: int, b_step: int, c_row: int, fresh: bool
) -> str:
    """c[r, :] += a[r, k] b[k, :] for k < count. a[r, k] lies at a + r `row` + k `step`, b[k] and c[r] in steps of
    their own. fresh: c begins as 0, and there are `dim` steps."""
    f = sizes.function(name, "ptr noalias %a", "ptr noalias %b", "ptr noalias %c", "i64 %count")
    places = [
        (r, j, f.at("%c", r * c_row + j * sizes.lanes)) for r in range(sizes.rows) for j in range(vectors)
    ]
    sums = {(r, j): f.variable("zeroinitializer" if fresh else f.load(at)) for r, j, at in places}
    at_once = 2 if fresh else 1
    with f.loop(sizes.dim if fresh else "%count", step=at_once) as first:
        for number in range(at_once):
            k = f.add(first, number)
            a, b = f.at("%a", f.mul(k, step)), f.at("%b", f.mul(k, b_step))
            columns = [f.load(f.at(b, j * sizes.lanes)) for j in range(vectors)]
            for r in range(sizes.rows):
                factor = f.splat(f.load(f.at(a, r * row), "float"))
                for j in range(vectors):
                    f.store(f.fma(factor, columns[j], f.load(sums[r, j])), sums[r, j])
    for r, j, at in places:
        f.store(f.load(sums[r, j]), at)
    return f.text()


def _scores(sizes: Sizes) -> str:
    """`scores`: a [rows, dim] times the panels' keys low to high, multiples of lanes -> c [rows, keys]."""
    f = sizes.function("scores", "ptr %a", "ptr %panels", "ptr %c", "i64 %low", "i64 %high")

    def product(vectors: int, key: str) -> None:
        panel = f.at("%panels", f.mul(down(f, key, sizes.width), sizes.dim), f.rem(key, sizes.width))
        f.call(f"score{vectors}", "ptr %a", f"ptr {panel}", f"ptr {f.at('%c', key)}", "i64 0")

    # Half a panel before and behind the whole ones.
    first = f.min(up(f, "%low", sizes.width), "%high")
    last = largest(f, first, down(f, "%high", sizes.width))
    with f.loop(first, start="%low", step=sizes.lanes) as key:
        product(1, key)
    with f.loop(last, start=first, step=sizes.width) as key:
        product(VECTORS, key)
    with f.loop("%high", start=last, step=sizes.lanes) as key:
        product(1, key)
    return f.text()


def _over_columns(name: str, tile: str, sizes: Sizes) -> str:
    """c [rows, dim] += a b, b [count, dim]."""
    f = sizes.function(name, "ptr %a", "ptr %b", "ptr %c", "i64 %count")
    whole = sizes.dim // sizes.width * sizes.width
    with f.loop(whole, step=sizes.width) as j:
        f.call(f"{tile}{VECTORS}", "ptr %a", f"ptr {f.at('%b', j)}", f"ptr {f.at('%c', j)}", "i64 %count")
    if whole < sizes.dim:
        f.call(f"{tile}1", "ptr %a", f"ptr {f.at('%b', whole)}", f"ptr {f.at('%c', whole)}", "i64 %count")
    return f.text()


# Copies. Rows behind the last are the last again: their scores are hidden, and their results not stored.


def _row(f: Function, number: Value) -> str:
    return f.at("%from", f.mul(f.min(number, f.sub("%count", 1)), "%stride"))


def _rows(sizes: Sizes) -> str:
    """`rows`: `filled` rows of the `count` at %from, a stride apart, times a factor."""
    f = sizes.function(
        "rows", "ptr %from", "i64 %stride", "i64 %count", "i64 %filled", "float %factor", "ptr noalias %to"
    )
    factor = f.splat("%factor")
    with f.loop("%filled") as r:
        old, new = _row(f, r), f.at("%to", f.mul(r, sizes.dim))
        for j in range(0, sizes.dim, sizes.lanes):
            f.store(f.fmul(f.load(f.at(old, j)), factor), f.at(new, j))
    return f.text()


def _panel(sizes: Sizes) -> str:
    """`panel`: `count` of `step` rows, a stride apart -> a part of a panel, [dim, width], whose columns they are."""
    f = sizes.function("panel", "ptr %from", "i64 %stride", "i64 %count", "ptr noalias %to")
    for first in range(0, sizes.step, sizes.lanes):
        rows = [_row(f, first + i) for i in range(sizes.lanes)]
        with f.loop(sizes.dim, step=sizes.lanes) as j:
            turned = f.transposed([f.load(f.at(row, j)) for row in rows])
            for i, vector in enumerate(turned):
                f.store(vector, f.at("%to", f.mul(f.add(j, i), sizes.width), first))
    return f.text()


def _announce(sizes: Sizes) -> str:
    """`announce`: `count` rows, a stride apart, will soon be read or written."""
    f = sizes.function("announce", "ptr %rows", "i64 %stride", "i64 %count")
    with f.loop("%count") as r:
        row = f.at("%rows", f.mul(r, "%stride"))
        for j in range(0, sizes.dim, _LINE):
            f.call("llvm.prefetch.p0", f"ptr {f.at(row, j)}", "i32 0", "i32 2", "i32 1")
    return f.text()


def functions(sizes: Sizes) -> str:
    """The functions `scores`; `mix`, for a [rows, keys]; `mix_turned`, for a [count, keys], whose columns are the rows
    of the product; `rows`, `panel` and `announce`."""
    dim, line, vector, kind = sizes.dim, sizes.line, f"<{sizes.lanes} x float>", f"v{sizes.lanes}f32"
    kinds = {
        "score": dict(row=dim, step=1, b_step=sizes.width, c_row=line, fresh=True),
        "mix": dict(row=line, step=1, b_step=dim, c_row=dim, fresh=False),
        "turned": dict(row=1, step=line, b_step=dim, c_row=dim, fresh=False),
    }
    return "\n\n".join(
        [
            f"declare {vector} @llvm.fma.{kind}({vector}, {vector}, {vector})",
            *(_product(f"{kind}{v}", sizes, v, **how) for kind, how in kinds.items() for v in (1, VECTORS)),
            _scores(sizes),
            _over_columns("mix", "mix", sizes),
            _over_columns("mix_turned", "turned", sizes),
            *(make(sizes) for make in (_rows, _panel, _announce)),
        ]
    )


# What is seen.


class Labels:
    """The segments of a run of tokens, in memory of the function `f`, and the least and the largest among every
    `sizes.step` of them."""

    def __init__(self, f: Function, sizes: Sizes, tokens: int) -> None:
        self.f, self.sizes = f, sizes
        self._labels, self._bounds = f.room(tokens), f.room(4 * (tokens // sizes.step))

    def fill(self, labels: str, first: Value, stop: Value, count: Value) -> None:
        """int32 labels of the tokens first to first + count - 1, 0 from `stop` on; count is a multiple of the step."""
        f = self.f
        with f.loop(count, step=self.sizes.step) as run:
            low, high = f.variable(2**31, "i64"), f.variable(0, "i64")
            with f.loop(self.sizes.step) as i:
                place = f.add(run, i)
                token = f.add(first, place)
                label = f.load(f.at(labels, f.min(token, f.sub(stop, 1))), "i32")
                label = f.choose(f.less(token, stop), label, 0, "i32")
                f.store(label, f.at(self._labels, place), "i32")
                label = f.value(f"sext i32 {label} to i64")
                f.store(f.min(f.load(low, "i64"), f.choose(f.less(0, label), label, 2**31)), low, "i64")
                f.store(largest(f, f.load(high, "i64"), label), high, "i64")
            for number, bound in enumerate((low, high)):
                f.store(f.load(bound, "i64"), self._bound(run, number), "i64")

    def one(self, place: Value) -> str:
        """A vector of the label of a token."""
        return _equal(self.f, self.f.load(self.f.at(self._labels, place), "i32"))

    def vector(self, place: Value) -> str:
        return self.f.value(f"load <{self.sizes.lanes} x i32>, ptr {self.f.at(self._labels, place)}, align 4")

    def meet(self, place: Value, other: "Labels", other_place: Value) -> str:
        """Whether the runs of `step` tokens that hold these two places may share a segment."""
        f = self.f
        low, high = (f.load(self._bound(place, number), "i64") for number in (0, 1))
        other_low, other_high = (f.load(other._bound(other_place, number), "i64") for number in (0, 1))
        return f.value(f"xor i1 {either(f, f.less(high, other_low), f.less(other_high, low))}, true")

    def _bound(self, place: Value, number: int) -> str:
        run = self.f.div(place, self.sizes.step)
        return self.f.at(self._bounds, self.f.mul(run, 2), number, kind="i64")


def _equal(f: Function, value: str) -> str:
    """A vector of equal i32."""
    ints = f"<{f.lanes} x i32>"
    first = f.value(f"insertelement {ints} poison, i32 {value}, i32 0")
    return f.value(f"shufflevector {ints} {first}, {ints} poison, {ints} zeroinitializer")


@dataclasses.dataclass(frozen=True)
class Span:
    """What the queries of a head see, in the code of `f`: its window and sinks are numbers there, at least 0.

    A chunk is the keys `start` to `stop` - 1; its keys are counted from `start`. A tile is the queries `first` to
    `last`. labels: the segments of the queries and of the keys in hand, or None.
    """

    f: Function
    sizes: Sizes
    window: str
    sink: str
    labels: tuple[Labels, Labels] | None

    def keys(self, first: Value, last: Value, start: Value, stop: Value) -> tuple[str, str]:
        """(low, high): all keys of the chunk that the queries see are low to high - 1, were they of one segment."""
        f = self.f
        near = largest(f, f.add(f.sub(first, largest(f, self.window, 1)), 1), start)
        behind = f.min(f.add(last, 1), stop)
        sinks = f.less(start, self.sink)
        sunk = f.choose(sinks, f.min(behind, self.sink), start)
        high = f.choose(f.less(near, behind), behind, sunk)
        return f.sub(f.choose(sinks, start, near), start), f.sub(high, start)

    def queries(self, key: Value, stop: Value) -> str:
        """Behind the last query before `stop` that sees any of the `sizes.rows` keys from `key` on."""
        f = self.f
        behind = f.add(f.add(key, self.sizes.rows - 1), largest(f, self.window, 1))
        return f.choose(f.less(key, self.sink), stop, f.min(behind, stop))

    def meeting(self, low: str, high: str, meets: Callable[[str], str]) -> tuple[str, str]:
        """The range without the runs of `sizes.step` at its ends for which `meets` is false."""
        f, step = self.f, self.sizes.step
        first, behind = f.variable(high, "i64"), f.variable(low, "i64")
        with f.loop(high, start=down(f, low, step), step=step) as place, f.when(meets(place)):
            f.store(f.min(f.load(first, "i64"), place), first, "i64")
            f.store(f.min(f.add(place, step), high), behind, "i64")
        return largest(f, low, f.load(first, "i64")), f.load(behind, "i64")

    def parts(self, low: str, high: str, first: str, last: str, start: Value) -> list[tuple[str, str, bool]]:
        """[(from, to, masked)]: vectors of the keys low to high - 1; all queries of the tile see an unmasked one."""
        f, lanes = self.f, self.sizes.lanes
        low, high = down(f, low, self.sizes.step), up(f, high, self.sizes.step)
        if self.labels is not None:
            return [(low, high, True)]
        end = f.sub(f.add(first, 1), start)
        end = largest(f, f.min(down(f, end, lanes), high), low)
        begin = f.sub(f.sub(f.add(last, 1), self.window), start)
        begin = f.min(largest(f, up(f, begin, lanes), low), end)
        return [(low, begin, True), (begin, end, False), (end, high, True)]

    def masks(self, first: str, start: Value, key: str, row: Value = 0) -> list[str]:
        """For every query of a tile, which of a vector of keys it sees. row: of the tile, among the queries in hand."""
        f, ints, bools = self.f, f"<{self.sizes.lanes} x i32>", f"<{self.sizes.lanes} x i1>"

        def equal(value: Value) -> str:
            return _equal(f, f.value(f"trunc i64 {value} to i32"))

        count = ", ".join(f"i32 {i}" for i in range(self.sizes.lanes))
        places = f.value(f"add {ints} {equal(f.add(start, key))}, <{count}>")
        early = f.value(f"icmp slt {ints} {places}, {equal(self.sink)}")
        window = equal(self.window)
        if self.labels is not None:
            queries, keys = self.labels
            label = keys.vector(key)
            real = f.value(f"icmp sgt {ints} {label}, zeroinitializer")
        seen = []
        for r in range(self.sizes.rows):
            distance = f.value(f"sub {ints} {equal(f.add(first, r))}, {places}")
            near = f.value(f"icmp ult {ints} {distance}, {window}")  # of a later key it is very large
            past = f.value(f"icmp sgt {ints} {distance}, splat (i32 -1)")
            mask = f.value(f"or {bools} {near}, {f.value(f'and {bools} {early}, {past}')}")
            if self.labels is not None:
                same = f.value(f"icmp eq {ints} {label}, {queries.one(f.add(row, r))}")
                mask = f.value(f"and {bools} {mask}, {f.value(f'and {bools} {same}, {real}')}")
            seen.append(mask)
        return seen
