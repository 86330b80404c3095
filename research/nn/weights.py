"""A weight is a value that knows how to multiply.

Every projection of every model multiplies through `dot(x, kernel)`. The kernel is an array [in, out] or a
*structured weight*: a pytree with the contract of `Weight`. Compression, adapters and nesting replace kernels
in the parameter tree by such values and the models never know.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import UserError
from research.nn.cpu_kernels import dense_product

# What the last dimensions of an array are divided by: axes of a mesh, see research.training.partitioning.
Spec = tuple[Any, ...]


@runtime_checkable
class Weight(Protocol):
    """A structured kernel of logical shape [in, out]. Implementations are registered pytrees."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, [in, out]."""

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that `materialize` returns."""

    def dot(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out] in the dtype of x, with float32 accumulation."""

    def materialize(self) -> jax.Array:
        """The kernel as one array [in, out]."""

    def narrow(self, inputs: int | None, outputs: int | None) -> "Kernel":
        """The kernel of the first `inputs` inputs and `outputs` outputs (None: all), really smaller.

        Stacked kernels [layers, in, out] are cut alike.
        """


@runtime_checkable
class StoredWeight(Weight, Protocol):
    """A structured kernel that parameter trees keep; a wrapper that only lives while a model runs is no such."""

    @property
    def size(self) -> int:
        """Numbers that are stored, a packed code being one."""

    def stored_bits(self) -> int:
        """Bits of everything that is stored: what the leaves take in memory, counted from what they mean."""

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        """How the leaves are divided, in their order, where the kernel is divided by `spec` (not empty, of its last
        dimensions)."""


Kernel = jax.Array | Weight


def dot(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x [..., in] times a kernel [in, out] -> [..., out] in the dtype of x, accumulated in float32."""
    if isinstance(kernel, Weight):
        return kernel.dot(x)
    return dense_product(x, kernel.astype(x.dtype)).astype(x.dtype)


def materialize(kernel: Kernel) -> jax.Array:
    """The kernel as a plain array [in, out]."""
    return kernel.materialize() if isinstance(kernel, Weight) else kernel


def narrow(kernel: Kernel, inputs: int | None = None, outputs: int | None = None) -> Kernel:
    """The first `inputs` rows and `outputs` columns of a kernel [..., in, out]; None keeps all."""
    if isinstance(kernel, Weight):
        return kernel.narrow(inputs, outputs)
    return kernel[..., :inputs, :outputs]


def array_bits(array: jax.Array) -> int:
    """Bits that an array (or its shape) takes."""
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize * 8


def stored_bits(tree: Any) -> int:
    """Bits of all arrays and structured weights of a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, StoredWeight))
    return sum(leaf.stored_bits() if isinstance(leaf, StoredWeight) else array_bits(leaf) for leaf in leaves)


class Wrapped(struct.PyTreeNode):
    """Base of what stands in the place of a kernel, stored or while a model runs: with its shape and dtype."""

    kernel: Kernel

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel.dtype


class LowRank(struct.PyTreeNode):
    """Scale times the product of two thin matrices, down [in, rank] times up [rank, out]: arrays, or structured."""

    down: Kernel
    up: Kernel
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.down.shape[:-1], self.up.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        return self.down.dtype

    def dot(self, x: jax.Array) -> jax.Array:
        y = dot(dot(x, self.down), self.up)
        return y if self.scale == 1.0 else y * jnp.asarray(self.scale, y.dtype)

    def materialize(self) -> jax.Array:
        product = materialize(self.down) @ materialize(self.up)
        return product if self.scale == 1.0 else product * jnp.asarray(self.scale, product.dtype)

    def narrow(self, inputs: int | None, outputs: int | None) -> "LowRank":
        return self.replace(down=narrow(self.down, inputs, None), up=narrow(self.up, None, outputs))

    def check(self) -> None:
        """Raise `UserError` unless the parts belong together."""
        down, up = self.down.shape, self.up.shape
        if len(down) < 2 or down[:-2] != up[:-2] or down[-1] != up[-2]:
            raise UserError(f"{tuple(down)} times {tuple(up)} is no product of two thin matrices")
        if type(self.scale) is not float or not math.isfinite(self.scale):
            raise UserError(f"scale={self.scale!r} is no finite number")

    @property
    def size(self) -> int:
        return self.down.size + self.up.size

    def stored_bits(self) -> int:
        return stored_bits((self.down, self.up))

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        # The rank is divided by nothing.
        lead, outputs = spec[:-2], spec[-1]
        inputs = spec[-2] if len(spec) > 1 else None
        return [
            *_leaf_specs(self.down, (*lead, inputs, None)),
            *_leaf_specs(self.up, (*lead, None, outputs)),
        ]


class Sum(struct.PyTreeNode):
    """The sum of several kernels of one shape, such as a base plus a low-rank correction."""

    terms: tuple[Kernel, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.terms[0].dtype

    def dot(self, x: jax.Array) -> jax.Array:
        return sum(dot(x, term) for term in self.terms[1:]) + dot(x, self.terms[0])

    def materialize(self) -> jax.Array:
        return sum(materialize(term) for term in self.terms[1:]) + materialize(self.terms[0])

    def narrow(self, inputs: int | None, outputs: int | None) -> "Sum":
        return Sum(tuple(narrow(term, inputs, outputs) for term in self.terms))

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)

    def stored_bits(self) -> int:
        return stored_bits(self.terms)

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        return [leaf for term in self.terms for leaf in _leaf_specs(term, spec)]


class Permuted(Wrapped):
    """A kernel whose inputs lie in another order: its input i is input order[i] of the layer. Of groups that are put
    together by importance it is all that holds them (GPTQ's act-order).

    order: whole numbers [..., in], a permutation for each matrix of a stack.
    """

    order: jax.Array

    def dot(self, x: jax.Array) -> jax.Array:
        return dot(jnp.take(x, self.order, axis=-1), self.kernel)

    def materialize(self) -> jax.Array:
        place = jnp.argsort(self.order, axis=-1)
        return jnp.take_along_axis(materialize(self.kernel), place[..., None], axis=-2)

    def narrow(self, inputs: int | None, outputs: int | None) -> "Permuted":
        if inputs is not None and inputs != self.shape[-2]:
            raise UserError(
                f"the first {inputs} of {self.shape[-2]} inputs lie scattered (act-order): materialize the kernel first"
            )
        return self.replace(kernel=narrow(self.kernel, None, outputs))

    def check(self) -> None:
        """Raise `UserError` unless the parts belong together."""
        if self.order.shape != self.shape[:-1] or not jnp.issubdtype(self.order.dtype, jnp.integer):
            order = f"{self.order.dtype}{list(self.order.shape)}"
            raise UserError(f"{order} is no order of the inputs of a kernel {list(self.shape)}")

    @property
    def size(self) -> int:
        return self.kernel.size + self.order.size

    def stored_bits(self) -> int:
        return stored_bits(self.kernel) + array_bits(self.order)

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        return [*_leaf_specs(self.kernel, spec), (*spec[:-2], None)]


def _leaf_specs(kernel: Kernel, spec: Spec) -> list[Spec]:
    return kernel.leaf_specs(spec) if isinstance(kernel, StoredWeight) else [spec]
