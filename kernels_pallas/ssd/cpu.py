"""Mamba-2's mixer between its projections on a CPU: convolution, scan, gate and norm in one pass over the tokens.

A piece is a chunk of `CHUNK` tokens of one row and one group of heads, so that its norm is a matter of the piece alone.
Pieces are taken in the order of chunks, and each head's state runs through them one after the other:

    of the group:       B, C = silu(conv)           scores C B^T, 0 where a token does not see the other
    of each of heads:   x = silu(conv)              added = B^T (end dt x)
                        wait until the chunk before has left its state S        S' = through S + added
                        y = start C S + (scores * decays) x + D x               y silu(z)
    of the group:       RMSNorm

A piece waits only for one that some thread took before it (`cpu.py` gives them out in order), so one can always go on,
and a thread that is alone never waits. The state behind the tokens that a cache counts comes from the piece that holds
the last of them.

All sums have one order: neither threads nor neighbours in a batch change a bit.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas import cpu
from kernels_pallas.common import Unsupported
from kernels_pallas.cpu_code import Function
from kernels_pallas.cpu_math import exponential
from kernels_pallas.ssd import cpu_parts
from kernels_pallas.ssd.cpu_parts import CHUNK, Sizes

_MOST_FLOATS = 100_000  # of a piece's matrices: they lie on its thread's stack
# Multiply-adds with the state from where XLA's threads share the work: about 0.3 ms on two cores.
_LONG = 1 << 23
_TURN = 16  # floats behind a state: the number of the chunk that it waits for, in a cache line of its own

_OPERANDS = (
    "projected",
    "kernel",
    "bias",
    "a_log",
    "skip",
    "dt_bias",
    "scale",
    "segments",
    "count",
    "epsilon",
)
_RESULTS = ("y", "final", "states")
# What sizes are called in the code; rows: of the segments, 0 without.
_DIMS = {
    "projected": ("batch", "length", "width"),
    "bias": ("mixed",),
    "a_log": ("heads",),
    "segments": ("rows",),
}

_DECLARE = """
declare i32 @sched_yield()
declare {vector} @llvm.fabs.{kind}({vector})
declare float @llvm.sqrt.f32(float)
declare float @llvm.vector.reduce.fadd.{kind}(float, {vector})

@zeros = internal constant [{width} x float] zeroinitializer, align 64

; Waits until `number` stands there.
define internal void @await(ptr %turn, i64 %number) {{
entry:
  br label %look
look:
  %now = load atomic i64, ptr %turn acquire, align 8
  %mine = icmp eq i64 %now, %number
  br i1 %mine, label %end, label %wait
wait:
  call i32 @sched_yield()
  br label %look
end:
  ret void
}}
"""


def _read(f: Function, frame: str) -> dict[str, str]:
    """Operands and results by their names, and the sizes of `_DIMS`."""
    found = {}
    numbered = [*enumerate(_OPERANDS), *((-1 - i, name) for i, name in enumerate(_RESULTS))]
    for number, name in numbered:
        array = f.array(frame, number)
        found[name] = array.data
        for axis, size in enumerate(_DIMS.get(name, ())):
            found[size] = array.dim(axis)
    return found


def _groups(f: Function, found: dict[str, str], s: Sizes) -> tuple[str, str]:
    """Floats of all heads, and how many groups there are."""
    inner = f.mul(found["heads"], s.channels)
    return inner, f.div(f.sub(found["mixed"], inner), 2 * s.state)


def _first(s: Sizes) -> str:
    """%first[t] of %count tokens: the first one of its segment, from the chunk's first token on, 1 - taps at least."""
    f = Function("first", "ptr %segments", "i64 %chunk", "i64 %count", "ptr %first", "i1 %one", lanes=s.lanes)
    start = f.choose(f.equal("%chunk", 0), 0, 1 - s.taps)
    first = f.variable(start, "i64")
    with f.loop("%count", start=start) as t:
        after = f.value(f"icmp sgt i64 {t}, {start}")
        with f.when(f.value(f"select i1 %one, i1 false, i1 {after}")):
            here, before = (f.load(f.at("%segments", f.sub(t, back), kind="i32"), "i32") for back in (0, 1))
            changed = f.value(f"icmp ne i32 {here}, {before}")
            f.store(f.choose(changed, t, f.load(first, "i64")), first, "i64")
        with f.when(f.value(f"icmp sge i64 {t}, 0")):
            f.store(f.value(f"sitofp i64 {f.load(first, 'i64')} to float"), f.at("%first", t), "float")
    return f.text()


