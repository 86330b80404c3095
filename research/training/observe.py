"""What the layers of a model see: Gram matrices of their inputs, and the empirical Fisher of their kernels.

The model is not edited. A structured kernel (`Tapped`) stands in the place of each kernel and multiplies as it does; in
the derivative of the model's output it gives X^T X as the cotangent of an input that is zero. So all that carries a
kernel to its product carries the Gram matrix back: scanned layers stack it, a grouped product splits it by experts,
each with its own tokens alone. The cotangent of a Gram matrix does not depend on any other cotangent: the compiler
drops the rest of the backward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from research.errors import UserError
from research.nn import weights
from research.nn.weights import Weight, Wrapped
from research.training.paths import is_stacked
from research.training.task import cross_entropy

PyTree = Any
Batch = Mapping[str, np.ndarray]

PLACES = ("tokens", "segments", "positions")  # what a model is given of a batch


class Tap(struct.PyTreeNode):
    """Zeros whose cotangents are what is observed: gram float32[..., in, in], magnitude [..., in] and count [...]."""

    gram: jax.Array
    magnitude: jax.Array
    count: jax.Array


class Tapped(Wrapped):
    """A kernel that multiplies as `kernel` does and whose `tap` has the inputs' Gram matrix as its cotangent.

    mask: bool [..., B, T], the tokens that are observed of [B, T] or flat inputs; None for experts, whose rows are
    tokens of their own.
    """

    tap: Tap
    mask: jax.Array | None
    path: str = struct.field(pytree_node=False)

    def dot(self, x: jax.Array) -> jax.Array:
        rows = x.shape[:-1]
        if self.mask is None:
            mask = jnp.ones(rows, bool)
        elif math.prod(rows) == self.mask.size:
            mask = self.mask.reshape(rows)
        else:
            raise UserError(
                f"{self.path} multiplies {math.prod(rows)} rows of {self.mask.size} tokens: which rows are padding "
                "is not known, so it can't be observed; leave it out"
            )
        return weights.dot(_observed(x, self.tap, mask), self.kernel)

    def materialize(self) -> jax.Array:
        raise UserError(f"{self.path} is not multiplied through `dot`, so it can't be observed; leave it out")

    def narrow(self, inputs: int | None, outputs: int | None) -> "Tapped":
        gram, magnitude = self.tap.gram[..., :inputs, :inputs], self.tap.magnitude[..., :inputs]
        tap = self.tap.replace(gram=gram, magnitude=magnitude)
        return self.replace(kernel=weights.narrow(self.kernel, inputs, outputs), tap=tap)


@jax.custom_vjp
def _observed(x: jax.Array, tap: Tap, mask: jax.Array) -> jax.Array:
    """x [..., in] itself. The cotangent of the tap is the Gram matrix of its rows where mask [...] says so."""
    return x


def _observed_forward(x: jax.Array, tap: Tap, mask: jax.Array) -> tuple[jax.Array, Any]:
    return x, (x, mask)


def _observed_backward(saved: Any, cotangent: jax.Array) -> tuple[jax.Array, Tap, None]:
    x, mask = saved
    x = jnp.where(mask[..., None], x, 0).reshape(-1, x.shape[-1])
    contract = (((0,), (0,)), ((), ()))
    gram = jax.lax.dot_general(
        x, x, contract, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    magnitude = jnp.sum(jnp.abs(x), axis=0, dtype=jnp.float32)
    return cotangent, Tap(gram, magnitude, jnp.sum(jnp.any(x != 0, axis=-1), dtype=jnp.float32)), None


_observed.defvjp(_observed_forward, _observed_backward)


@dataclasses.dataclass(frozen=True, eq=False)
class Gram:
    """The inputs of one kernel.

    total float32[..., in, in]: X^T X summed over tokens, not centred. count float32[...]: tokens that were not 0
    throughout. magnitude float32[..., in]: |X| summed over tokens, where it was observed. The leading axes are those of
    the kernel, over layers of a scanned model and over experts. Kernels of the same inputs have the same object.
    """

    total: np.ndarray
    count: np.ndarray
    magnitude: np.ndarray | None = None

    @property
    def width(self) -> int:
        return self.total.shape[-1]

    def mean(self) -> np.ndarray:
        """float64[..., in, in]: X^T X / tokens; 0 where there were none."""
        return self.total.astype(np.float64) / np.maximum(self.count, 1.0)[..., None, None]


def kernel_paths(params: PyTree, select: Callable[[str], bool] = lambda path: True) -> tuple[str, ...]:
    """The `/`-joined paths of the kernels that `select` takes, of all but those of depthwise convolutions, which no
    input is multiplied by as a whole. Raises UserError where it takes none."""
    names = {path: path.split("/") for path in traverse_util.flatten_dict(dict(params), sep="/")}
    found = tuple(path for path, parts in names.items() if parts[-1] == "kernel" and "conv" not in parts)
    chosen = tuple(path for path in found if select(path))
    if not chosen:
        raise UserError(f"no kernel is selected of the {len(found)} that there are; the first is {found[:1]}")
    return chosen


def collect_grams(
    model: nn.Module,
    params: PyTree,
    batches: Iterable[Batch],
    select: Callable[[str], bool] = lambda path: True,
    accept_short: bool = False,
    tell: Callable[[int], None] = lambda batches: None,
) -> dict[str, Gram]:
    """{path of a kernel: its `Gram`} over language batches: tokens int32[B, T], and segments and positions where a
    batch has them. Padding (segment 0) is left out.

    Experts are given all their tokens, also where the model would drop some. Compiled once for each shape of batch,
    summed in float32 on the device. tell(n): after n batches.

    Raises:
        UserError: there is no token; a kernel's inputs never arrive, or aren't finite; or, unless `accept_short`, a
            kernel has more inputs than there were tokens. Of experts that is not an error: `short` lists them.
    """
    paths, model = kernel_paths(params, select), dropping_nothing(model)
    sums = None
    for seen, batch in enumerate(batches, start=1):
        batch = {name: batch[name] for name in PLACES if name in batch}
        found = _grams(model, paths, params, batch)
        sums = found if sums is None else add(sums, found)
        tell(seen)
    return checked(sums, accept_short)


def checked(sums: dict[str, Tap] | None, accept_short: bool) -> dict[str, Gram]:
    """What was summed over all batches, on the host. Raises `UserError` as `collect_grams` does."""
    if sums is None:
        raise UserError("the calibration data is empty: it has no batch")
    grams = {path: Gram(*map(np.asarray, (tap.gram, tap.count, tap.magnitude))) for path, tap in sums.items()}
    if not any(gram.count.any() for gram in grams.values()):
        raise UserError("the calibration data is empty: all its tokens are padding")
    for path, gram in grams.items():
        if not gram.count.any():
            raise UserError(
                f"{path}: no inputs were observed; its output does not reach that of the model. Leave it out"
            )
        if not np.isfinite(gram.total).all():
            raise UserError(f"{path}: its inputs are not finite; are the parameters?")
    if not accept_short:
        for path, tokens in short(grams).items():
            if not _is_expert(path, grams[path].total.ndim):
                raise UserError(_too_short(path, tokens, grams[path].width))
    return _shared(grams)


def short(grams: Mapping[str, Gram]) -> dict[str, int]:
    """{path: tokens of the layer or expert that saw fewest} of the kernels that saw fewer tokens than they have
    inputs. Their Gram matrices are singular, see `collect_grams`."""
    least = {path: int(gram.count.min()) for path, gram in grams.items()}
    return {path: count for path, count in least.items() if count < grams[path].width}


def collect_fisher(
    model: nn.Module,
    params: PyTree,
    batches: Iterable[Batch],
    select: Callable[[str], bool] = lambda path: True,
    tell: Callable[[int], None] = lambda batches: None,
) -> dict[str, np.ndarray]:
    """{path of a kernel: its diagonal empirical Fisher, float32 of its shape}: squares of the gradient of a row's loss,
    summed over the rows of language batches. A row's loss is the mean nats of its targets with weight.

    Squared row by row: the square of a batch's gradient would be another thing. tell(n): after n batches.

    Raises:
        UserError: there is no target; a kernel is not an array; a gradient is not finite, or 0 throughout a kernel.
    """
    paths, model = kernel_paths(params, select), dropping_nothing(model)
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    for path in paths:
        if isinstance(flat[path], Weight):
            raise UserError(
                f"{path} is {type(flat[path]).__name__}: the Fisher is of kernels that are arrays"
            )
    names = ("tokens", "targets", "weights", "segments", "positions")
    sums, weight = None, 0.0
    for seen, batch in enumerate(batches, start=1):
        found = _fisher(model, paths, params, {name: batch[name] for name in names if name in batch})
        sums = found if sums is None else add(sums, found)
        weight += float(np.sum(batch["weights"]))
        tell(seen)
    if not weight > 0:
        raise UserError("the calibration data is empty: it has no target with weight")
    fisher = {path: np.asarray(value) for path, value in sums.items()}
    for path, value in fisher.items():
        if not np.isfinite(value).all() or not value.any():
            raise UserError(f"{path}: its gradient is {'0' if not value.any() else 'not finite'}")
    return fisher


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grams(model: nn.Module, paths: tuple[str, ...], params: PyTree, batch: Batch) -> dict[str, Tap]:
    return observed(lambda params: _logits(model, params, batch), params, paths, real_tokens(batch))


def observed(
    run: Callable[[PyTree], jax.Array], params: PyTree, paths: tuple[str, ...], mask: jax.Array
) -> dict[str, Tap]:
    """{path: `Tap` of what the kernel there is multiplied with} in `run(params)`, whose output nobody computes.

    mask bool[B, T]: the tokens that count.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    taps = {path: _zero_tap(flat[path].shape) for path in paths}

    def output(taps: dict[str, Tap]) -> jax.Array:
        tapped = dict(flat)
        for path, tap in taps.items():
            shape = flat[path].shape
            own = None if _is_expert(path, len(shape)) else jnp.broadcast_to(mask, shape[:-2] + mask.shape)
            tapped[path] = Tapped(flat[path], tap, own, path)
        return jnp.sum(run(traverse_util.unflatten_dict(tapped, sep="/")))

    return jax.grad(output)(taps)


