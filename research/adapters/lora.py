"""Low-rank adapters: a frozen kernel and a trained term of low rank (LoRA, arXiv 2106.09685), and what they begin with.

    y = x W' + scale (x down) up      W' [in, out] frozen; down [in, r], up [r, out] trained; scale = alpha / r

              W'                            down, up at the beginning
    LoRA      W, or W rounded (QLoRA)       drawn, 0
    PiSSA     W - scale down up             the r largest components of W (arXiv 2404.02948)
    LoftQ     W - scale down up, rounded    the r largest of what rounding leaves, in turns (arXiv 2310.08659)
    CorDA     W - scale down up             components by the inputs' Gram matrix: `corda`
    LQ-LoRA   W - scale down up, rounded    by Fisher, bits by an integer program: `lq_lora`

All go one way. `split` gives for every kernel its factors and what becomes of the kernel; `create` keeps of that what
the base's own parameters don't tell, `frozen` makes W' of both, `assemble` puts the sums into the tree.
Models never know.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from research.errors import UserError
from research.nn.dropout import Dropping
from research.nn.lowrank import Fit, alternate, low_rank
from research.nn.normal_float import quantize_normal
from research.nn.weights import Kernel, LowRank, Sum, Weight
from research.training.feed import Dataset
from research.training.paths import first_match

PyTree = Any

PROJECTIONS = (r"(query|key|value|output|gate|up|down)/kernel$",)
"""Every projection of attention and FFN; heads, embeddings and routers are left alone."""


@dataclasses.dataclass(frozen=True)
class Split:
    """What becomes of one kernel W [.., in, out].

    factors: what is trained. taken: W' is W less what they are at the beginning. kernel: W' itself, where it is neither
    that nor W.
    """

    factors: LowRank
    taken: bool = False
    kernel: Weight | None = None


class Adapter(Protocol):
    """What `AdapterTuning` trains beside a frozen base; static and hashable, built by a config.

    Parameters of a run are {"base": what the base's tree becomes, "fixed": what is saved and never trained,
    "adapter": what is trained}.
    """

    def create(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        """-> (fixed, adapter) for a base, on the host. Raises `UserError` for a base that it doesn't fit."""

    def draw(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        """As `create`, but at random and traceable: nothing is decomposed and no data is read."""

    def frozen(self, params: PyTree, fixed: PyTree) -> PyTree:
        """The tree "base" of a run, from the base's own parameters."""

    def check(self, model: nn.Module, params: PyTree, adapter: PyTree) -> None:
        """Raises `UserError` unless a saved adapter fits the base."""

    def model(self, model: nn.Module) -> nn.Module:
        """What runs in the place of the base's model."""

    def assemble(self, params: PyTree, key: jax.Array | None) -> PyTree:
        """The parameters of `model` in training; traced. key: of dropout, None where there is none."""

    def losses(self, params: PyTree) -> dict[str, jax.Array]:
        """What joins the loss of a step, f32[] each."""

    def remember(self, params: PyTree) -> PyTree:
        """The parameters after an update: steps are counted here."""

    def unpack(self, params: PyTree) -> PyTree:
        """The parameters of `model` as other programs read them."""

    def merge(self, model: nn.Module, params: PyTree) -> tuple[nn.Module, PyTree, str]:
        """(model, parameters, what was done) without any adapter, from the parameters of a run, on the host."""


class Quantizer(Protocol):
    """A way of rounding: a hashable function from a kernel [.., in, out] to the rounded one, traceable."""

    def __call__(self, kernel: jax.Array) -> Weight: ...


@dataclasses.dataclass(frozen=True)
class NormalQuantizer:
    """Kernels as NormalFloat of 2, 3 or 4 bits, as `quantize_normal` makes them (QLoRA, arXiv 2305.14314)."""

    bits: int = 4
    group: int = 64
    scale_block: int | None = 256

    def __call__(self, kernel: jax.Array) -> Weight:
        block = None if self.scale_block is None else min(self.scale_block, kernel.shape[-1])
        return quantize_normal(kernel, self.bits, min(self.group, kernel.shape[-2]), scale_block=block)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """LoRA: down is uniform in +-1 / sqrt(in), up is 0, so the model begins as it was.

    Args:
        rank: r.
        alpha: the term is multiplied by alpha / r; None: by 1.
        targets: patterns of kernel paths.
        dropout: rate on the inputs of the low-rank terms in training.
        quantizer: what the frozen kernels become (QLoRA); None: they stay.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = PROJECTIONS
    dropout: float = 0.0
    quantizer: Quantizer | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"rank={self.rank}: a low-rank term has at least rank 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout} is not in [0, 1)")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"alpha={self.alpha}: a positive number is expected")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else float(self.alpha) / self.rank

    def split(
        self, model: nn.Module, params: PyTree, kernels: Mapping[str, Kernel], key: jax.Array
    ) -> dict[str, Split]:
        """{path: what becomes of the kernel}. Subclasses are other beginnings."""
        return {
            path: Split(self.drawn(kernel, number, key), kernel=self.rounded(path, kernel))
            for number, (path, kernel) in enumerate(kernels.items())
        }

    def drawn(self, kernel: Kernel, number: int, key: jax.Array) -> LowRank:
        """Factors whose product is 0, for the kernel of that number."""
        *lead, inputs, outputs = kernel.shape
        bound = inputs**-0.5
        shape = (*lead, inputs, self.rank)
        down = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        return LowRank(down, jnp.zeros((*lead, self.rank, outputs), jnp.float32), self.scale)

    def rounded(self, path: str, kernel: Kernel) -> Weight | None:
        if self.quantizer is None:
            return None
        return compiled(self.quantizer)(jnp.asarray(as_array(path, kernel, "rounding")))[0]

    # The adapter

    def create(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        kernels = chosen_kernels(params, self.targets)
        check_rank(self.rank, kernels)
        return self._parts_of(self.split(model, params, kernels, key))

    def draw(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        kernels = chosen_kernels(params, self.targets)
        check_rank(self.rank, kernels)
        drawn = (self.drawn(kernel, number, key) for number, kernel in enumerate(kernels.values()))
        return self._parts_of({path: Split(factors) for path, factors in zip(kernels, drawn, strict=True)})

    def _parts_of(self, splits: Mapping[str, Split]) -> tuple[PyTree, PyTree]:
        fixed = {
            "origin": {path: split.factors for path, split in splits.items() if split.taken},
            "kernel": {path: split.kernel for path, split in splits.items() if split.kernel is not None},
        }
        adapter = {path: split.factors for path, split in splits.items()}
        return {name: tree(part) for name, part in fixed.items() if part}, tree(adapter)

    def frozen(self, params: PyTree, fixed: PyTree) -> PyTree:
        kernels = flat(params)
        for path, factors in flat(fixed.get("origin", {})).items():
            # As a difference: from the other components it would not give W back exactly.
            taken = factors.scale * (np.asarray(factors.down) @ np.asarray(factors.up))
            kernels[path] = jnp.asarray(np.asarray(kernels[path]) - taken)
        return tree(
            {path: kernel for path, kernel in kernels.items() if path not in flat(fixed.get("kernel", {}))}
        )

    def check(self, model: nn.Module, params: PyTree, adapter: PyTree) -> None:
        check_fit(params, flat(adapter))

    def model(self, model: nn.Module) -> nn.Module:
        return model

    def assemble(self, params: PyTree, key: jax.Array | None) -> PyTree:
        terms = flat(params["adapter"])
        if key is not None and self.dropout:
            terms = with_dropout(terms, self.dropout, key)
        return adapted({**flat(params["base"]), **flat(params["fixed"].get("kernel", {}))}, terms)

    def losses(self, params: PyTree) -> dict[str, jax.Array]:
        return {}

    def remember(self, params: PyTree) -> PyTree:
        return params

    def unpack(self, params: PyTree) -> PyTree:
        return self.assemble(params, None)

    def merge(self, model: nn.Module, params: PyTree) -> tuple[nn.Module, PyTree, str]:
        return model, *merge(self.unpack(params))


@dataclasses.dataclass(frozen=True)
class PiSSA(LoRA):
    """PiSSA (arXiv 2404.02948): the r largest singular components of W are trained, the rest is frozen."""

    def __post_init__(self):
        super().__post_init__()
        if self.quantizer is not None:
            raise UserError("PiSSA's frozen kernels are arrays; for rounded ones take LoftQ or LQLoRA")

    def split(
        self, model: nn.Module, params: PyTree, kernels: Mapping[str, Kernel], key: jax.Array
    ) -> dict[str, Split]:
        def top(path: str, kernel: Kernel) -> LowRank:
            array = as_array(path, kernel, type(self).__name__)
            return by_matrix(lambda w: scaled(low_rank(w, self.rank), self.scale), array)

        return {path: Split(top(path, kernel), taken=True) for path, kernel in kernels.items()}


@dataclasses.dataclass(frozen=True)
class LoftQ(LoRA):
    """LoftQ (arXiv 2310.08659): rounding, and the r largest components of what it leaves, in turns.

    steps: turns; the best is kept.
    """

    quantizer: Quantizer = NormalQuantizer()
    steps: int = 5

    def split(
        self, model: nn.Module, params: PyTree, kernels: Mapping[str, Kernel], key: jax.Array
    ) -> dict[str, Split]:
        def fitted(w: np.ndarray) -> tuple[Weight, LowRank]:
            rounded, fit, _ = in_turns(w, self.rank, self.quantizer, self.steps, first="quantized")
            return rounded, scaled(fit, self.scale)

        found = {path: by_matrix(fitted, as_array(path, kernel, "LoftQ")) for path, kernel in kernels.items()}
        return {path: Split(factors, kernel=kernel) for path, (kernel, factors) in found.items()}


# Trees


def flat(params: PyTree) -> dict[str, Any]:
    """{`/`-joined path: leaf}, a structured weight being a leaf."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def tree(leaves: Mapping[str, Any]) -> PyTree:
    """The inverse of `flat`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def chosen_kernels(params: PyTree, targets: tuple[str, ...]) -> dict[str, Kernel]:
    """{path: kernel} of the kernels in whose paths one of the patterns is found. Raises `UserError` for a pattern that
    is found in none."""
    kernels = {path: leaf for path, leaf in flat(params).items() if path.split("/")[-1] == "kernel"}
    found = first_match(list(kernels), targets, "adapter.targets")
    return {path: kernel for (path, kernel), i in zip(kernels.items(), found, strict=True) if i is not None}


def check_rank(rank: int, kernels: Mapping[str, Kernel]) -> None:
    """Raises `UserError` naming a kernel that has no such rank."""
    for path, kernel in kernels.items():
        if rank > min(kernel.shape[-2:]):
            inputs, outputs = kernel.shape[-2:]
            raise UserError(
                f"rank={rank}: {path} is {inputs} by {outputs} and has ranks 1 to {min(inputs, outputs)}"
            )


def check_fit(params: PyTree, terms: Mapping[str, Kernel]) -> None:
    """Raises `UserError` unless every term has a kernel of its shape."""
    kernels = flat(params)
    for path, term in terms.items():
        if path not in kernels:
            raise UserError(f"the adapter does not fit the base: it has no {path}")
        if tuple(kernels[path].shape) != tuple(term.shape):
            here, there = tuple(kernels[path].shape), tuple(term.shape)
            raise UserError(
                f"the adapter does not fit the base: {path} is {here} there and {there} in the adapter"
            )


def adapted(kernels: Mapping[str, Any], terms: Mapping[str, Kernel]) -> PyTree:
    """The tree of `kernels` with each of `terms` added to the kernel of its path."""
    return tree({**kernels, **{path: Sum((kernels[path], term)) for path, term in terms.items()}})


def merge(params: PyTree) -> tuple[PyTree, str]:
    """The tree with every adapted kernel multiplied out, W' + scale down up in float32, and what that means."""
    leaves = flat(params)
    sums = {path: kernel for path, kernel in leaves.items() if isinstance(kernel, Sum)}
    rounded = [path for path, kernel in sums.items() if isinstance(kernel.terms[0], Weight)]
    merged = tree({**leaves, **{path: kernel.materialize() for path, kernel in sums.items()}})
    if not rounded:
        return merged, f"{len(sums)} kernels merged"
    return merged, (
        f"{len(sums)} kernels merged; {len(rounded)} of them were frozen in fewer bits and are arrays now, "
        "since a rounded kernel and a low-rank term have no sum in those bits"
    )


def as_array(path: str, kernel: Kernel, what: str) -> np.ndarray:
    """The kernel, which must be an array."""
    if isinstance(kernel, Weight):
        raise UserError(
            f"{what} decomposes arrays, and {path} is {type(kernel).__name__}: take LoRA, which leaves its base alone"
        )
    return np.asarray(kernel)


# Decompositions on the host


def calibration(data: Dataset, rows: int, batch_size: int = 8) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the first `rows` records. Raises `UserError` where there are fewer, or none are asked for."""
    if not 1 <= rows <= len(data):
        raise UserError(f"samples={rows}: the calibration data has 1 to {len(data)} rows to give")
    batch_size = min(batch_size, rows)
    return itertools.islice(data.batches(0, batch_size), rows // batch_size)


def by_matrix(fit: Callable[..., PyTree], *arrays: np.ndarray) -> PyTree:
    """`fit` of every matrix of stacks [.., in, out], its results stacked alike."""
    lead = arrays[0].shape[:-2]
    if not lead:
        return fit(*arrays)
    found = [fit(*(array[index] for array in arrays)) for index in np.ndindex(lead)]
    return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*lead, *parts[0].shape), *found)


def scaled(fit: Fit, scale: float) -> LowRank:
    """Factors that make the fit's product with a scale in front: each is divided by the scale's root."""
    return LowRank(*(jnp.asarray(part / np.sqrt(scale), jnp.float32) for part in (fit.down, fit.up)), scale)


def in_turns(
    w: np.ndarray, rank: int, quantizer: Quantizer, steps: int, **keywords: Any
) -> tuple[Weight, Fit, list[float]]:
    """`alternate`, with the rounded weight itself in the place of its values."""
    made: list[tuple[np.ndarray, Weight]] = []

    def quantize(rest: np.ndarray) -> np.ndarray:
        weight, values = compiled(quantizer)(jnp.asarray(rest, jnp.float32))
        made.append((np.asarray(values, np.float64), weight))
        return made[-1][0]

    values, fit, errors = alternate(w, rank, quantize, steps, **keywords)
    return next(weight for found, weight in made if found is values), fit, errors


@functools.cache
def compiled(quantizer: Quantizer) -> Callable[[jax.Array], tuple[Weight, jax.Array]]:
    """w -> (its rounding, that one's values)."""

    def both(w: jax.Array) -> tuple[Weight, jax.Array]:
        weight = quantizer(w)
        return weight, weight.materialize()

    return jax.jit(both)


# Dropout


def keys_like(key: jax.Array, number: int, shape: tuple[int, ...]) -> jax.Array:
    """Keys of the kernel of that number: one, or one for each of a stack [.., in, out]."""
    own = jax.random.fold_in(key, number)
    return jax.random.split(own, shape[:-2]) if shape[:-2] else own


def with_dropout(terms: Mapping[str, LowRank], rate: float, key: jax.Array) -> dict[str, Dropping]:
    """The terms, each with keys of its own."""
    return {
        path: Dropping(term, keys_like(key, number, term.shape), rate)
        for number, (path, term) in enumerate(terms.items())
    }
