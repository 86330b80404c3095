"""What a program costs on each device of a mesh, read from its jaxpr: nothing is compiled, run or allocated.

Each array has, for every dimension, the mesh axes that divide it. They are carried through the program by rules such as
the partitioner's own, which count as they go:

    products            FLOPs of matrix products and convolutions, on one device; all else is taken to be free
    moved               bytes that the operands and results of products are, which memory must move at least
    gathered, reduced   bytes that a device sends in a ring: all-gathers of operands whose axes divide the other operand
                        already (a weight under `fsdp`), sums over axes that divide what a product contracts; and what
                        a `shard_map` sends itself: passed on and gathered, and summed
    peak                bytes of intermediate arrays that are alive together at most

Elementwise results are taken to be fused into whatever reads them, unless a product or a loop does. A loop (`scan`)
counts as often as it runs; a `while` once, and a kernel not at all: `uncounted` names them. Of a `cond` the branch with
most products counts, and `optional` says how many of them another branch would save.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Axes = tuple[str, ...]
Spec = tuple[Axes, ...]  # of every dimension

_INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Of their results only the small ones, or those that something else needs whole, are ever in memory.
_FUSED = frozenset(
    """
    abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy cos div eq erf erf_inv exp exp2 expm1
    floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul name ne neg not or pow real
    reduce_precision rem reshape round rsqrt select_n sharding_constraint sign sin sqrt square squeeze
    stop_gradient sub tanh transpose xor slice pad rev expand_dims
    shift_right_logical shift_left random_bits random_wrap
    random_unwrap threefry2x32 pvary
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass
class Tally:
    """Costs of a program on one device; see the top of this file."""

    products: float = 0.0
    moved: float = 0.0
    gathered: float = 0.0
    reduced: float = 0.0
    peak: float = 0.0
    optional: float = 0.0
    uncounted: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: "Tally", times: int = 1) -> None:
        """Adds what happens `times` times. Peaks do not add up."""
        for name in ("products", "moved", "gathered", "reduced", "optional"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.uncounted |= other.uncounted


def tally(closed: Any, specs: Sequence[Spec], sizes: Mapping[str, int], kept: Sequence[str] = ()) -> Tally:
    """The costs of a `ClosedJaxpr`.

    specs: of its arguments, in order. sizes: of the mesh's axes. kept: axes that divide both the batch and parameters;
    a matrix that is a sum over them, such as a gradient, is summed into the parts that each device keeps.
    """
    return _Program(sizes, kept).run(closed.jaxpr, list(specs))[0]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation of the flattened program. Inputs that are literals are None."""

    equation: Any
    inputs: list[Any]
    outputs: list[Any]

    @property
    def name(self) -> str:
        return self.equation.primitive.name


class _Program:
    def __init__(self, sizes: Mapping[str, int], kept: Sequence[str]):
        self.sizes, self.kept = dict(sizes), tuple(kept)

    def run(self, jaxpr: Any, specs: list[Spec]) -> tuple[Tally, list[Spec]]:
        """-> costs, and the specs of the results."""
        steps, results = _flatten(jaxpr)
        env: dict[Any, Spec] = {}
        total = Tally()
        for var, spec in zip(jaxpr.invars, specs, strict=True):
            env[var] = spec
        extra: list[float] = []
        made: set[Any] = set()
        for step in steps:
            inputs = [env.get(v, _open(v)) if v is not None else () for v in step.inputs]
            outputs, during = self._apply(step, inputs, total)
            env |= dict(zip(step.outputs, outputs, strict=True))
            extra.append(during)
            if step.name in _FUSED and step.outputs[0].aval.shape and not step.name.startswith("broadcast"):
                # What meets a divided array elementwise is divided alike, from where it is made.
                for v in step.inputs:
                    if v in made and v.aval.shape == step.outputs[0].aval.shape:
                        env[v] = _joined(env[v], outputs[0])
            made |= set(step.outputs)
        total.peak = self._peak(steps, results, env, extra)
        return total, [env.get(v, _open(v)) if v is not None else () for v in results]

    # Memory

    def _peak(
        self, steps: list[_Step], results: list[Any], env: dict[Any, Spec], extra: list[float]
    ) -> float:
        last: dict[Any, int] = {v: len(steps) for v in results if v is not None}
        stored = set(last)
        for place in range(len(steps) - 1, -1, -1):
            step = steps[place]
            virtual = step.name in _FUSED and not any(v in stored for v in step.outputs)
            when = max((last.get(v, place) for v in step.outputs), default=place) if virtual else place
            for v in step.inputs:
                if v is not None:
                    last[v] = max(last.get(v, -1), when)
                    if step.name not in _FUSED and not step.name.startswith(("reduce_", "arg")):
                        stored.add(v)
            if not virtual:
                stored |= set(step.outputs)
        # Constants are made where they are needed, in parts like those of what needs them.
        stored -= {
            v
            for step in steps
            if step.name in ("broadcast_in_dim", "iota") and not any(_open(x) for x in step.inputs)
            for v in step.outputs
        }
        made = {v: place for place, step in enumerate(steps) for v in step.outputs if v in stored}
        ends: dict[int, list[Any]] = {}
        for v in made:
            ends.setdefault(last.get(v, made[v]), []).append(v)
        alive = highest = 0.0
        for place, step in enumerate(steps):
            alive += sum(self.bytes(v, env[v]) for v in step.outputs if v in made)
            highest = max(highest, alive + extra[place])
            alive -= sum(self.bytes(v, env[v]) for v in ends.get(place, ()))
        return highest

    def parts(self, axes: Axes) -> int:
        return math.prod(self.sizes.get(name, 1) for name in axes)

    def bytes(self, value: Any, spec: Spec) -> float:
        """Of an array, on one device."""
        shape, dtype = value.aval.shape, value.aval.dtype
        width = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize
        return math.prod(shape) * width / self.parts(sum(spec, ()))

    # Operations

    def _apply(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        """-> specs of the results, and bytes that it needs beside its arguments and results."""
        rule = getattr(self, f"_on_{step.name.replace('-', '_')}", None)
        if rule is not None:
            return rule(step, inputs, total)
        if step.name in ("pallas_call", "custom_call", "ffi_call"):
            total.uncounted.add(step.name)
        if step.name.startswith("reduce_") or step.name in ("argmax", "argmin"):
            return self._reduction(step, inputs, total)
        return [self._alike(step, inputs, v) for v in step.outputs], 0.0

    def _alike(self, step: _Step, inputs: list[Spec], out: Any) -> Spec:
        """Every dimension as that of the first argument of this rank and size in which it is divided.

        A part of a dimension, or what it is padded to, is divided like it where its size allows.
        """
        resized = step.name in ("pad", "slice", "dynamic_slice", "dynamic_update_slice", "concatenate")
        found: list[Axes] = []
        for i, size in enumerate(out.aval.shape):
            axes: Axes = ()
            for var, spec in zip(step.inputs, inputs, strict=True):
                if var is None or len(spec) != len(out.aval.shape) or not spec[i]:
                    continue
                if var.aval.shape[i] == size or (resized and size % self.parts(spec[i]) == 0):
                    axes = spec[i]
                    break
            found.append(tuple(name for name in axes if name not in sum(found, ())))
        return tuple(found)

    def _reduction(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        gone = set(step.equation.params.get("axes", ()))
        outputs = []
        for var, spec, out in zip(step.inputs, inputs, step.outputs, strict=False):
            kept = tuple(axes for i, axes in enumerate(spec) if i not in gone) if var is not None else ()
            over = sum((axes for i, axes in enumerate(spec) if i in gone), ())
            outputs.append(self._summed(out, kept, over, total))
        return outputs, 0.0

    def _summed(self, out: Any, spec: Spec, over: Axes, total: Tally) -> Spec:
        """The spec of a result whose parts over the axes `over` are summed; what that sends."""
        over = tuple(name for name in over if self.sizes.get(name, 1) > 1)
        if not over:
            return spec
        size, shape = self.bytes(out, spec), out.aval.shape
        scattered = tuple(name for name in over if name in self.kept)
        open_ = [i for i, axes in enumerate(spec) if not axes and shape[i] % self.parts(scattered) == 0]
        if scattered and open_ and len(shape) > 1:
            # Summed where it is kept: a reduce-scatter over these axes, an all-reduce over the rest.
            place = max(open_, key=lambda i: shape[i])
            spec = tuple(scattered if i == place else axes for i, axes in enumerate(spec))
            parts = self.parts(scattered)
            total.reduced += size * (parts - 1) / parts
            size, over = size / parts, tuple(name for name in over if name not in scattered)
        parts = self.parts(over)
        total.reduced += 2 * size * (parts - 1) / parts
        return spec

    def _gathered(self, var: Any, spec: Spec, axes: set[str], total: Tally) -> tuple[Spec, float]:
        """An operand without these axes: its spec, and the bytes of the copy."""
        gone = tuple(name for name in sum(spec, ()) if name in axes and self.sizes.get(name, 1) > 1)
        kept = tuple(tuple(name for name in each if name not in axes) for each in spec)
        if not gone:
            return kept, 0.0
        size = self.bytes(var, kept)
        total.gathered += size * (self.parts(gone) - 1) / self.parts(gone)
        return kept, size

    def _on_dot_general(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        (left_in, right_in), (left_batch, right_batch) = step.equation.params["dimension_numbers"]
        vars_ = step.inputs
        specs = [s if s else _open(v) for s, v in zip(inputs, vars_, strict=True)]
        # Where both are divided by an axis, but not in the same dimension, the smaller one is gathered.
        pairs = {*zip(left_in, right_in, strict=True), *zip(left_batch, right_batch, strict=True)}
        conflict = set()
        for i, axes in enumerate(specs[0]):
            for j, others in enumerate(specs[1]):
                if (i, j) not in pairs:
                    conflict |= set(axes) & set(others)
        smaller = min((0, 1), key=lambda k: math.prod(vars_[k].aval.shape))
        specs[smaller], copied = self._gathered(vars_[smaller], specs[smaller], conflict, total)
        left, right = specs
        batch = [left[i] or right[j] for i, j in zip(left_batch, right_batch, strict=True)]
        free = [a for i, a in enumerate(left) if i not in (*left_in, *left_batch)]
        free += [a for j, a in enumerate(right) if j not in (*right_in, *right_batch)]
        spec: Spec = tuple(batch + free)
        inner = tuple(
            dict.fromkeys(sum((left[i] + right[j] for i, j in zip(left_in, right_in, strict=True)), ()))
        )
        inner = tuple(name for name in inner if name not in sum(spec, ()))
        (out,) = step.outputs
        contracted = math.prod(vars_[0].aval.shape[i] for i in left_in)
        work = 2.0 * math.prod(out.aval.shape) * contracted
        total.products += work / self.parts(sum(spec, ()) + inner)
        total.moved += sum(self.bytes(v, s) for v, s in zip(vars_, specs, strict=True)) + self.bytes(
            out, spec
        )
        return [self._summed(out, spec, inner, total)], copied

    def _on_conv_general_dilated(
        self, step: _Step, inputs: list[Spec], total: Tally
    ) -> tuple[list[Spec], float]:
        (out,), kernel = step.outputs, step.inputs[1].aval.shape
        numbers = step.equation.params["dimension_numbers"]
        spec = [()] * len(out.aval.shape)
        spec[numbers.out_spec[0]] = inputs[0][numbers.lhs_spec[0]] if inputs[0] else ()
        work = 2.0 * math.prod(out.aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        total.products += work / self.parts(sum(spec, ()))
        return [tuple(spec)], 0.0

    def _on_transpose(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        spec = inputs[0] or _open(step.outputs[0])
        return [tuple(spec[i] for i in step.equation.params["permutation"])], 0.0

    def _on_broadcast_in_dim(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        (out,) = step.outputs
        spec = [()] * len(out.aval.shape)
        if step.inputs[0] is not None:
            for i, j in enumerate(step.equation.params["broadcast_dimensions"]):
                if step.inputs[0].aval.shape[i] == out.aval.shape[j]:
                    spec[j] = inputs[0][i]
        return [tuple(spec)], 0.0

    def _on_reshape(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        (out,) = step.outputs
        if step.inputs[0] is None:
            return [_open(out)], 0.0
        return [_reshaped(step.inputs[0].aval.shape, inputs[0], out.aval.shape, self.parts)], 0.0

    def _on_squeeze(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        gone = set(step.equation.params["dimensions"])
        return [tuple(axes for i, axes in enumerate(inputs[0]) if i not in gone)], 0.0

    def _on_expand_dims(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        spec = list(inputs[0])
        for i in sorted(step.equation.params["dimensions"]):
            spec.insert(i, ())
        return [tuple(spec)], 0.0

    def _on_gather(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        """Rows of a table: divided as their numbers are. Rows that lie on several devices are summed, masked."""
        (out,), numbers = step.outputs, step.equation.params["dimension_numbers"]
        spec = [()] * len(out.aval.shape)
        places = [i for i in range(len(spec)) if i not in numbers.offset_dims]
        for i, axes in zip(places, inputs[1] if len(inputs) > 1 else (), strict=False):
            spec[i] = axes
        rows = sum((inputs[0][i] for i in numbers.collapsed_slice_dims if inputs[0]), ())
        rows = tuple(name for name in rows if name not in sum(spec, ()) and self.sizes.get(name, 1) > 1)
        if rows and not numbers.operand_batching_dims:
            parts = self.parts(rows)
            total.reduced += 2 * self.bytes(out, tuple(spec)) * (parts - 1) / parts
        return [tuple(spec)], 0.0

    def _on_scatter_add(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        (out,), numbers = step.outputs, step.equation.params["dimension_numbers"]
        spec = list(inputs[0] or _open(out))
        batched = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
        for i, j in batched:
            spec[i] = spec[i] or inputs[1][j]
        own = tuple(spec)
        updates = next((spec for spec in inputs[1:] if spec), ((),))
        over = tuple(name for name in updates[0] if name not in sum(own, ()))
        return [self._summed(out, own, over, total)], 0.0

    def _on_scan(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        params = step.equation.params
        constants, carried, length = params["num_consts"], params["num_carry"], params["length"]
        specs = [s if v is not None else () for s, v in zip(inputs, step.inputs, strict=True)]
        body = params["jaxpr"].jaxpr
        first = constants + carried
        inner = specs[:first] + [s[1:] for s in specs[first:]]
        for _ in range(2):  # what a loop carries may become divided by its first turn
            once, found = self.run(body, inner)
            carry = [a if any(a) else b for a, b in zip(inner[constants:first], found[:carried], strict=True)]
            inner = inner[:constants] + carry + inner[first:]
        total.add(once, length)
        outputs = carry + [((), *s) for s in found[carried:]]
        return outputs, once.peak

    def _on_while(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        params = step.equation.params
        total.uncounted.add("while")
        skipped = params["cond_nconsts"]
        once, found = self.run(params["body_jaxpr"].jaxpr, list(inputs[skipped:]))
        total.add(once)
        return found, once.peak

    def _on_shard_map(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        """Its program is one device's: nothing in it is divided further."""
        params = step.equation.params
        for var, spec, wanted in zip(step.inputs, inputs, params["in_specs"], strict=True):
            if var is not None and spec:
                kept = set(sum(_divided(wanted, len(spec)), ()))
                self._gathered(var, spec, set(sum(spec, ())) - kept, total)
        body = params["jaxpr"]
        once, _ = self.run(body, [_open(v) for v in body.invars])
        total.add(once)
        outputs = zip(params["out_specs"], step.outputs, strict=True)
        return [_divided(spec, len(out.aval.shape)) for spec, out in outputs], once.peak

    def _on_ppermute(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        total.gathered += sum(self.bytes(v, s) for v, s in zip(step.inputs, inputs, strict=True))
        return inputs, 0.0

    def _on_all_gather(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        return self._sent(step, step.outputs, "gathered", 1, total)

    def _on_all_to_all(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        return self._sent(step, step.outputs, "gathered", 1, total)

    def _on_psum_invariant(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        return self._on_psum(step, inputs, total)

    def _on_psum(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        return self._sent(step, step.outputs, "reduced", 2, total)

    def _on_reduce_scatter(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        return self._sent(step, step.inputs, "reduced", 1, total)

    def _sent(
        self, step: _Step, values: list[Any], kind: str, times: int, total: Tally
    ) -> tuple[list[Spec], float]:
        """A collective of `shard_map`, by its larger side."""
        axes = step.equation.params.get("axes") or step.equation.params["axis_name"]
        parts = self.parts((axes,) if isinstance(axes, str) else tuple(axes))
        size = sum(self.bytes(v, _open(v)) for v in values if v is not None)
        setattr(total, kind, getattr(total, kind) + times * size * (parts - 1) / parts)
        return [_open(v) for v in step.outputs], 0.0

    def _on_cond(self, step: _Step, inputs: list[Spec], total: Tally) -> tuple[list[Spec], float]:
        runs = [self.run(branch.jaxpr, list(inputs[1:])) for branch in step.equation.params["branches"]]
        worst = max(runs, key=lambda run: run[0].products)
        total.add(worst[0])
        least = min(run[0].products - run[0].optional for run in runs)
        total.optional += worst[0].products - worst[0].optional - least
        return worst[1], max(run[0].peak for run in runs)


def _open(value: Any) -> Spec:
    return () if value is None else ((),) * len(value.aval.shape)


def _divided(spec: Any, ndim: int) -> Spec:
    """Of a `PartitionSpec`."""
    entries = tuple(spec) + (None,) * (ndim - len(spec))
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)


def _joined(one: Spec, other: Spec) -> Spec:
    """The axes of `one`, and where it has none those of `other` that it has nowhere."""
    taken = set(sum(one, ()))
    return tuple(a or tuple(n for n in b if n not in taken) for a, b in zip(one, other, strict=True))


def _reshaped(old: Sequence[int], spec: Spec, new: Sequence[int], parts: Any) -> Spec:
    """The first of the dimensions that are merged or split keeps its axes, if they still divide it."""
    result: list[Axes] = [()] * len(new)
    i = j = 0
    while i < len(old) and j < len(new):
        left, right, first, start = old[i], new[j], i, j
        while left != right:
            if left < right:
                i += 1
                left *= old[i]
            else:
                j += 1
                right *= new[j]
        # Dimensions of 1 in front of what they are merged with are nobody's.
        while first < i and old[first] == 1:
            first += 1
        while start < j and new[start] == 1:
            start += 1
        if spec[first] and new[start] % parts(spec[first]) == 0:
            result[start] = spec[first]
        i, j = i + 1, j + 1
    return tuple(result)


def _flatten(jaxpr: Any) -> tuple[list[_Step], list[Any]]:
    """All operations in order, calls of functions replaced by what they call."""
    steps: list[_Step] = []

    def read(names: dict[Any, Any], atom: Any) -> Any:
        return None if hasattr(atom, "val") else names.get(atom, atom)

    def walk(inner: Any, names: dict[Any, Any]) -> list[Any]:
        for equation in inner.eqns:
            inputs = [read(names, atom) for atom in equation.invars]
            called = None
            if equation.primitive.name not in ("scan", "while", "cond", "shard_map", "pallas_call"):
                called = next((equation.params[key] for key in _INLINED if key in equation.params), None)
            if called is None:
                fresh = [_Value(v.aval) for v in equation.outvars]
                steps.append(_Step(equation, inputs, fresh))
            else:
                body = getattr(called, "jaxpr", called)
                mapped = dict(zip(body.invars, inputs, strict=True))
                fresh = walk(body, mapped)
            names |= dict(zip(equation.outvars, fresh, strict=True))
        return [read(names, atom) for atom in inner.outvars]

    results = walk(jaxpr, {v: v for v in jaxpr.invars})
    return steps, results


class _Value:
    """A result in the flattened program; a function that is called twice gives two."""

    def __init__(self, aval: Any):
        self.aval = aval
