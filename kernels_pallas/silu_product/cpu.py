"""silu(gate) * up on a CPU: every operand is read once forward, and once backward. With s = 1 / (1 + exp(-gate)):

y = gate s up
dup = dy gate s        dgate = dy up s (1 + gate (1 - s))
"""

import functools

import jax

from kernels_pallas.cpu import Kernel
from kernels_pallas.cpu_code import Function
from kernels_pallas.cpu_math import exponential

_PIECE = 1 << 14  # numbers
_AT_ONCE = 2  # vectors, whose exponentials do not wait for each other


def _piece(operands: dict[str, int], lanes: int) -> tuple[Function, str]:
    """The function of a piece, with its operands by their names from its first number on; how many there are."""
    f = Function("piece", "ptr %job", "i64 %index", lanes=lanes)
    frame = f.field("%job", "%job", 6, "ptr")
    first = f.mul("%index", _PIECE)
    for name, number in operands.items():
        f.line(f"%{name} = getelementptr float, ptr {f.array(frame, number).data}, i64 {first}")
    return f, f.min(f.sub(f.array(frame, 0).dim(0), first), _PIECE)


def _sigmoid(f: Function, x: str) -> str:
    minus = f.value(f"fneg {f.vector} {x}")
    return f.fdiv(f.number(1), f.fadd(f.number(1), f.exp(minus)))


def _kernel(name: str, piece: Function, lanes: int) -> Kernel:
    f = Function("execute", "ptr %frame", lanes=lanes)
    pieces = f.ceil(f.array("%frame", 0).dim(0), _PIECE)
    f.call("share.long", "ptr %frame", "ptr @piece", "ptr %frame", f"i64 {pieces}", f"i64 {pieces}")
    return Kernel(f"{name}_{lanes}", "\n".join([exponential(lanes), piece.text(), f.text()]))


@functools.cache
def forward_kernel(lanes: int) -> Kernel:
    """gate [N], up [N] -> y [N]."""
    f, count = _piece({"gate": 0, "up": 1, "y": -1}, lanes)
    for here, _, mask in f.vectors(count, _AT_ONCE):
        gate, up = (f.read(f.at(name, here), mask) for name in ("%gate", "%up"))
        f.write(f.fmul(f.fmul(gate, _sigmoid(f, gate)), up), f.at("%y", here), mask)
    return _kernel("lathe_silu_product", f, lanes)


@functools.cache
def backward_kernel(lanes: int) -> Kernel:
    """gate [N], up [N], dy [N] -> dgate [N], dup [N]."""
    f, count = _piece({"gate": 0, "up": 1, "dy": 2, "dgate": -1, "dup": -2}, lanes)
    one = f.number(1)
    for here, _, mask in f.vectors(count, _AT_ONCE):
        gate, up, dy = (f.read(f.at(name, here), mask) for name in ("%gate", "%up", "%dy"))
        s = _sigmoid(f, gate)
        f.write(f.fmul(dy, f.fmul(gate, s)), f.at("%dup", here), mask)
        slope = f.fmul(s, f.fma(gate, f.fsub(one, s), one))
        f.write(f.fmul(f.fmul(dy, up), slope), f.at("%dgate", here), mask)
    return _kernel("lathe_silu_product_backward", f, lanes)


@functools.cache
def register(lanes: int) -> tuple[str, str]:
    """XLA's names of the kernels for vectors of so many floats, forward and backward; makes them known once.

    Raises Unsupported where XLA refuses them.
    """
    return forward_kernel(lanes).register(), backward_kernel(lanes).register()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def silu_product(gate: jax.Array, up: jax.Array, lanes: int) -> jax.Array:
    """float32[N] each -> [N], by vectors of so many floats."""
    call = jax.ffi.ffi_call(
        register(lanes)[0], jax.ShapeDtypeStruct(gate.shape, gate.dtype), vmap_method="sequential"
    )
    return call(gate, up)


def _forward(gate: jax.Array, up: jax.Array, lanes: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return silu_product(gate, up, lanes), (gate, up)


def _backward(lanes: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    out = (jax.ShapeDtypeStruct(gate.shape, gate.dtype),) * 2
    dgate, dup = jax.ffi.ffi_call(register(lanes)[1], out, vmap_method="sequential")(gate, up, dy)
    return dgate, dup


silu_product.defvjp(_forward, _backward)
