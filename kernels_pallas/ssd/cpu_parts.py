"""What a piece of the mixer's kernel for a CPU is made of, a function of the machine code each (`ssd.cpu`).

Matrices of a chunk lie row by row: `CHUNK` tokens of x [P], B and C [N], B turned [N, CHUNK], scores and weights
[CHUNK, CHUNK], a state [N, P]. Products are tiles of `rows` x 2 vectors that stay in registers while a loop runs over
the terms of their sums, so every element is one chain of fused multiply-adds in the order of its terms.
"""

import dataclasses
import math
from collections.abc import Callable

from kernels_pallas.cpu_code import Function, Value
from kernels_pallas.cpu_math import number

CHUNK = 64  # tokens of a piece
_AHEAD = 8  # tokens between the announcement of their inputs and the read
# e^x of |x| <= ln 2 / 2 to 2e-9, from the highest power on: the polynomial of the least largest relative error.
_POWERS = (
    0.0013836824800819159,
    0.008374824188649654,
    0.04166822507977486,
    0.16666419804096222,
    0.49999991059303284,
    1.0,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the code is made for: P, N, taps of the convolution, floats of a vector, rows of a tile."""

    channels: int
    state: int
    taps: int
    lanes: int
    rows: int


def _vectors(width: int, lanes: int) -> int:
    """Of a row of a tile."""
    return 1 if (width // lanes) % 2 else 2


def _iota(f: Function, first: Value) -> str:
    """The numbers from `first` on, as floats."""
    numbers = ", ".join(f"float {number(i)}" for i in range(f.lanes))
    start = f.splat(f.value(f"uitofp i64 {first} to float"))
    return f.value(f"fadd {f.vector} {start}, <{numbers}>")


def _select(f: Function, comparison: str, a: str, b: str, yes: str, no: str) -> str:
    """yes where the floats compare so, else no."""
    mask = f.value(f"fcmp {comparison} {f.vector} {a}, {b}")
    return f.value(f"select <{f.lanes} x i1> {mask}, {f.vector} {yes}, {f.vector} {no}")


def _one(f: Function, pointer: str, *offsets: Value) -> str:
    """A vector of the float there."""
    return f.splat(f.load(f.at(pointer, *offsets), "float"))


def _accumulate(
    f: Function,
    sums: list[list[str]],
    depth: Value,
    left: Callable[[str, int], str],
    right: Callable[[str], str],
) -> None:
    """sums[r][j] += left(k, r) * right(k)[j] over k < depth; left and right give addresses."""
    with f.loop(depth) as k:
        here = right(k)
        columns = [f.load(f.at(here, j * f.lanes)) for j in range(len(sums[0]))]
        for r, row in enumerate(sums):
            value = _one(f, left(k, r))
            for total, column in zip(row, columns, strict=True):
                f.store(f.fma(value, column, f.load(total)), total)


def _sums(f: Function, rows: int, vectors: int) -> list[list[str]]:
    return [[f.variable() for _ in range(vectors)] for _ in range(rows)]


def _silu(f: Function, x: str) -> str:
    """x / (1 + e^-x), to two units in the last place.

    With n the nearest whole number to -x / ln 2, e^-x is 2^n times a polynomial of what is left. Adding 1.5 * 2^23 to n
    rounds it, and leaves it in the lowest bits, from where a shift brings it into the exponent. The reciprocal is a
    guess from the bits, whose error Newton's steps of second and third order take from 0.05 to 2e-8.
    """
    ints = f"<{f.lanes} x i32>"

    def as_ints(value: str) -> str:
        return f.value(f"bitcast {f.vector} {value} to {ints}")

    def as_floats(value: str) -> str:
        return f.value(f"bitcast {ints} {value} to {f.vector}")

    limited = f.value(f"call {f.vector} @llvm.maxnum.{f.kind}({f.vector} {x}, {f.vector} {f.number(-80)})")
    limited = f.value(
        f"call {f.vector} @llvm.minnum.{f.kind}({f.vector} {limited}, {f.vector} {f.number(80)})"
    )
    shifted = f.fma(limited, f.number(-1 / math.log(2)), f.number(3 << 22))
    n = f.fsub(shifted, f.number(3 << 22))
    left = f.value(f"fneg {f.vector} {f.fma(n, f.number(math.log(2)), limited)}")
    power = f.number(_POWERS[0])
    for factor in _POWERS[1:]:
        power = f.fma(power, left, f.number(factor))
    exponent = f.value(f"shl {ints} {as_ints(shifted)}, splat (i32 23)")
    x_and = f.fadd(as_floats(f.value(f"add {ints} {as_ints(power)}, {exponent}")), f.number(1))
    guess = as_floats(f.value(f"sub {ints} splat (i32 {0x7EF311C3}), {as_ints(x_and)}"))
    minus = f.value(f"fneg {f.vector} {x_and}")
    error = f.fma(minus, guess, f.number(1))
    guess = f.fma(guess, error, guess)
    error = f.fma(minus, guess, f.number(1))
    return f.fmul(x, f.fma(guess, f.fma(error, error, error), guess))


def announce(f: Function, pointer: str, floats: int) -> None:
    """That so many floats will soon be read."""
    for offset in range(0, floats + 15, 16):  # of a cache line
        f.announce(f.at(pointer, offset))


def convolve(width: int, scaled: bool, s: Sizes) -> str:
    """silu of the convolution of `%count` tokens -> %to [CHUNK, width].

    in: the first token's inputs, rows `%stride` apart, with the tokens before it in front; kernel and bias at the first
    channel, taps `%apart` floats apart; first: of each token, the first one it may see, counted from %in. Where
    `scaled`, also %scaled[t] = factors[t] * %to[t].
    """
    name = f"convolve.{width}" + (".scaled" if scaled else "")
    f = Function(
        name,
        "ptr noalias %in",
        "i64 %stride",
        "ptr noalias %kernel",
        "i64 %apart",
        "ptr noalias %bias",
        "ptr noalias %first",
        "i64 %count",
        "ptr noalias %to",
        *(("ptr noalias %factors", "ptr noalias %scaled") if scaled else ()),
        lanes=s.lanes,
    )
    with f.loop("%count") as t:
        here = f.at("%in", f.mul(t, "%stride"))
        first = f.value(f"fptosi float {f.load(f.at('%first', t), 'float')} to i64")
        sources = []
        for back in range(1, s.taps):
            place = f.sub(t, back)
            seen = f.value(f"icmp sge i64 {place}, {first}")
            sources.append(f.choose(seen, f.at("%in", f.mul(place, "%stride")), "@zeros", "ptr"))
        announce(f, f.at(here, f.mul(_AHEAD, "%stride")), width)
        to = f.at("%to", f.mul(t, width))
        factor = _one(f, "%factors", t) if scaled else None
        for c in range(0, width, s.lanes):
            total = f.fma(
                f.load(f.at(here, c)),
                f.load(f.at("%kernel", f.mul("%apart", s.taps - 1), c)),
                f.load(f.at("%bias", c)),
            )
            for back, source in enumerate(sources, 1):
                tap = f.load(f.at("%kernel", f.mul("%apart", s.taps - 1 - back), c))
                total = f.fma(f.load(f.at(source, c)), tap, total)
            y = _silu(f, total)
            f.store(y, f.at(to, c))
            if factor is not None:
                f.store(f.fmul(y, factor), f.at("%scaled", f.mul(t, width), c))
    return f.text()


def transpose(s: Sizes) -> str:
    """from [%rows, %columns], multiples of a vector -> to [%columns, %rows], rows `%apart` floats apart."""
    f = Function(
        "transpose",
        "ptr noalias %from",
        "i64 %rows",
        "i64 %columns",
        "ptr noalias %to",
        "i64 %apart",
        lanes=s.lanes,
    )
    with f.loop("%rows", step=s.lanes) as i, f.loop("%columns", step=s.lanes) as j:
        rows = [f.load(f.at("%from", f.mul(f.add(i, r), "%columns"), j)) for r in range(s.lanes)]
        for r, row in enumerate(f.transposed(rows)):
            f.store(row, f.at("%to", f.mul(f.add(j, r), "%apart"), i))
    return f.text()


def scores(s: Sizes) -> str:
    """%to[i, j] = C_i B_j where token i sees token j, first[i] <= j <= i, else 0; of tokens i < %count."""
    f = Function(
        "scores",
        "ptr noalias %c",
        "ptr noalias %b",
        "ptr noalias %first",
        "i64 %count",
        "ptr noalias %to",
        lanes=s.lanes,
    )
    vectors = 2
    with f.loop("%count", step=s.rows) as i, f.loop(f.add(i, s.rows), step=vectors * s.lanes) as j:
        sums = _sums(f, s.rows, vectors)
        _accumulate(
            f,
            sums,
            s.state,
            lambda k, r: f.at("%c", f.mul(f.add(i, r), s.state), k),
            lambda k: f.at("%b", f.mul(k, CHUNK), j),
        )
        for r, row in enumerate(sums):
            token = f.add(i, r)
            own = f.splat(f.value(f"uitofp i64 {token} to float"))
            first = _one(f, "%first", token)
            for v, total in enumerate(row):
                place = _iota(f, f.add(j, v * s.lanes))
                value = _select(f, "ole", place, own, f.load(total), "zeroinitializer")
                value = _select(f, "oge", place, first, value, "zeroinitializer")
                f.store(value, f.at("%to", f.mul(token, CHUNK), j, v * s.lanes))
    return f.text()


def decays(s: Sizes) -> str:
    """Of a head: step sizes dt [CHUNK], sums of log decays to and with each token cum [CHUNK + lanes], what is left at
    each token of the state before the chunk, start [CHUNK].

    raw: the projections' steps of %count tokens, `%stride` apart; rate = log A and bias of the head. A token behind
    the last one has a step of 0.
    """
    f = Function(
        "decays",
        "ptr noalias %raw",
        "i64 %stride",
        "float %a_log",
        "float %bias",
        "ptr noalias %first",
        "i64 %count",
        "ptr noalias %dt",
        "ptr noalias %cum",
        "ptr noalias %start",
        lanes=s.lanes,
    )
    with f.loop("%count") as t:
        f.store(f.load(f.at("%raw", f.mul(t, "%stride")), "float"), f.at("%dt", t), "float")
    count = f.splat(f.value("uitofp i64 %count to float"))
    rate = f.value(f"fneg {f.vector} {f.exp(f.splat('%a_log'))}")
    bias = f.splat("%bias")
    with f.loop(CHUNK, step=s.lanes) as t:
        here = f.at("%dt", t)
        dt = _select(
            f, "olt", _iota(f, t), count, _softplus(f, f.fadd(f.load(here), bias)), "zeroinitializer"
        )
        f.store(dt, here)
        f.store(f.fmul(dt, rate), f.at("%cum", t))
    total = f.variable(number(0), "float")
    with f.loop(CHUNK) as t:
        here = f.at("%cum", t)
        f.store(f.value(f"fadd float {f.load(total, 'float')}, {f.load(here, 'float')}"), total, "float")
        f.store(f.load(total, "float"), here, "float")
    f.store(f.splat(f.load(total, "float")), f.at("%cum", CHUNK))
    with f.loop(CHUNK, step=s.lanes) as t:
        left = f.exp(f.load(f.at("%cum", t)))
        f.store(
            _select(f, "olt", f.load(f.at("%first", t)), "zeroinitializer", left, "zeroinitializer"),
            f.at("%start", t),
        )
    return f.text()


def _softplus(f: Function, x: str) -> str:
    """log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|; log(1 + y) = 2 artanh(y / (2 + y)), whose argument is at most
    1/3."""
    size = f.value(f"call {f.vector} @llvm.fabs.{f.kind}({f.vector} {x})")
    y = f.exp(f.value(f"fneg {f.vector} {size}"))
    z = f.fdiv(y, f.fadd(y, f.number(2)))
    square = f.fmul(z, z)
    series = f.number(2 / 15)
    for power in range(13, 0, -2):
        series = f.fma(series, square, f.number(2 / power))
    largest = f.value(f"call {f.vector} @llvm.maxnum.{f.kind}({f.vector} {x}, {f.vector} zeroinitializer)")
    return f.fma(series, z, largest)


def ends(s: Sizes) -> str:
    """%to[j] = dt_j times what is left of token j at token %last, 0 unless `%first` <= j <= %last."""
    f = Function(
        "ends",
        "ptr noalias %dt",
        "ptr noalias %cum",
        "i64 %last",
        "float %first",
        "ptr noalias %to",
        lanes=s.lanes,
    )
    last, first, end = (
        f.splat(f.value("uitofp i64 %last to float")),
        f.splat("%first"),
        _one(f, "%cum", "%last"),
    )
    with f.loop(CHUNK, step=s.lanes) as j:
        place = _iota(f, j)
        since = f.fsub(end, f.load(f.at("%cum", j)))
        since = f.value(
            f"call {f.vector} @llvm.minnum.{f.kind}({f.vector} {since}, {f.vector} zeroinitializer)"
        )
        left = f.fmul(f.exp(since), f.load(f.at("%dt", j)))
        left = _select(f, "ole", place, last, left, "zeroinitializer")
        f.store(_select(f, "oge", place, first, left, "zeroinitializer"), f.at("%to", j))
    return f.text()


def add_up(s: Sizes) -> str:
    """%to [N, P] = B^T x of %count tokens."""
    f = Function("add.up", "ptr noalias %b", "ptr noalias %x", "i64 %count", "ptr noalias %to", lanes=s.lanes)
    vectors, rows = _vectors(s.channels, s.lanes), math.gcd(s.rows, s.state)
    with f.loop(s.state, step=rows) as n, f.loop(s.channels, step=vectors * s.lanes) as p:
        sums = _sums(f, rows, vectors)
        _accumulate(
            f,
            sums,
            "%count",
            lambda k, r: f.at("%b", f.mul(k, s.state), n, r),
            lambda k: f.at("%x", f.mul(k, s.channels), p),
        )
        for r, row in enumerate(sums):
            for v, total in enumerate(row):
                f.store(f.load(total), f.at("%to", f.mul(f.add(n, r), s.channels), p, v * s.lanes))
    return f.text()


def advance(s: Sizes) -> str:
    """The state %kept = %state; %state = through * %state + %added, [N, P]."""
    f = Function(
        "advance",
        "ptr noalias %state",
        "float %through",
        "ptr noalias %added",
        "ptr noalias %kept",
        lanes=s.lanes,
    )
    through = f.splat("%through")
    with f.loop(s.state * s.channels, step=s.lanes) as i:
        here = f.at("%state", i)
        old = f.load(here)
        f.store(old, f.at("%kept", i))
        f.store(f.fma(through, old, f.load(f.at("%added", i))), here)
    return f.text()


def weigh(s: Sizes) -> str:
    """%to [rows, CHUNK]: scores of tokens %i .. %i + rows times decays and steps, exp(cum_i - cum_j) dt_j, for j before
    %i + rows.

    Left of the vectors that hold the tile's own tokens, a decay is that since the first of them times that up to it.
    """
    f = Function(
        "weigh",
        "ptr noalias %scores",
        "i64 %i",
        "ptr noalias %dt",
        "ptr noalias %cum",
        "ptr noalias %to",
        lanes=s.lanes,
    )
    before = f.room(CHUNK)
    left = f.sub("%i", f.rem("%i", s.lanes))
    at_first = _one(f, "%cum", "%i")
    with f.loop(left, step=s.lanes) as j:
        decay = f.exp(f.fsub(at_first, f.load(f.at("%cum", j))))
        f.store(f.fmul(decay, f.load(f.at("%dt", j))), f.at(before, j))
    factors = f.room(max(s.rows, s.lanes))
    for r in range(0, s.rows, s.lanes):
        f.store(f.exp(f.fsub(f.load(f.at("%cum", "%i", r)), at_first)), f.at(factors, r))
    for r in range(s.rows):
        row, to = f.at("%scores", f.mul(f.add("%i", r), CHUNK)), f.at("%to", r * CHUNK)
        factor = _one(f, factors, r)
        with f.loop(left, step=s.lanes) as j:
            weight = f.fmul(f.fmul(f.load(f.at(row, j)), f.load(f.at(before, j))), factor)
            f.store(weight, f.at(to, j))
        own = _one(f, "%cum", "%i", r)
        with f.loop(f.add("%i", s.rows), start=left, step=s.lanes) as j:
            since = f.fsub(own, f.load(f.at("%cum", j)))
            since = f.value(
                f"call {f.vector} @llvm.minnum.{f.kind}({f.vector} {since}, {f.vector} zeroinitializer)"
            )
            decay = f.fmul(f.exp(since), f.load(f.at("%dt", j)))
            f.store(f.fmul(f.load(f.at(row, j)), decay), f.at(to, j))
    return f.text()


def mix(s: Sizes) -> str:
    """%to [rows, P] = start_i C_i S + weights x, of tokens %i .. %i + rows; the state has %depth rows, N or none."""
    f = Function(
        "mix",
        "ptr noalias %c",
        "ptr noalias %state",
        "i64 %depth",
        "ptr noalias %start",
        "ptr noalias %weights",
        "ptr noalias %x",
        "i64 %i",
        "ptr noalias %to",
        lanes=s.lanes,
    )
    vectors = _vectors(s.channels, s.lanes)
    with f.loop(s.channels, step=vectors * s.lanes) as p:
        sums = _sums(f, s.rows, vectors)
        _accumulate(
            f,
            sums,
            "%depth",
            lambda k, r: f.at("%c", f.mul(f.add("%i", r), s.state), k),
            lambda k: f.at("%state", f.mul(k, s.channels), p),
        )
        for r, row in enumerate(sums):
            start = _one(f, "%start", "%i", r)
            for total in row:
                f.store(f.fmul(f.load(total), start), total)
        _accumulate(
            f,
            sums,
            f.add("%i", s.rows),
            lambda k, r: f.at("%weights", r * CHUNK, k),
            lambda k: f.at("%x", f.mul(k, s.channels), p),
        )
        for r, row in enumerate(sums):
            for v, total in enumerate(row):
                f.store(f.load(total), f.at("%to", r * s.channels, p, v * s.lanes))
    return f.text()


def gate(s: Sizes) -> str:
    """%y = (%mixed + skip x) silu(z) of %count tokens; the squares are added to %squares, a vector each.

    mixed and x [count, P]; z and y have rows `%z.stride` and `%y.stride` apart.
    """
    f = Function(
        "gate",
        "ptr noalias %mixed",
        "ptr noalias %x",
        "float %skip",
        "ptr noalias %z",
        "i64 %z.stride",
        "i64 %count",
        "ptr noalias %y",
        "i64 %y.stride",
        "ptr noalias %squares",
        lanes=s.lanes,
    )
    skip = f.splat("%skip")
    with f.loop("%count") as t:
        z, y = f.at("%z", f.mul(t, "%z.stride")), f.at("%y", f.mul(t, "%y.stride"))
        place = f.mul(t, s.channels)
        square_at = f.at("%squares", f.mul(t, s.lanes))
        square = f.load(square_at)
        for p in range(0, s.channels, s.lanes):
            value = f.fma(f.load(f.at("%x", place, p)), skip, f.load(f.at("%mixed", place, p)))
            opening = f.load(f.at(z, p))
            value = f.fmul(value, _silu(f, opening))
            f.store(value, f.at(y, p))
            square = f.fma(value, value, square)
        f.store(square, square_at)
    return f.text()


def normalise(s: Sizes) -> str:
    """y / rms(y) * scale of %count tokens, in place: rows `%stride` apart, of which `%width` floats are meant."""
    f = Function(
        "normalise",
        "ptr noalias %y",
        "i64 %stride",
        "i64 %width",
        "i64 %count",
        "ptr noalias %squares",
        "float %epsilon",
        "ptr noalias %scale",
        lanes=s.lanes,
    )
    width = f.value("uitofp i64 %width to float")
    with f.loop("%count") as t:
        square = f.total(f.load(f.at("%squares", f.mul(t, s.lanes))))
        mean = f.value(f"fdiv float {square}, {width}")
        root = f.value(f"call float @llvm.sqrt.f32(float {f.value(f'fadd float {mean}, %epsilon')})")
        inverse = f.splat(f.value(f"fdiv float {number(1)}, {root}"))
        y = f.at("%y", f.mul(t, "%stride"))
        with f.loop("%width", step=s.lanes) as i:
            here = f.at(y, i)
            f.store(f.fmul(f.fmul(f.load(here), inverse), f.load(f.at("%scale", i))), here)
    return f.text()