def _piece(s: Sizes) -> str:
    f = Function("piece", "ptr %job", "i64 %index", lanes=s.lanes)
    found = _read(f, f.field("%job", "%job", 6, "ptr"))
    inner, groups = _groups(f, found, s)
    width, length = found["width"], found["length"]
    group, rest = f.rem("%index", groups), f.div("%index", groups)
    row, chunk = f.rem(rest, found["batch"]), f.div(rest, found["batch"])
    begin = f.mul(chunk, CHUNK)
    count = f.min(CHUNK, f.sub(length, begin))
    last, token = f.sub(count, 1), f.add(f.mul(row, length), begin)
    tokens = f.at(found["projected"], f.mul(token, width))

    first, squares = f.room(CHUNK), f.room(CHUNK * s.lanes)
    b, c, turned = (f.room(CHUNK * s.state) for _ in range(3))
    scores, weights = f.room(CHUNK * CHUNK), f.room(s.rows * CHUNK)
    x, scaled, mixed = (f.room(rows * s.channels) for rows in (CHUNK, CHUNK, s.rows))
    added, kept = (f.room(s.state * s.channels) for _ in range(2))
    dt, cum, start, factors = (f.room(CHUNK + s.lanes) for _ in range(4))

    one = f.equal(found["rows"], 0)
    f.call(
        "first",
        f"ptr {f.at(found['segments'], token, kind='i32')}",
        f"i64 {chunk}",
        f"i64 {count}",
        f"ptr {first}",
        f"i1 {one}",
    )

    def convolve(channel: str, size: int, to: str, *more: str) -> None:
        f.call(
            f"convolve.{size}" + (".scaled" if more else ""),
            f"ptr {f.at(tokens, inner, channel)}",
            f"i64 {width}",
            f"ptr {f.at(found['kernel'], channel)}",
            f"i64 {found['mixed']}",
            f"ptr {f.at(found['bias'], channel)}",
            f"ptr {first}",
            f"i64 {count}",
            f"ptr {to}",
            *more,
        )

    convolve(f.add(inner, f.mul(group, s.state)), s.state, b)
    convolve(f.add(inner, f.mul(f.add(groups, group), s.state)), s.state, c)
    f.call("transpose", f"ptr {b}", f"i64 {CHUNK}", f"i64 {s.state}", f"ptr {turned}", f"i64 {CHUNK}")
    f.call("scores", f"ptr {c}", f"ptr {turned}", f"ptr {first}", f"i64 {count}", f"ptr {scores}")
    with f.loop(CHUNK * s.lanes, step=s.lanes) as i:
        f.store("zeroinitializer", f.at(squares, i))
    # Weights of tokens behind the last one are 0: so must be what they are multiplied with.
    with f.loop(CHUNK * s.channels, start=f.mul(count, s.channels), step=s.lanes) as i:
        f.store("zeroinitializer", f.at(x, i))

    shared = f.div(found["heads"], groups)
    head_0 = f.mul(group, shared)
    # How many tokens of this chunk the final state has seen; it is made here where one of them is its last.
    seen = f.sub(f.value(f"sext i32 {f.load(f.at(found['count'], row, kind='i32'), 'i32')} to i64"), begin)
    with f.loop(f.add(head_0, shared), start=head_0) as head:
        channel = f.mul(head, s.channels)
        parameters = [f.load(f.at(found[name], head), "float") for name in ("a_log", "dt_bias", "skip")]
        raw = f.at(tokens, inner, found["mixed"], head)
        f.call(
            "decays",
            f"ptr {raw}",
            f"i64 {width}",
            f"float {parameters[0]}",
            f"float {parameters[1]}",
            f"ptr {first}",
            f"i64 {count}",
            f"ptr {dt}",
            f"ptr {cum}",
            f"ptr {start}",
        )

        def end(last: str) -> None:
            since = f.load(f.at(first, last), "float")
            f.call("ends", f"ptr {dt}", f"ptr {cum}", f"i64 {last}", f"float {since}", f"ptr {factors}")

        end(last)
        convolve(channel, s.channels, x, f"ptr {factors}", f"ptr {scaled}")
        f.call("add.up", f"ptr {b}", f"ptr {scaled}", f"i64 {count}", f"ptr {added}")
        place = f.add(f.mul(row, found["heads"]), head)
        state = f.at(found["states"], f.mul(place, s.state * s.channels + _TURN))
        turn = f.at(state, s.state * s.channels)
        f.call("await", f"ptr {turn}", f"i64 {chunk}")
        through = f.load(f.at(start, last), "float")
        f.call("advance", f"ptr {state}", f"float {through}", f"ptr {added}", f"ptr {kept}")
        final = f.at(found["final"], f.mul(place, s.state * s.channels))
        with f.when(f.equal(seen, count)):
            f.call(
                "transpose",
                f"ptr {state}",
                f"i64 {s.state}",
                f"i64 {s.channels}",
                f"ptr {final}",
                f"i64 {s.state}",
            )
        f.line(f"store atomic i64 {f.add(chunk, 1)}, ptr {turn} release, align 8")
        later, sooner = f.less(0, seen), f.less(seen, count)
        with f.when(f.value(f"and i1 {later}, {sooner}")):
            newest = f.sub(seen, 1)
            end(newest)
            with f.loop(count) as t:
                factor = f.splat(f.load(f.at(factors, t), "float"))
                for p in range(0, s.channels, s.lanes):
                    place = f.mul(t, s.channels)
                    f.store(f.fmul(f.load(f.at(x, place, p)), factor), f.at(scaled, place, p))
            f.call("add.up", f"ptr {b}", f"ptr {scaled}", f"i64 {count}", f"ptr {added}")
            through = f.splat(f.load(f.at(start, newest), "float"))
            with f.loop(s.state * s.channels, step=s.lanes) as i:
                here = f.at(added, i)
                f.store(f.fma(through, f.load(f.at(kept, i)), f.load(here)), here)
            f.call(
                "transpose",
                f"ptr {added}",
                f"i64 {s.state}",
                f"i64 {s.channels}",
                f"ptr {final}",
                f"i64 {s.state}",
            )
        depth = f.choose(f.equal(chunk, 0), 0, s.state)
        y = f.at(found["y"], f.mul(token, inner), channel)
        z = f.at(tokens, channel)
        with f.loop(count, step=s.rows) as i:
            with f.loop(f.add(i, s.rows), start=i) as t:
                cpu_parts.announce(f, f.at(z, f.mul(t, width)), s.channels)
            f.call("weigh", f"ptr {scores}", f"i64 {i}", f"ptr {dt}", f"ptr {cum}", f"ptr {weights}")
            f.call(
                "mix",
                f"ptr {c}",
                f"ptr {kept}",
                f"i64 {depth}",
                f"ptr {start}",
                f"ptr {weights}",
                f"ptr {x}",
                f"i64 {i}",
                f"ptr {mixed}",
            )
            f.call(
                "gate",
                f"ptr {mixed}",
                f"ptr {f.at(x, f.mul(i, s.channels))}",
                f"float {parameters[2]}",
                f"ptr {f.at(z, f.mul(i, width))}",
                f"i64 {width}",
                f"i64 {f.min(s.rows, f.sub(count, i))}",
                f"ptr {f.at(y, f.mul(i, inner))}",
                f"i64 {inner}",
                f"ptr {f.at(squares, f.mul(i, s.lanes))}",
            )
    channel = f.mul(head_0, s.channels)
    f.call(
        "normalise",
        f"ptr {f.at(found['y'], f.mul(token, inner), channel)}",
        f"i64 {inner}",
        f"i64 {f.mul(shared, s.channels)}",
        f"i64 {count}",
        f"ptr {squares}",
        f"float {f.load(found['epsilon'], 'float')}",
        f"ptr {f.at(found['scale'], channel)}",
    )
    return f.text()


