"""Numbers and e^x in LLVM's intermediate representation, for the kernels of a CPU."""

import struct

import numpy as np

# Cephes' expf: (e^r - 1 - r) / r^2, from the highest power on.
_POWERS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)

_EXPONENTIAL = """
declare {vector} @llvm.fma.{type}({vector}, {vector}, {vector})
declare {vector} @llvm.nearbyint.{type}({vector})
declare {vector} @llvm.maxnum.{type}({vector}, {vector})
declare {vector} @llvm.minnum.{type}({vector}, {vector})

; e^x of float32 to two units in the last place, exactly 0 below -87: 2^n times a polynomial of what is left.
define internal {vector} @exp({vector} %x) {{
  %low = fcmp olt {vector} %x, {lowest}
  %x.least = call {vector} @llvm.maxnum.{type}({vector} %x, {vector} {lowest})
  %x.most = call {vector} @llvm.minnum.{type}({vector} %x.least, {vector} {highest})
  %n.raw = fmul {vector} %x.most, {log2e}
  %n = call {vector} @llvm.nearbyint.{type}({vector} %n.raw)
  %r.high = call {vector} @llvm.fma.{type}({vector} %n, {vector} {ln2high}, {vector} %x.most)
  %r = call {vector} @llvm.fma.{type}({vector} %n, {vector} {ln2low}, {vector} %r.high)
{polynomial}
  %r2 = fmul {vector} %r, %r
  %y.r = call {vector} @llvm.fma.{type}({vector} %p.5, {vector} %r2, {vector} %r)
  %y = fadd {vector} %y.r, {one}
  %n.int = fptosi {vector} %n to {ints}
  %power.int = add {ints} %n.int, {bias}
  %power.bits = shl {ints} %power.int, {mantissa}
  %power = bitcast {ints} %power.bits to {vector}
  %scaled = fmul {vector} %y, %power
  %result = select {bools} %low, {vector} zeroinitializer, {vector} %scaled
  ret {vector} %result
}}
"""


def number(value: float) -> str:
    """A float32 constant as LLVM writes it: the bits of the double that it is."""
    return "0x" + struct.pack(">d", np.float32(value)).hex().upper()


def constant(value: float) -> str:
    """A vector of equal floats, without its type."""
    return f"splat (float {number(value)})"


def exponential(lanes: int) -> str:
    """The function `@exp` of vectors of so many floats; declares fma, maxnum and minnum of them too."""
    vector, kind = f"<{lanes} x float>", f"v{lanes}f32"
    polynomial = [f"  %p.0 = fadd {vector} {constant(_POWERS[0])}, zeroinitializer"] + [
        f"  %p.{i} = call {vector} @llvm.fma.{kind}({vector} %p.{i - 1}, {vector} %r, {vector} {constant(power)})"
        for i, power in enumerate(_POWERS[1:], 1)
    ]
    return _EXPONENTIAL.format(
        vector=vector,
        type=kind,
        ints=f"<{lanes} x i32>",
        bools=f"<{lanes} x i1>",
        lowest=constant(-87),
        highest=constant(88),
        log2e=constant(1.44269504088896341),
        ln2high=constant(-0.693359375),
        ln2low=constant(2.12194440e-4),
        one=constant(1),
        bias="splat (i32 127)",
        mantissa="splat (i32 23)",
        polynomial="\n".join(polynomial),
    )
