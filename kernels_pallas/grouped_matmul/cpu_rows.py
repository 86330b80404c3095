"""The ways of rows to experts and back on a CPU: pairs (token, choice) sorted by expert, rows picked, weighed, summed.

Every row of a result is computed alone and in one order, whatever the number of threads.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import cpu
from kernels_pallas.cpu import Kernel
from kernels_pallas.cpu_code import Function

_ROWS = 64  # of a piece
_AT_ONCE = 4  # vectors, whose sums do not wait for each other
_SHARE = 1 << 16  # numbers below which another thread does not pay

_DECLARE = """
declare ptr @malloc(i64)
declare void @free(ptr)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
"""


def _memset(f: Function, pointer: str, size: str) -> None:
    f.line(f"call void @llvm.memset.p0.i64(ptr {pointer}, i8 0, i64 {size}, i1 false)")


@functools.cache
def sort_kernel(lanes: int) -> Kernel:
    """index int32[N, k], mask bool[N] -> slot of every pair int32[N, k], pair of every slot int32[S], counts int32[E]:
    a counting sort."""
    f = Function("execute", "ptr %frame", lanes=lanes)
    index, mask, slots, pairs, counts = (f.array("%frame", i) for i in (0, 1, -1, -2, -3))
    tokens, k, experts, room = index.dim(0), index.dim(1), counts.dim(0), pairs.dim(0)
    next_ = f.value(f"call ptr @malloc(i64 {f.mul(experts, 8)})")
    _memset(f, next_, f.mul(experts, 8))

    def each_pair(real: bool):
        """First choices first; gives the pair and the counter of its expert."""
        with f.loop(k) as choice, f.loop(tokens) as token:
            pair = f.add(f.mul(token, k), choice)
            has = f.value(f"icmp ne i8 {f.load(f.at(mask.data, token, kind='i8'), 'i8')}, 0")
            with f.when(has if real else f.value(f"xor i1 {has}, true")):
                yield pair, f.at(next_, index.whole(pair), kind="i64") if real else None

    for _, counter in each_pair(True):
        f.store(f.add(f.load(counter, "i64"), 1), counter, "i64")
    begin = f.variable(0, "i64")
    with f.loop(experts) as expert:
        counter, first = f.at(next_, expert, kind="i64"), f.load(begin, "i64")
        count = f.load(counter, "i64")
        counts.set_whole(expert, count)
        f.store(first, counter, "i64")
        f.store(f.add(first, count), begin, "i64")
    for pair, counter in each_pair(True):
        slot = f.load(counter, "i64")
        pairs.set_whole(slot, pair)
        slots.set_whole(pair, slot)
        f.store(f.add(slot, 1), counter, "i64")
    for pair, _ in each_pair(False):
        slots.set_whole(pair, room)
    with f.loop(room, start=f.load(begin, "i64")) as slot:
        pairs.set_whole(slot, f.mul(tokens, k))
    f.line(f"call void @free(ptr {next_})")
    return Kernel(f"lathe_sort_pairs_{lanes}", _DECLARE + f.text())


def _execute(lanes: int, result: int, cleared: int | None = None) -> str:
    """The function that XLA's call runs: pieces of rows of a result. `cleared` is one that begins as zeros."""
    f = Function("execute", "ptr %frame", lanes=lanes)
    rows, width = f.array("%frame", result).dims(2)
    if cleared is not None:
        array = f.array("%frame", cleared)
        _memset(f, array.data, f.mul(f.mul(array.dim(0), array.dim(1)), 4))
    pay = f.div(f.mul(rows, width), _SHARE)
    f.call("share.long", "ptr %frame", "ptr @piece", "ptr %frame", f"i64 {f.ceil(rows, _ROWS)}", f"i64 {pay}")
    return f.text()


@functools.cache
def weighted_kernel(lanes: int) -> Kernel:
    """rows [M, W], index int32[N, r], weights [N, r] -> [N, W]: sums over r of weights times rows; an index outside of
    the rows adds nothing."""
    f = Function("piece", "ptr %job", "i64 %index", lanes=lanes)
    frame = f.field("%job", "%job", 6, "ptr")
    rows, index, weights, y = (f.array(frame, i) for i in (0, 1, 2, -1))
    count, width, terms, most = y.dim(0), y.dim(1), index.dim(1), rows.dim(0)
    first = f.mul("%index", _ROWS)
    with f.loop(f.min(f.add(first, _ROWS), count), start=first) as n:
        to = f.at(y.data, f.mul(n, width))
        any_ = f.variable("false", "i1")
        with f.loop(terms) as j:
            place = f.add(f.mul(n, terms), j)
            row = index.whole(place)
            with f.when(f.value(f"icmp ult i64 {row}, {most}")):
                from_, weight = (
                    f.at(rows.data, f.mul(row, width)),
                    f.splat(f.load(f.at(weights.data, place), "float")),
                )
                some = f.load(any_, "i1")
                with f.when(some):
                    for here, _, mask in f.vectors(width, _AT_ONCE):
                        sums = f.fma(weight, f.read(f.at(from_, here), mask), f.read(f.at(to, here), mask))
                        f.write(sums, f.at(to, here), mask)
                with f.when(f.value(f"xor i1 {some}, true")):
                    for here, _, mask in f.vectors(width, _AT_ONCE):
                        f.write(f.fmul(weight, f.read(f.at(from_, here), mask)), f.at(to, here), mask)
                f.store("true", any_, "i1")
        with f.when(f.value(f"xor i1 {f.load(any_, 'i1')}, true")):
            _memset(f, to, f.mul(width, 4))
    return Kernel(f"lathe_weighted_rows_{lanes}", "\n\n".join([_DECLARE, f.text(), _execute(lanes, -1)]))