def _execute(s: Sizes) -> str:
    f = Function("execute", "ptr %frame", lanes=s.lanes)
    found = _read(f, "%frame")
    _, groups = _groups(f, found, s)
    rows = f.mul(found["batch"], found["heads"])
    size = s.state * s.channels
    with f.loop(f.mul(rows, size), step=s.lanes) as i:  # of rows whose final state has seen no token
        f.store("zeroinitializer", f.at(found["final"], i))
    with f.loop(rows) as i:
        state = f.at(found["states"], f.mul(i, size + _TURN))
        with f.loop(size, step=s.lanes) as j:
            f.store("zeroinitializer", f.at(state, j))
        f.store(0, f.at(state, size), "i64")
    chunks = f.ceil(found["length"], CHUNK)
    count = f.mul(f.mul(chunks, found["batch"]), groups)
    pieces = ("ptr @piece", "ptr %frame", f"i64 {count}", f"i64 {count}")
    work = f.mul(f.mul(rows, size), found["length"])
    short = f.less(work, _LONG)
    with f.when(short):
        f.call("share", *pieces, "i64 0")
    with f.when(f.value(f"xor i1 {short}, true")):
        f.call("share.long", "ptr %frame", *pieces)
    return f.text()


@functools.cache
def kernel(s: Sizes) -> cpu.Kernel:
    """The code for such sizes."""
    parts = cpu_parts
    vector, kind = f"<{s.lanes} x float>", f"v{s.lanes}f32"
    code = [
        exponential(s.lanes),
        _DECLARE.format(vector=vector, kind=kind, width=max(s.channels, s.state)),
        _first(s),
        parts.convolve(s.state, False, s),
        parts.convolve(s.channels, True, s),
        *(
            make(s)
            for make in (parts.transpose, parts.scores, parts.decays, parts.ends, parts.add_up, parts.advance)
        ),
        *(make(s) for make in (parts.weigh, parts.mix, parts.gate, parts.normalise)),
        _piece(s),
        _execute(s),
    ]
    return cpu.Kernel(f"lathe_ssd_mixer_{s.channels}_{s.state}_{s.taps}_{s.lanes}", "\n\n".join(code))


