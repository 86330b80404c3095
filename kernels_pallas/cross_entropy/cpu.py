"""Cross-entropy on a CPU: logits are read once from memory forward, and once backward, where the gradient takes their
place.

Forward finds the maximum m of a row and then the sum Z of exp(l - m), while the row is in the processor's cache; m and
Z are kept, and logsumexp = m + ln Z. With the cotangents a of the nats and b of logsumexp,

    dl[v] = exp(l[v] - m) (a + b) / Z - a [v is the label]

A row whose m is no finite number has no Z (it is not a number either). A piece is a block of rows, each of which is
computed alone and in one order.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.cpu import Kernel
from kernels_pallas.cpu_code import Function
from kernels_pallas.cpu_math import constant, exponential, number

_ROWS = 8  # of a piece
_AT_ONCE = 4  # vectors, whose sums do not wait for each other
_SHARE = 1 << 16  # logits below which another thread does not pay
_LEAST, _NAN = float("-inf"), float("nan")


def _execute(lanes: int) -> str:
    """The function that XLA's call runs."""
    f = Function("execute", "ptr %frame", lanes=lanes)
    rows, classes = f.array("%frame", 0).dims(2)
    pay = f.div(f.mul(rows, classes), _SHARE)
    f.call("share.long", "ptr %frame", "ptr @block", "ptr %frame", f"i64 {f.ceil(rows, _ROWS)}", f"i64 {pay}")
    return f.text()


@contextlib.contextmanager
def _each_row(f: Function, operands: dict[str, int]) -> Iterator[tuple[str, str, str, str]]:
    """The rows of a piece: the row's number, where its logits begin, their number, the label.

    operands: numbers by name, whose data has the name.
    """
    arrays = f.arrays(f.field("%job", "%job", 6, "ptr"), operands)
    rows, classes = arrays["logits"].dims(2)
    first = f.mul("%index", _ROWS)
    with f.loop(f.min(f.add(first, _ROWS), rows), start=first) as row:
        given = arrays["labels"].whole(row)
        label = f.choose(f.less(given, 0), f.add(given, classes), given)  # -1: the last one
        yield row, f.at("%logits", f.mul(row, classes)), classes, label


def _when_valid(f: Function, label: str, classes: str) -> contextlib.AbstractContextManager[None]:
    return f.when(f.value(f"icmp ult i64 {label}, {classes}"))


def _maximum(f: Function, logits: str, classes: str) -> str:
    """The largest logit of a row, not a number where one of them is none."""
    bools = f"<{f.lanes} x i1>"
    tops = [f.variable(constant(_LEAST)) for _ in range(_AT_ONCE)]
    wrong = [f.variable("zeroinitializer", bools) for _ in range(_AT_ONCE)]
    for here, i, mask in f.vectors(classes, _AT_ONCE):
        value = f.read(f.at(logits, here), mask, constant(_LEAST))
        f.store(f.fmax(value, f.load(tops[i])), tops[i])
        bad = f.is_nan(value)
        f.store(f.value(f"or {bools} {f.load(wrong[i], bools)}, {bad}"), wrong[i], bools)
    best, bad = f.load(tops[0]), f.load(wrong[0], bools)
    for top, more in zip(tops[1:], wrong[1:], strict=True):
        best = f.fmax(f.load(top), best)
        bad = f.value(f"or {bools} {bad}, {f.load(more, bools)}")
    any_bad = f.value(f"call i1 @llvm.vector.reduce.or.v{f.lanes}i1({bools} {bad})")
    return f.choose(any_bad, number(_NAN), f.largest(best), "float")