@functools.cache
def gradient_kernel(lanes: int) -> Kernel:
    """rows [S, W], weights [N, k], pair of every slot int32[S], dy [N, W] -> d_rows [S, W], d_weights [N, k]: of the
    sums over k of the weighed rows, where every pair has one slot at most."""
    f = Function("piece", "ptr %job", "i64 %index", lanes=lanes)
    frame = f.field("%job", "%job", 6, "ptr")
    rows, weights, pairs, dy, d_rows, d_weights = (f.array(frame, i) for i in (0, 1, 2, 3, -1, -2))
    slots, width, k = rows.dim(0), rows.dim(1), weights.dim(1)
    all_pairs = f.mul(weights.dim(0), k)
    first = f.mul("%index", _ROWS)
    with f.loop(f.min(f.add(first, _ROWS), slots), start=first) as slot:
        pair, offset = pairs.whole(slot), f.mul(slot, width)
        row, to = f.at(rows.data, offset), f.at(d_rows.data, offset)
        has = f.value(f"icmp ult i64 {pair}, {all_pairs}")
        with f.when(has):
            from_ = f.at(dy.data, f.mul(f.div(pair, k), width))
            weight = f.splat(f.load(f.at(weights.data, pair), "float"))
            sums = [f.variable() for _ in range(_AT_ONCE)]
            for here, i, mask in f.vectors(width, _AT_ONCE):
                value = f.read(f.at(from_, here), mask)
                f.store(f.fma(value, f.read(f.at(row, here), mask), f.load(sums[i])), sums[i])
                f.write(f.fmul(weight, value), f.at(to, here), mask)
            parts = [f.load(place) for place in sums]
            while len(parts) > 1:
                parts = [f.fadd(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            f.store(f.total(parts[0]), f.at(d_weights.data, pair), "float")
        with f.when(f.value(f"xor i1 {has}, true")):
            _memset(f, to, f.mul(width, 4))
    code = [_DECLARE, f.text(), _execute(lanes, -1, cleared=-2)]
    return Kernel(f"lathe_weighted_rows_backward_{lanes}", "\n\n".join(code))


@functools.cache
def register(kernel: str, lanes: int) -> str:
    """XLA's name of a kernel ("sort", "weighted", "gradient"); makes it known once.

    Raises Unsupported where XLA refuses it.
    """
    return {"sort": sort_kernel, "weighted": weighted_kernel, "gradient": gradient_kernel}[kernel](
        lanes
    ).register()


def sort_pairs(
    index: jax.Array, mask: jax.Array, experts: int, slots: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs n k + j sorted by expert: of one expert by choice and then by token; padding has no slot.

    index int32[N, k] of experts below `experts`, mask bool[N], `slots` >= N k ->
    slot of every pair int32[N, k], `slots` for padding; pair of every slot int32[slots], N k for none; and how many
    pairs an expert has, int32[experts].
    """
    out = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (index.shape, (slots,), (experts,))]
    call = jax.ffi.ffi_call(register("sort", cpu.lanes()), out, vmap_method="sequential")
    return tuple(call(index.astype(jnp.int32), mask))


def weighted_rows(
    rows: jax.Array, index: jax.Array, weights: jax.Array, lanes: int | None = None
) -> jax.Array:
    """rows float32[M, W]; index int32[N, r], weights float32[N, r] -> [N, W]: every sum over r of weights times rows,
    in that order. An index outside of 0 ... M - 1 adds nothing."""
    out = jax.ShapeDtypeStruct((index.shape[0], rows.shape[1]), rows.dtype)
    call = jax.ffi.ffi_call(register("weighted", lanes or cpu.lanes()), out, vmap_method="sequential")
    return call(rows, index, weights)


def weighted_rows_gradient(
    rows: jax.Array, weights: jax.Array, pair_of_slot: jax.Array, dy: jax.Array, lanes: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of rows [S, W] and weights [N, k] in `weighted_rows`, from that of the sums, dy [N, W], where an
    index has no value twice: pair_of_slot int32[S] says which place n k + j of it is s, N k: none."""
    out = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (rows, weights)]
    call = jax.ffi.ffi_call(register("gradient", lanes or cpu.lanes()), out, vmap_method="sequential")
    return tuple(call(rows, weights, pair_of_slot, dy))
