"""Attention over listed tokens, as LLVM's intermediate representation: a piece is a new token of a set, with the query
heads that share it."""

from kernels_pallas.cpu_code import Function
from kernels_pallas.cpu_math import number
from kernels_pallas.tree_attention.common import NEGATIVE
from kernels_pallas.tree_attention.cpu_piece import ROWS
from kernels_pallas.tree_attention.cpu_tiles import KEYS

_AHEAD = 24  # entries between the announcement of a row and its copy
_LINE = 16  # floats of a cache line
_SHARE = 1 << 15  # bytes of rows below which another thread does not pay

_OPERANDS = {
    "query": 0,
    "key": 1,
    "value": 2,
    "fresh_key": 3,
    "fresh_value": 4,
    "choice": 5,
    "numbers": 6,
    "out": -1,
}


def listed(dim: int, lanes: int) -> list[str]:
    """The functions `@execute` and `@piece`; they need `cpu_piece.softmax` beside them."""
    return [_piece(dim, lanes), _execute(dim, lanes)]


def _execute(dim: int, lanes: int) -> str:
    f = Function("execute", "ptr %frame", lanes=lanes)
    batch, sets, tokens, k = f.array("%frame", _OPERANDS["choice"]).dims(4)
    pieces = f.mul(f.mul(batch, sets), tokens)
    pay = f.div(f.mul(f.mul(pieces, k), 8 * dim), _SHARE)
    f.call("share", "ptr @piece", "ptr %frame", f"i64 {pieces}", f"i64 {pay}", "i64 0")
    return f.text()


def _copy(f: Function, source: str, to: str, dim: int) -> None:
    for j in range(0, dim, f.lanes):
        f.store(f.load(f.at(source, j)), f.at(to, j))


def _piece(dim: int, lanes: int) -> str:
    f = Function("piece", "ptr %job", "i64 %index", lanes=lanes)
    frame = f.field("%job", "%job", 6, "ptr")
    arrays = f.arrays(frame, _OPERANDS)
    _, heads, tokens = arrays["query"].dims(3)
    _, kv_heads, slots = arrays["key"].dims(3)
    choice = arrays["choice"]
    sets, k = choice.dim(1), choice.dim(3)
    token, set_number = f.rem("%index", tokens), f.div("%index", tokens)  # of all sets of the batch
    rows = f.div(heads, sets)
    kv_head = f.div(set_number, f.div(sets, kv_heads))  # of all of the batch
    old = f.mul(f.mul(kv_head, slots), dim)
    new = f.mul(f.mul(kv_head, tokens), dim)
    tables = [(f.at(f"%{x}", old), f.at(f"%fresh_{x}", new)) for x in ("key", "value")]
    list_start = f.mul("%index", k)
    itself, everybody = f.add(slots, token), f.add(slots, tokens)
    scale, cap = (f.load(f.at("%numbers", i), "float") for i in (0, 1))
    query, sums = f.room(ROWS * dim), f.room(ROWS * dim)
    top, total = f.room(ROWS), f.room(ROWS)
    blocks = [f.room(KEYS * dim) for _ in tables]
    filled = f.variable(0, "i64")

    def places(entry: str) -> list[str]:
        """Where the entry's key and value lie."""
        cached = f.less(entry, slots)
        row = f.mul(f.choose(cached, entry, f.sub(entry, slots)), dim)
        return [f.at(f.choose(cached, *table, kind="ptr"), row) for table in tables]

    def take(entry: str) -> None:
        to = f.mul(f.load(filled, "i64"), dim)
        for source, block in zip(places(entry), blocks, strict=True):
            _copy(f, source, f.at(block, to), dim)
        f.store(f.add(f.load(filled, "i64"), 1), filled, "i64")

    def absorb(here: str) -> None:
        """Adds the block to the sums of the rows, and empties it."""
        state = (f"ptr {x}" for x in (query, sums, top, total))
        key, value = (f"ptr {block}" for block in blocks)
        mask = ("ptr null", "i64 1", "i64 0", "i64 0")
        numbers = (f"float {x}" for x in (scale, cap))
        count = f"i64 {f.load(filled, 'i64')}"
        f.call("over", *state, "i64 0", f"i64 {here}", key, value, count, *mask, *numbers)
        f.store(0, filled, "i64")

    with f.loop(rows, step=ROWS) as first:
        here = f.min(f.sub(rows, first), ROWS)
        # Row r of the set is query head r of it; a head has all its tokens.
        start = f.add(f.mul(f.add(f.mul(set_number, rows), first), tokens), token)

        with f.loop(here) as row:
            source = f.at("%query", f.mul(f.add(start, f.mul(row, tokens)), dim))
            _copy(f, source, f.at(query, f.mul(row, dim)), dim)
            for j in range(0, dim, lanes):
                f.store("zeroinitializer", f.at(sums, f.mul(row, dim), j))
            f.store(number(NEGATIVE), f.at(top, row), "float")
            f.store(number(0), f.at(total, row), "float")
        take(itself)
        with f.loop(k) as i:
            entry = choice.whole(f.add(list_start, i))
            ahead = f.min(f.add(i, _AHEAD), f.sub(k, 1))
            for place in places(choice.whole(f.add(list_start, ahead))):
                for line in range(0, dim, _LINE):
                    f.announce(f.at(place, line))
            there = f.value(f"icmp ult i64 {entry}, {everybody}")  # nobody is a large number
            other = f.value(f"icmp ne i64 {entry}, {itself}")
            with f.when(f.value(f"and i1 {there}, {other}")):
                take(entry)
                with f.when(f.equal(f.load(filled, "i64"), KEYS)):
                    absorb(here)
        absorb(here)
        with f.loop(here) as row:
            whole = f.splat(f.load(f.at(total, row), "float"))
            to = f.at("%out", f.mul(f.add(start, f.mul(row, tokens)), dim))
            for j in range(0, dim, lanes):
                f.store(f.fdiv(f.load(f.at(sums, f.mul(row, dim), j)), whole), f.at(to, j))
    return f.text()
