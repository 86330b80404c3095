"""The greatest of a row of scores, as LLVM's intermediate representation.

The threshold, the greatest float that at least `wanted` scores reach, is found by bisection over floats in their order,
as whole numbers: about 20 counts, which end where exactly `wanted` reach it. Not all scores are counted so often: they
are put into groups, and where `wanted` groups have a maximum that reaches some float, as many scores do. So the
threshold of the maxima, of which there are few, comes first, and what is below it is left out.
"""

import numpy as np

from kernels_pallas.cpu_code import Function
from kernels_pallas.cpu_math import number
from kernels_pallas.tree_attention.common import NEGATIVE

_BLOCK = 64  # scores that are counted at once
_GROUP = 16  # scores of a group: one lane of as many vectors
_INFINITY = 0x7F800000  # the bits of infinity, and its place in the order of floats


def _ordered(value: float) -> int:
    """The place of a float32 in the order of all: its bits, of which those of negative ones count down."""
    bits = int(np.float32(value).view(np.int32))
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


_LOWEST = _ordered(NEGATIVE) + 1  # of a score that is seen


def padded(size: int, lanes: int) -> int:
    """Floats of whole groups."""
    unit = _GROUP * lanes
    return -(-size // unit) * unit


def width(slots: int, tokens: int, lanes: int) -> int:
    """Floats of a row of scores, with room for the maxima of its groups and for the places of those that are left."""
    size = padded(slots + tokens + 2 * lanes, lanes)
    return size + size // _GROUP + _BLOCK + size


def _float(f: Function, ordered: str) -> str:
    """The float at a place of the order, i64."""
    bits = f.value(f"trunc i64 {ordered} to i32")
    sign = f.value(f"ashr i32 {bits}, 31")
    flipped = f.value(f"and i32 {sign}, {0x7FFFFFFF}")
    return f.value(f"bitcast i32 {f.value(f'xor i32 {bits}, {flipped}')} to float")


def _count(f: Function, scores: str, size: str, comparison: str, threshold: str) -> str:
    """How many of the scores [size], whole blocks, compare so with a float."""
    ints, bools = f"<{f.lanes} x i32>", f"<{f.lanes} x i1>"
    all_lanes = f.splat(threshold)
    sums = [f.variable(kind=ints) for _ in range(_BLOCK // f.lanes)]
    with f.loop(size, step=_BLOCK) as first:
        for j, place in enumerate(sums):
            x = f.load(f.at(scores, first, j * f.lanes))
            ones = f.value(
                f"sext {bools} {f.value(f'fcmp {comparison} {f.vector} {x}, {all_lanes}')} to {ints}"
            )
            f.store(f.value(f"sub {ints} {f.load(place, ints)}, {ones}"), place, ints)
    totals = [f.load(place, ints) for place in sums]
    while len(totals) > 1:
        totals = [f.value(f"add {ints} {a}, {b}") for a, b in zip(totals[::2], totals[1::2], strict=True)]
    total = f.value(f"call i32 @llvm.vector.reduce.add.v{f.lanes}i32({ints} {totals[0]})")
    return f.value(f"zext i32 {total} to i64")


def _fill(f: Function, scores: str, size: str, unit: int) -> str:
    """Fills the last of the units, and up to a vector more, with NEGATIVE; returns the size of whole units."""
    whole = f.mul(f.ceil(size, unit), unit)
    with f.loop(whole, start=size, step=f.lanes) as place:
        f.store(f.number(NEGATIVE), f.at(scores, place))
    return whole


def threshold(lanes: int) -> str:
    """The function `@threshold`: raises a place in the order of floats that `wanted` scores reach as far as it goes."""
    f = Function("threshold", "ptr %scores", "i64 %size", "i64 %wanted", "ptr %low", lanes=lanes)
    high = f.variable(_INFINITY + 1, "i64")
    with f.loop(32):
        low = f.load("%low", "i64")
        middle = f.value(f"ashr i64 {f.add(low, f.load(high, 'i64'))}, 1")
        with f.when(f.less(low, middle)):
            count = _count(f, "%scores", "%size", "oge", _float(f, middle))
            few = f.less(count, "%wanted")
            f.store(f.choose(few, low, middle), "%low", "i64")
            # With just as many there is nothing more to find.
            end = f.choose(f.equal(count, "%wanted"), f.add(middle, 1), f.load(high, "i64"))
            f.store(f.choose(few, middle, end), high, "i64")
    return f.text()


def greatest(lanes: int) -> str:
    """The function `@greatest`: a row of `width`, scores of slots in [0, turn) and of new tokens in [turn, size), both
    of whole vectors and NEGATIVE where not seen -> entries [k] of a choice with `itself`; the row is used up."""
    f = Function(
        "greatest",
        "ptr %scores",
        "i64 %turn",
        "i64 %size",
        "i64 %itself",
        "i64 %slots",
        "i64 %k",
        "ptr %entries",
        lanes=lanes,
    )
    f.store(number(float("inf")), f.at("%scores", f.add("%turn", "%itself")), "float")
    size = _fill(f, "%scores", "%size", _GROUP * lanes)
    maxima = f.at("%scores", size)
    groups = f.div(size, _GROUP)
    with f.loop(groups, step=lanes) as group:
        best = f.number(NEGATIVE)
        for j in range(_GROUP):
            best = f.fmax(f.load(f.at("%scores", f.mul(group, _GROUP), j * lanes)), best)
        f.store(best, f.at(maxima, group))
    blocks = _fill(f, maxima, groups, _BLOCK)

    seen = _float(f, str(_LOWEST))
    wanted = f.min("%k", _count(f, "%scores", size, "oge", seen))
    low = f.variable(_LOWEST, "i64")
    enough = f.value(f"icmp sge i64 {_count(f, maxima, blocks, 'oge', seen)}, {wanted}")
    with f.when(enough):
        f.call("threshold", f"ptr {maxima}", f"i64 {blocks}", f"i64 {wanted}", f"ptr {low}")
    left, places = _keep(f, size, low, f.at(maxima, groups, _BLOCK))
    blocks = _fill(f, "%scores", left, _BLOCK)
    f.call("threshold", "ptr %scores", f"i64 {blocks}", f"i64 {wanted}", f"ptr {low}")
    limit = _float(f, f.load(low, "i64"))
    equal = f.variable(f.sub(wanted, _count(f, "%scores", blocks, "ogt", limit)), "i64")

    written = f.variable(0, "i64")
    with f.loop(left) as i:  # without branches: what is not taken is written over
        score, place = f.load(f.at("%scores", i), "float"), f.load(f.at(places, i, kind="i32"), "i32")
        above, at = (f.value(f"fcmp {how} float {score}, {limit}") for how in ("ogt", "oeq"))
        rest, end = f.load(equal, "i64"), f.load(written, "i64")
        tied = f.value(f"and i1 {at}, {f.less(0, rest)}")
        f.store(place, f.at(places, end, kind="i32"), "i32")
        f.store(f.add(end, f.value(f"zext i1 {f.value(f'or i1 {above}, {tied}')} to i64")), written, "i64")
        f.store(f.sub(rest, f.value(f"zext i1 {tied} to i64")), equal, "i64")
    with f.loop(wanted) as i:
        place = f.value(f"sext i32 {f.load(f.at(places, i, kind='i32'), 'i32')} to i64")
        new = f.add(f.sub(place, "%turn"), "%slots")
        entry = f.value(f"trunc i64 {f.choose(f.less(place, '%turn'), place, new)} to i32")
        f.store(entry, f.at("%entries", i, kind="i32"), "i32")
    with f.loop("%k", start=wanted) as i:
        f.store(-1, f.at("%entries", i, kind="i32"), "i32")
    return f.text()


def _keep(f: Function, size: str, low: str, places: str) -> tuple[str, str]:
    """Leaves those scores that reach `low`, in their order; how many they are, and int32 places where they were."""
    ints, bools = f"<{f.lanes} x i32>", f"<{f.lanes} x i1>"
    kind, kept = f"v{f.lanes}", f.variable(0, "i64")
    limit = f.splat(_float(f, f.load(low, "i64")))
    steps = "<" + ", ".join(f"i32 {i}" for i in range(f.lanes)) + ">"
    with f.loop(size, step=f.lanes) as first:
        x = f.load(f.at("%scores", first))
        mask = f.value(f"fcmp oge {f.vector} {x}, {limit}")
        bits = f.value(f"bitcast {bools} {mask} to i{f.lanes}")
        with f.when(f.value(f"icmp ne i{f.lanes} {bits}, 0")):
            start = f.value(f"trunc i64 {first} to i32")
            one = f.value(f"insertelement {ints} poison, i32 {start}, i32 0")
            same = f.value(f"shufflevector {ints} {one}, {ints} poison, {ints} zeroinitializer")
            place = f.value(f"add {ints} {same}, {steps}")
            end = f.load(kept, "i64")
            for vector, name, value, to in (
                (f.vector, "f32", x, f.at("%scores", end)),
                (ints, "i32", place, f.at(places, end, kind="i32")),
            ):
                f.call(
                    f"llvm.masked.compressstore.{kind}{name}",
                    f"{vector} {value}",
                    f"ptr {to}",
                    f"{bools} {mask}",
                )
            wide = f.value(f"zext i{f.lanes} {bits} to i64")
            f.store(f.add(end, f.value(f"call i64 @llvm.ctpop.i64(i64 {wide})")), kept, "i64")
    return f.load(kept, "i64"), places


def finish_kept(lanes: int, group: bool) -> str:
    """The function `@finish.kept` that tree attention calls at the end of a piece; see `cpu_piece.head`. The third
    result is the choice, of every query head, or of the `group`."""
    f = Function(
        "finish.kept", "ptr %frame", "i64 %index", "ptr %kept", "i64 %width", "i64 %turn", lanes=lanes
    )
    choice = f.array("%frame", -3)
    _, heads, tokens = f.array("%frame", 0).dims(3)
    _, kv_heads, slots = f.array("%frame", 1).dims(3)
    k = choice.dim(3)
    size = f.add("%turn", f.mul(f.ceil(tokens, lanes), lanes))
    rows = f.mul(f.div(heads, kv_heads), tokens)
    if group:
        with f.loop(rows, start=tokens) as row:
            best, other = (f.at("%kept", f.mul(r, "%width")) for r in (f.rem(row, tokens), row))
            with f.loop(size, step=lanes) as place:
                to = f.at(best, place)
                f.store(f.fmax(f.load(f.at(other, place)), f.load(to)), to)
        rows = tokens
    entries = f.at(choice.data, f.mul(f.mul("%index", rows), k), kind="i32")
    with f.loop(rows) as row:
        f.call(
            "greatest",
            f"ptr {f.at('%kept', f.mul(row, '%width'))}",
            "i64 %turn",
            f"i64 {size}",
            f"i64 {f.rem(row, tokens)}",
            f"i64 {slots}",
            f"i64 {k}",
            f"ptr {f.at(entries, f.mul(row, k), kind='i32')}",
        )
    return f.text()