@functools.cache
def _register(s: Sizes) -> str:
    return kernel(s).register()


def refusal(channels: int, state: int, taps: int) -> str | None:
    """Why there is no code for heads of `channels`, states of `state` and so many taps; None where there is.

    Raises Unsupported for a processor without a kernel.
    """
    if _lanes(channels, state) < 4:
        return f"heads of {channels} and states of {state}: the cpu kernel takes multiples of 4"
    floats = CHUNK * (3 * state + 2 * channels + CHUNK) + 2 * state * channels
    if floats > _MOST_FLOATS or taps > CHUNK:
        return f"heads of {channels}, states of {state} and {taps} taps are too large for the cpu kernel"
    return None


def sizes(channels: int, state: int, taps: int) -> Sizes:
    """What the code for heads of `channels`, states of `state` and so many taps is made for.

    Raises Unsupported for a processor without a kernel, and for sizes that vectors do not divide or that are too large.
    """
    if (reason := refusal(channels, state, taps)) is not None:
        raise Unsupported(reason)
    rows = 4 if cpu.lanes() == 8 else 8  # AVX2 has 16 registers
    return Sizes(channels, state, taps, _lanes(channels, state), rows)


def _lanes(channels: int, state: int) -> int:
    """Floats of the widest vector that divides both."""
    lanes = cpu.lanes()
    while math.gcd(channels, state) % lanes:
        lanes //= 2
    return lanes


def mixer(projected, kernel, bias, a_log, skip, dt_bias, scale, segments, count, epsilon: float, s: Sizes):
    """Arguments as in the api, float32, of sizes `s`; count int32[b], of tokens that the state has seen."""
    batch, length, _ = projected.shape
    heads = a_log.shape[0]
    results = (
        jax.ShapeDtypeStruct((batch, length, heads * s.channels), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, s.channels, s.state), jnp.float32),
        jax.ShapeDtypeStruct((batch * heads, s.state * s.channels + _TURN), jnp.float32),
    )
    if segments is None:
        segments = jnp.zeros((0, length), jnp.int32)
    call = jax.ffi.ffi_call(_register(s), results, vmap_method="sequential")
    epsilons = jnp.full(1, epsilon, jnp.float32)
    return call(projected, kernel, bias, a_log, skip, dt_bias, scale, segments, count, epsilons)[:2]