@functools.cache
def forward_kernel(lanes: int) -> Kernel:
    """logits [N, V], labels int32 [N] -> the labels' logits [N], m [N], Z [N]."""
    f = Function("block", "ptr %job", "i64 %index", lanes=lanes)
    operands = {"logits": 0, "labels": 1, "chosen": -1, "top": -2, "total": -3}
    with _each_row(f, operands) as (row, logits, classes, label):
        top = _maximum(f, logits, classes)
        f.store(top, f.at("%top", row), "float")

        sums = [f.variable() for _ in range(_AT_ONCE)]
        for here, i, mask in f.vectors(classes, _AT_ONCE):
            value = f.read(f.at(logits, here), mask, constant(_LEAST))
            f.store(f.fadd(f.load(sums[i]), f.exp(f.fsub(value, f.splat(top)))), sums[i])
        parts = [f.load(s) for s in sums]
        total = f.total(f.fadd(f.fadd(parts[0], parts[1]), f.fadd(parts[2], parts[3])))
        size = f.value(f"call float @llvm.fabs.f32(float {top})")
        finite = f.value(f"fcmp olt float {size}, {number(float('inf'))}")
        f.store(f.choose(finite, total, number(_NAN), "float"), f.at("%total", row), "float")

        f.store(number(_NAN), f.at("%chosen", row), "float")
        with _when_valid(f, label, classes):
            f.store(f.load(f.at(logits, label), "float"), f.at("%chosen", row), "float")
    return Kernel(f"lathe_cross_entropy_{lanes}", "\n".join([exponential(lanes), f.text(), _execute(lanes)]))


@functools.cache
def backward_kernel(lanes: int) -> Kernel:
    """logits [N, V], labels int32 [N], m [N], (a + b) / Z [N], a [N] -> dl [N, V], which may lie where logits did."""
    f = Function("block", "ptr %job", "i64 %index", lanes=lanes)
    operands = {"logits": 0, "labels": 1, "top": 2, "factor": 3, "share": 4, "gradient": -1}
    with _each_row(f, operands) as (row, logits, classes, label):
        gradient = f.at("%gradient", f.mul(row, classes))
        top, factor = (f.splat(f.load(f.at(name, row), "float")) for name in ("%top", "%factor"))
        for here, _, mask in f.vectors(classes, _AT_ONCE):
            value = f.exp(f.fsub(f.read(f.at(logits, here), mask), top))
            f.write(f.fmul(value, factor), f.at(gradient, here), mask)
        with _when_valid(f, label, classes):
            there, share = f.at(gradient, label), f.load(f.at("%share", row), "float")
            f.store(f.value(f"fsub float {f.load(there, 'float')}, {share}"), there, "float")
    code = "\n".join([exponential(lanes), f.text(), _execute(lanes)])
    return Kernel(f"lathe_cross_entropy_backward_{lanes}", code)


@functools.cache
def register(lanes: int) -> tuple[str, str]:
    """XLA's names of the kernels for vectors of so many floats, forward and backward; makes them known once.

    Raises Unsupported where XLA refuses them.
    """
    return forward_kernel(lanes).register(), backward_kernel(lanes).register()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits: jax.Array, labels: jax.Array, lanes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits float32[N, V], labels int32[N] -> (nats, logsumexp, correct), float32[N] each, by vectors of so many
    floats."""
    return _forward(logits, labels, lanes)[0]


def _forward(
    logits: jax.Array, labels: jax.Array, lanes: int
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    out = (jax.ShapeDtypeStruct(labels.shape, logits.dtype),) * 3
    call = jax.ffi.ffi_call(register(lanes)[0], out, vmap_method="sequential")
    chosen, top, total = call(logits, labels)
    partition = jnp.where(jnp.isfinite(top), top + jnp.log(total), top)
    correct = (chosen >= top).astype(logits.dtype)
    return (partition - chosen, partition, correct), (logits, labels, top, total)


def _backward(
    lanes: int, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, None]:
    logits, labels, top, total = saved
    nats, partition, _ = cotangents
    out = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    place = {0: 0}  # XLA copies logits that somebody needs afterwards
    call = jax.ffi.ffi_call(register(lanes)[1], out, vmap_method="sequential", input_output_aliases=place)
    return call(logits, labels, top, (nats + partition) / total, nats), None


cross_entropy.defvjp(_forward, _backward)
