"""A stack of blocks, walked from the first to the last: what a block's kernels see, once those before it are done.

The hidden states of all calibration tokens stand before one block at a time. Its Gram matrices come from them, by
whatever parameters a method has for it so far; then they go through the block as the method leaves it, and stand before
the next. So the calibration data passes each block a fixed number of times, not once for every block behind it. A
block runs with its kernels multiplied out, so that equal blocks share their programs, however each kernel is stored.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from research.errors import UserError
from research.nn import weights
from research.nn.attention import Context
from research.nn.quantized import quantize_kernels
from research.nn.transformer import LayerStack, Stream, run_block
from research.nn.weights import Kernel, Weight, Wrapped
from research.training.observe import (
    PLACES,
    Batch,
    Gram,
    add,
    checked,
    dropping_nothing,
    observed,
    real_tokens,
    short,
)
from research.training.paths import compile_pattern

PyTree = Any
Kernels = dict[str, Kernel]  # by their paths in a block, such as attention/query/kernel

# The kernels of blocks. A router decides too much for what it weighs, and taps of convolutions are no products.
SELECT = r"(^|/)layer_\d+/(?!(.*/)?(conv|router|shared_gate)/).*kernel$"


def plain(tree: PyTree) -> PyTree:
    """The tree with every structured weight multiplied out."""
    return jax.tree.map(weights.materialize, tree, is_leaf=lambda node: isinstance(node, Weight))


def replace(tree: PyTree, kernels: Mapping[str, Kernel]) -> PyTree:
    """A nested dict with other values at some `/`-joined paths."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    return traverse_util.unflatten_dict(flat | dict(kernels), sep="/")


def kernels_at(block: PyTree, paths: Sequence[str]) -> dict[str, Kernel]:
    """{path: kernel} of a block."""
    found = {}
    for path in paths:
        node = block
        for part in path.split("/"):
            node = node[part]
        found[path] = node
    return found


def quantize_arrays(
    method: str, params: PyTree, quantizer: Callable[[jax.Array], Kernel], select: str
) -> PyTree:
    """`quantize_kernels`. Raises `UserError` where a kernel that is selected is no array any more."""
    for path in selected(params, select):
        check_array(method, path, _flat(params)[path])
    return quantize_kernels(params, quantizer, select)


def check_array(method: str, path: str, kernel: Kernel) -> None:
    """Raises `UserError` for a kernel that something has been made of already."""
    if isinstance(kernel, Weight):
        raise UserError(
            f"{method} rounds arrays, and {path} is {type(kernel).__name__} already: name it first in the chain, or "
            "start from the model as it was"
        )


class Walk:
    """The calibration tokens before one block of a model, that of `index`, in [0, layers).

    model: a stack of unrolled blocks with an `embed`. batches: language batches. select: which kernels are visited, a
    pattern of their paths in the tree. Hidden states are float32[B, T, width] a batch, all of them on the device.

    Raises:
        UserError: a model of another kind; no batch; no kernel is selected.
    """

    def __init__(self, model: nn.Module, params: PyTree, batches: Sequence[Batch], select: str = SELECT):
        if not isinstance(model, LayerStack) or not hasattr(model, "embed"):
            raise UserError(
                f"a {type(model).__name__} is not a stack of blocks behind an embedding, so it can't be walked block "
                "by block; methods that need no data (finequant, round_to_nearest) take any model"
            )
        if "store" in params:
            raise UserError("experts of this model lie in a store; unpack it first (experiments.convert)")
        if not batches:
            raise UserError("the calibration data is empty: it has no batch")
        if model.scan_layers:
            raise ValueError("the layers are scanned: see Chain.run")
        self._blocks = dropping_nothing(model.blocks)
        self.layers, self.index = model.num_layers, 0
        self._select = compile_pattern(select, "select")
        selected(params, select)
        self._places = [{name: jnp.asarray(b[name]) for name in PLACES if name in b} for b in batches]
        entry = {name: value for name, value in params.items() if not name.startswith("layer_")}
        self._streams = [_enter(model, entry, place) for place in self._places]

    @property
    def name(self) -> str:
        """The block's name in the tree."""
        return f"layer_{self.index}"

    def paths(self, block: PyTree) -> tuple[str, ...]:
        """The kernels of a block's parameters that are selected."""
        return tuple(path for path in _flat(block) if self._select.search(f"{self.name}/{path}"))

    def stages(self, block: PyTree) -> list[tuple[str, ...]]:
        """Its kernels in the order in which they multiply, those of the same input together: query, key and value;
        output; gate and up; down."""
        log = _Log()
        flat = {path: _Watched(leaf, path, log) for path, leaf in _kernels(plain(block)).items()}
        tree = replace(block, flat)
        jax.eval_shape(
            lambda stream, place: through(self.block, tree, stream, place),
            self._streams[0],
            self._places[0],
        )
        wanted = set(self.paths(block))
        stages = [tuple(path for path in stage if path in wanted) for stage in log.stages]
        return [stage for stage in stages if stage]

    def grams(self, block: PyTree, paths: Sequence[str], accept_short: bool = False) -> dict[str, Gram]:
        """What some kernels of a block with the parameters `block` are multiplied with. Raises `UserError` as
        `collect_grams` does, for calibration data that is empty or too short."""
        if not paths:
            return {}
        block, sums = plain(block), None
        for stream, place in self.inputs():
            found = observe(self.block, tuple(paths), block, stream, place)
            sums = found if sums is None else add(sums, found)
        try:
            return checked(sums, accept_short)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def outputs(self, block: PyTree) -> list[Stream]:
        """What comes out of the block with the parameters `block`, batch by batch; the walk stays where it is."""
        block = plain(block)
        return [_run(self.block, block, stream, place) for stream, place in self.inputs()]

    def inputs(self) -> list[tuple[Stream, dict[str, jax.Array]]]:
        """What goes into the block, batch by batch, and the places of its tokens."""
        return list(zip(self._streams, self._places, strict=True))

    def advance(self, block: PyTree) -> None:
        """On to the next block, by what this one makes of its inputs with the parameters `block`."""
        self._streams = self.outputs(block)
        self.index += 1

    @property
    def block(self) -> nn.Module:
        """The module of the block."""
        return self._blocks[self.index % len(self._blocks)]