def real_tokens(batch: Batch) -> jax.Array:
    """bool[B, T]: the tokens of a batch that are not padding."""
    return batch["segments"] > 0 if "segments" in batch else jnp.ones(batch["tokens"].shape, bool)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fisher(model: nn.Module, paths: tuple[str, ...], params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    chosen = {path: flat[path] for path in paths}

    def loss(chosen: dict[str, jax.Array], row: Batch) -> jax.Array:
        logits = _logits(model, traverse_util.unflatten_dict(flat | chosen, sep="/"), row)
        nats, _, _ = cross_entropy(logits.reshape(-1, logits.shape[-1]), row["targets"].reshape(-1))
        weight = row["weights"].reshape(-1)
        return jnp.sum(nats * weight) / jnp.maximum(jnp.sum(weight), 1.0)

    def add(sums: dict[str, jax.Array], row: Batch) -> tuple[dict[str, jax.Array], None]:
        gradient = jax.grad(loss)(chosen, jax.tree.map(lambda x: x[None], row))
        return jax.tree.map(lambda s, g: s + jnp.square(g.astype(jnp.float32)), sums, gradient), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), chosen)
    return jax.lax.scan(add, zeros, dict(batch))[0]


@functools.partial(jax.jit, donate_argnums=0)
def add(sums: PyTree, found: PyTree) -> PyTree:
    """Their sums, in the memory of the first."""
    return jax.tree.map(jnp.add, sums, found)


