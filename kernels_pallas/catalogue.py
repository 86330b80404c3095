"""Every kernel with the sizes it is meant for: what `make aot` compiles and `experiments.bench kernels` measures.

A kernel's folder has an `entry.py` that defines `KERNEL`, or several as a tuple; its name is added to `FOLDERS` here.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import Implementation

FOLDERS = (
    "tree_attention",
    "ssd",
    "quantized_matmul",
    "grouped_matmul",
    "span_attention",
    "decode_attention",
    "topk_attention",
    "chosen_attention",
    "qmoe_decode",
    "matmul",
    "skinny_matmul",
    "rms_norm",
    "cross_entropy",
    "silu_product",
    "append_rows",
)


class Cost(NamedTuple):
    """FLOPs that the result needs, and bytes that must travel between a device and its memory at least: every operand
    that is read, once, and every result, once."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: the sizes that `Kernel.make` takes, `dtype` among them, and the options of the function.

    gradient: the call is followed by its gradient, with respect to every floating argument that has one.
    """

    name: str
    kind: Literal["decode", "prefill", "training", "small"]
    sizes: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gradient: bool = False

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.name}" + (", with gradient" if self.gradient else "")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, as its users call it, and what is known about its work.

    function: called as function(*arguments, implementation=..., **options); returns an array or a tree of them.
    reference: the same in plain jnp, called as reference(*arguments, **options).
    make: make(key, **sizes) -> the arguments, random but valid; under `jax.eval_shape` their shapes alone.
    cost: of a case, with its gradient where the case has one.
    cases: sizes of real models.
    small: a size for a CPU, where the reference stands in.
    implementations: the kernels that there are.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., tuple[Any, ...]]
    cost: Callable[[Case], Cost]
    cases: tuple[Case, ...]
    small: Case
    implementations: tuple[Implementation, ...] = ("tpu", "gpu")

    def shapes(self, case: Case) -> tuple[Any, ...]:
        """The arguments as shapes and dtypes."""
        return jax.eval_shape(lambda key: self.make(key, **case.sizes), jax.random.key(0))

    def call(self, case: Case, implementation: Implementation) -> Callable[..., Any]:
        """What a case runs, a function of the arguments: the kernel, or the gradients of its outputs' sum of squares
        with respect to the floating arguments."""

        def run(*arguments: Any) -> Any:
            if implementation == "reference":
                return self.reference(*arguments, **case.options)
            return self.function(*arguments, implementation=implementation, **case.options)

        if not case.gradient:
            return run

        def gradients(*arguments: Any) -> list[jax.Array]:
            leaves, structure = jax.tree.flatten(arguments)
            places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

            def loss(floating: list[jax.Array]) -> jax.Array:
                filled = list(leaves)
                for place, leaf in zip(places, floating, strict=True):
                    filled[place] = leaf
                outputs = jax.tree.leaves(run(*structure.unflatten(filled)))
                return sum(jnp.sum(jnp.square(out.astype(jnp.float32))) for out in outputs)

            return jax.grad(loss)([leaves[place] for place in places])

        return gradients


def kernels() -> tuple[Kernel, ...]:
    """All entries, in the order of `FOLDERS`."""
    found = (importlib.import_module(f"kernels_pallas.{name}.entry").KERNEL for name in FOLDERS)
    return tuple(kernel for entry in found for kernel in (entry if isinstance(entry, tuple) else (entry,)))
