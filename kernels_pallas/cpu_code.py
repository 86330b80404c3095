"""LLVM's intermediate representation written by Python: a function's code line by line, with loops and conditions.

    f = Function("scale", "ptr %x", "i64 %count", lanes=16)
    with f.loop("%count", step=16) as i:
        here = f.at("%x", i)
        f.store(f.fmul(f.load(here), f.splat("%factor")), here)
    text = f.text()

A value is its name in the code, a string ("%v3"), or a Python int for an i64. Variables are places in memory, which
LLVM turns into registers; a list of them in a loop of Python is a tile.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

from kernels_pallas.cpu_math import constant

Value = str | int


class Function:
    """One function without result.

    Args:
        name: without @.
        parameters: with their types, as LLVM writes them: "ptr noalias %x", "i64 %rows".
        lanes: floats of a vector.
    """

    def __init__(self, name: str, *parameters: str, lanes: int) -> None:
        self.name, self.parameters, self.lanes = name, parameters, lanes
        self.vector, self.kind = f"<{lanes} x float>", f"v{lanes}f32"
        self._places: list[str] = []
        self._lines: list[str] = []
        self._names = 0

    def text(self) -> str:
        head = f"define internal void @{self.name}({', '.join(self.parameters)}) {{"
        return "\n".join([head, "entry:", *self._places, *self._lines, "  ret void", "}"])

    def line(self, code: str) -> None:
        self._lines.append("  " + code)

    def value(self, code: str) -> str:
        """The result of an instruction."""
        name = f"%v{self._number()}"
        self.line(f"{name} = {code}")
        return name

    def call(self, function: str, *arguments: str) -> None:
        """A function without result; arguments with their types."""
        self.line(f"call void @{function}({', '.join(arguments)})")

    # Whole numbers, i64.

    def add(self, a: Value, b: Value) -> str:
        return self.value(f"add i64 {a}, {b}")

    def sub(self, a: Value, b: Value) -> str:
        return self.value(f"sub i64 {a}, {b}")

    def mul(self, a: Value, b: Value) -> str:
        return self.value(f"mul i64 {a}, {b}")

    def div(self, a: Value, b: Value) -> str:
        """Rounded down; neither is negative."""
        return self.value(f"udiv i64 {a}, {b}")

    def rem(self, a: Value, b: Value) -> str:
        return self.value(f"urem i64 {a}, {b}")

    def ceil(self, a: Value, b: Value) -> str:
        """a / b rounded up."""
        return self.div(self.add(a, b - 1 if isinstance(b, int) else self.sub(b, 1)), b)

    def min(self, a: Value, b: Value) -> str:
        return self.value(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def less(self, a: Value, b: Value) -> str:
        return self.value(f"icmp slt i64 {a}, {b}")

    def equal(self, a: Value, b: Value) -> str:
        return self.value(f"icmp eq i64 {a}, {b}")

    def choose(self, condition: str, a: Value, b: Value, kind: str = "i64") -> str:
        return self.value(f"select i1 {condition}, {kind} {a}, {kind} {b}")

    # Memory. Offsets count elements of `kind`.

    def at(self, pointer: str, *offsets: Value, kind: str = "float") -> str:
        """The address `offsets` elements behind the pointer."""
        for offset in offsets:
            pointer = self.value(f"getelementptr {kind}, ptr {pointer}, i64 {offset}")
        return pointer

    def load(self, pointer: str, kind: str | None = None) -> str:
        """A vector, or one value of the kind."""
        align = ", align 4" if kind is None else ""
        return self.value(f"load {kind or self.vector}, ptr {pointer}{align}")

    def store(self, value: Value, pointer: str, kind: str | None = None) -> None:
        align = ", align 4" if kind is None else ""
        self.line(f"store {kind or self.vector} {value}, ptr {pointer}{align}")

    def read(self, pointer: str, mask: str | None, other: str = "zeroinitializer") -> str:
        """A vector, of which what the mask leaves out is not read and has the value of `other`."""
        if mask is None:
            return self.load(pointer)
        return self.value(
            f"call {self.vector} @llvm.masked.load.{self.kind}.p0(ptr {pointer}, i32 4, "
            f"<{self.lanes} x i1> {mask}, {self.vector} {other})"
        )

    def write(self, value: str, pointer: str, mask: str | None) -> None:
        """What the mask leaves out is not touched."""
        if mask is None:
            self.store(value, pointer)
            return
        bools = f"<{self.lanes} x i1> {mask}"
        self.call(
            f"llvm.masked.store.{self.kind}.p0", f"{self.vector} {value}", f"ptr {pointer}", "i32 4", bools
        )

    def announce(self, pointer: str, write: bool = False, level: int = 1) -> None:
        """A line of memory that will be read, or written, soon: to a level of the processor's caches."""
        self.call("llvm.prefetch.p0", f"ptr {pointer}", f"i32 {int(write)}", f"i32 {4 - level}", "i32 1")

    def room(self, floats: int) -> str:
        """Memory of the function's own."""
        return self._place(f"[{floats} x float], align 64")

    def field(self, pointer: str, struct: str, number: int, kind: str = "i64") -> str:
        """The value of a field of a structure."""
        return self.load(self.value(f"getelementptr {struct}, ptr {pointer}, i64 0, i32 {number}"), kind)

    def set_field(self, value: Value, pointer: str, struct: str, number: int, kind: str = "i64") -> None:
        self.store(value, self.value(f"getelementptr {struct}, ptr {pointer}, i64 0, i32 {number}"), kind)

    # Vectors of floats.

    def splat(self, value: str) -> str:
        """A vector of equal floats."""
        first = self.value(f"insertelement {self.vector} poison, float {value}, i32 0")
        return self.value(
            f"shufflevector {self.vector} {first}, {self.vector} poison, <{self.lanes} x i32> zeroinitializer"
        )

    def number(self, value: float) -> str:
        """A vector of a constant."""
        return constant(value)

    def fma(self, a: str, b: str, c: str) -> str:
        """a b + c."""
        v = self.vector
        return self.value(f"call {v} @llvm.fma.{self.kind}({v} {a}, {v} {b}, {v} {c})")

    def fadd(self, a: str, b: str) -> str:
        return self.value(f"fadd {self.vector} {a}, {b}")

    def fsub(self, a: str, b: str) -> str:
        return self.value(f"fsub {self.vector} {a}, {b}")

    def fmul(self, a: str, b: str) -> str:
        return self.value(f"fmul {self.vector} {a}, {b}")

    def fdiv(self, a: str, b: str) -> str:
        return self.value(f"fdiv {self.vector} {a}, {b}")

    def fmax(self, a: str, b: str) -> str:
        """The larger ones; b where one is not a number."""
        more = self.value(f"fcmp ogt {self.vector} {a}, {b}")
        return self.value(f"select <{self.lanes} x i1> {more}, {self.vector} {a}, {self.vector} {b}")

    def is_nan(self, a: str) -> str:
        """A mask of what is not a number."""
        return self.value(f"fcmp uno {self.vector} {a}, {a}")

    def exp(self, a: str) -> str:
        """Needs `cpu_math.exponential` beside the function."""
        return self.value(f"call {self.vector} @exp({self.vector} {a})")

    def total(self, a: str) -> str:
        """The float that is the sum of a vector."""
        return self.value(
            f"call reassoc float @llvm.vector.reduce.fadd.{self.kind}(float 0.0, {self.vector} {a})"
        )

    def largest(self, a: str) -> str:
        """The largest float of a vector of numbers."""
        return self.value(f"call nnan float @llvm.vector.reduce.fmax.{self.kind}({self.vector} {a})")

    def transposed(self, rows: list[str]) -> list[str]:
        """The columns of as many vectors as a vector has floats, a power of two."""
        half = self.lanes // 2
        masks = [
            ", ".join(f"i32 {i // 2 + (self.lanes if i % 2 else 0) + start}" for i in range(self.lanes))
            for start in (0, half)
        ]
        for _ in range(self.lanes.bit_length() - 1):  # each step riffles: row i with row i + half
            rows = [
                self.value(
                    f"shufflevector {self.vector} {rows[i]}, {self.vector} {rows[i + half]}, "
                    f"<{self.lanes} x i32> <{mask}>"
                )
                for i in range(half)
                for mask in masks
            ]
        return rows

    # XLA's call: operands 0, 1, ..., results -1, -2, ...

    def array(self, frame: str, number: int) -> "Array":
        buffer = self.buffer(frame, number)
        return Array(self, buffer, self.data(buffer))

    def arrays(self, frame: str, numbers: dict[str, int]) -> dict[str, "Array"]:
        """By names, which the data of each has in the code too: "%name"."""
        found = {}
        for name, number in numbers.items():
            found[name] = Array(self, self.buffer(frame, number), f"%{name}")
            self.line(f"%{name} = call ptr @data(ptr {found[name].buffer})")
        return found

    def buffer(self, frame: str, number: int) -> str:
        """What XLA knows of an array."""
        return self.value(f"call ptr @buffer(ptr {frame}, i64 {number})")

    def data(self, buffer: str) -> str:
        """Where an array's first number lies."""
        return self.value(f"call ptr @data(ptr {buffer})")

    # Variables.

    def variable(self, initial: Value = "zeroinitializer", kind: str | None = None) -> str:
        """A variable, a vector unless said otherwise, whose value is that here each time the code passes."""
        place = self._place(kind or self.vector)
        self.store(initial, place, kind)
        return place

    # Control.

    @contextlib.contextmanager
    def loop(self, stop: Value, start: Value = 0, step: Value = 1) -> Iterator[str]:
        """The number from `start` on, while it is less than `stop`."""
        number, place = self._number(), self._place("i64")
        self.line(f"store i64 {start}, ptr {place}")
        self._label(f"loop{number}")
        index = self.value(f"load i64, ptr {place}")
        self.line(f"br i1 {self.less(index, stop)}, label %body{number}, label %end{number}")
        self._lines.append(f"body{number}:")
        yield index
        self.line(f"store i64 {self.add(index, step)}, ptr {place}")
        self.line(f"br label %loop{number}")
        self._lines.append(f"end{number}:")

    def vectors(self, count: Value, at_once: int = 1) -> Iterator[tuple[str, int, str | None]]:
        """A loop of Python whose body is the code of a loop over `count` floats, vector by vector.

        Gives (first float, number of the vector among the `at_once` of a round, mask); the mask, for `read` and
        `write`, is None but for the last, smaller one. The body is repeated at_once + 2 times.
        """
        rounds = self.sub(count, self.rem(count, at_once * self.lanes))
        whole = self.sub(count, self.rem(count, self.lanes))
        with self.loop(rounds, step=at_once * self.lanes) as first:
            for number in range(at_once):
                yield self.add(first, number * self.lanes), number, None
        if at_once > 1:
            with self.loop(whole, start=rounds, step=self.lanes) as first:
                yield first, 0, None
        with self.when(self.less(whole, count)):
            bools = f"<{self.lanes} x i1>"
            mask = f"call {bools} @llvm.get.active.lane.mask.v{self.lanes}i1.i64(i64 {whole}, i64 {count})"
            yield whole, 0, self.value(mask)

    @contextlib.contextmanager
    def when(self, condition: str) -> Iterator[None]:
        number = self._number()
        self.line(f"br i1 {condition}, label %then{number}, label %else{number}")
        self._lines.append(f"then{number}:")
        yield
        self._label(f"else{number}")

    def _label(self, label: str) -> None:
        self.line(f"br label %{label}")
        self._lines.append(f"{label}:")

    def _place(self, content: str) -> str:
        name = f"%place{self._number()}"
        self._places.append(f"  {name} = alloca {content}")
        return name

    def _number(self) -> int:
        self._names += 1
        return self._names


@dataclasses.dataclass(frozen=True)
class Array:
    """An operand or a result of XLA's call: its `Function.buffer` and `Function.data`."""

    f: Function
    buffer: str
    data: str

    def dim(self, axis: int) -> str:
        return self.f.value(f"call i64 @dim(ptr {self.buffer}, i64 {axis})")

    def dims(self, count: int) -> list[str]:
        """The first `count` sizes."""
        return [self.dim(axis) for axis in range(count)]

    def whole(self, index: Value) -> str:
        """A whole number of an int32 array."""
        return self.f.value(f"sext i32 {self.f.load(self.f.at(self.data, index, kind='i32'), 'i32')} to i64")

    def set_whole(self, index: Value, value: Value) -> None:
        place = self.f.at(self.data, index, kind="i32")
        self.f.store(self.f.value(f"trunc i64 {value} to i32"), place, "i32")