@dataclasses.dataclass
class Notes:
    """Lines that the user sees, equal ones of several kernels as one."""

    found: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, line: str, path: str) -> None:
        self.found.setdefault(line, []).append(path)

    def unseen(self, name: str, grams: Mapping[str, Gram]) -> None:
        """Says which experts saw fewer tokens than they have inputs, or none. name: of the block."""
        for path in short(grams):
            count = grams[path].count
            none, few = int((count == 0).sum()), int(((count > 0) & (count < grams[path].width)).sum())
            if none:
                self.add(f"{none} of {count.size} experts saw no token: rounded to nearest", f"{name}/{path}")
            if few:
                line = f"{few} of {count.size} experts saw fewer tokens than they have inputs: their Gram matrices are"
                self.add(f"{line} singular, and damped", f"{name}/{path}")

    def lines(self) -> list[str]:
        """A line each, with the first path and how many more."""

        def where(paths: list[str]) -> str:
            return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"

        return [f"{where(paths)}: {line}" for line, paths in self.found.items()]


def each(function: Callable[..., Any], *stacks: Any) -> Any:
    """`function` of every matrix of stacks [..., in, out], on the host, with what it returns stacked alike."""
    lead = stacks[0].shape[:-2]
    if not lead:
        return function(*stacks)
    flat = [stack.reshape(-1, *stack.shape[-2:]) for stack in stacks]
    found = [function(*parts) for parts in zip(*flat, strict=True)]
    return jax.tree.map(lambda *parts: np.stack(parts).reshape(*lead, *np.shape(parts[0])), *found)


@functools.partial(jax.jit, static_argnums=0)
def _enter(model: LayerStack, params: PyTree, place: Batch) -> Stream:
    x = model.apply({"params": params}, place["tokens"], method="embed")
    carrying = next((block for block in model.blocks if hasattr(block, "init_depth")), None)
    return Stream(x, None if carrying is None else carrying.init_depth(x))


@functools.partial(jax.jit, static_argnums=(0, 1))
def observe(
    block: nn.Module, paths: tuple[str, ...], params: PyTree, stream: Stream, place: Batch
) -> dict[str, Any]:
    """What kernels of a block see of one batch, for `research.training.observe.add` and `checked`."""
    run = lambda params: through(block, params, stream, place).x  # noqa: E731
    return observed(run, params, paths, real_tokens(place))


@functools.partial(jax.jit, static_argnums=0)
def _run(block: nn.Module, params: PyTree, stream: Stream, place: Batch) -> Stream:
    return through(block, params, stream, place)


def through(block: nn.Module, params: PyTree, stream: Stream, place: Batch) -> Stream:
    """A block by itself: the stream behind it."""
    positions = place.get("positions")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(place["tokens"].shape[1]), place["tokens"].shape)
    context = Context(positions, place.get("segments"))
    bound = nn.apply(lambda block: run_block(block, stream, context, None, "none")[0], block)
    return bound({"params": params})


class _Log:
    """Which kernels were multiplied, by the input they met, in that order."""

    def __init__(self) -> None:
        self.stages: list[list[str]] = []
        self._seen: set[str] = set()
        self._input: Any = None

    def note(self, path: str, x: Any) -> None:
        if path in self._seen:
            return
        self._seen.add(path)
        if x is not self._input:
            self.stages.append([])
        self._input = x
        self.stages[-1].append(path)


class _Watched(Wrapped):
    """A kernel that tells a log when it is multiplied."""

    path: str = struct.field(pytree_node=False)
    log: _Log = struct.field(pytree_node=False)

    def dot(self, x: jax.Array) -> jax.Array:
        self.log.note(self.path, x)
        return weights.dot(x, self.kernel)

    def materialize(self) -> jax.Array:
        return self.kernel

    def narrow(self, inputs: int | None, outputs: int | None) -> "_Watched":
        return self.replace(kernel=weights.narrow(self.kernel, inputs, outputs))


def _flat(tree: PyTree) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep="/")


def _kernels(block: PyTree) -> Kernels:
    return {
        path: leaf for path, leaf in _flat(block).items() if path.endswith("kernel") and "conv/" not in path
    }


def selected(params: PyTree, select: str) -> list[str]:
    """The paths of a tree that the pattern is found in. Raises `UserError` where there are none."""
    pattern = compile_pattern(select, "select")
    found = [path for path in _flat(params) if pattern.search(path)]
    if not found:
        raise UserError(f"select={select!r} is found in no path of the {len(_flat(params))} parameters")
    return found