def _logits(model: nn.Module, params: PyTree, batch: Batch) -> jax.Array:
    places = {name: batch[name] for name in ("segments", "positions") if name in batch}
    return model.apply({"params": params}, batch["tokens"], **places)


def _zero_tap(shape: tuple[int, ...]) -> Tap:
    return Tap(jnp.zeros((*shape[:-2], shape[-2], shape[-2])), jnp.zeros(shape[:-1]), jnp.zeros(shape[:-2]))


def _is_expert(path: str, axes: int) -> bool:
    """Whether a kernel has an axis of experts, beside that of scanned layers."""
    return axes > 2 + is_stacked(path)


def dropping_nothing(module: Any) -> Any:
    """The module with every dispatch of tokens to experts "sorted": no expert sees tokens that aren't its own, as the
    slots of other backends would make it, and every one sees all its tokens."""
    if isinstance(module, tuple):
        return tuple(dropping_nothing(part) for part in module)
    if not isinstance(module, nn.Module):
        return module
    names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    values = {name: getattr(module, name) for name in names}
    changed = {name: dropping_nothing(value) for name, value in values.items()}
    if "dispatch" in changed:
        sorted_ = {"dispatch": "sorted", "capacity_factor": None, "grouped_dot": None}
        changed |= {name: value for name, value in sorted_.items() if name in changed}
    changed = {name: value for name, value in changed.items() if value is not values[name]}
    return module.clone(**changed) if changed else module


def _shared(grams: dict[str, Gram]) -> dict[str, Gram]:
    """The same object for kernels of one module whose inputs are the same: equal bit for bit over all tokens."""
    found: dict[str, list[Gram]] = {}
    result = {}
    for path, gram in grams.items():
        siblings = found.setdefault(path.rsplit("/", 2)[0] if path.count("/") > 1 else "", [])
        same = next((other for other in siblings if np.array_equal(other.total, gram.total)), None)
        if same is None:
            siblings.append(gram)
        result[path] = gram if same is None else same
    return result


def _too_short(path: str, tokens: int, width: int) -> str:
    return (
        f"calibration data too short: {path} has {width} inputs and saw {tokens} tokens, so its Gram matrix is "
        f"singular in at least {width - tokens} directions. Damping would make up for them as if inputs there were "
        f"small and unrelated, and weights would be rounded to nearest; use several times {width} tokens, or accept "
        "that"
    )
