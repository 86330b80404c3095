"""What a decoding step reads of the cache, counted in the traced program.

    bytes = cache_bytes(model, params, cache)

Counting follows the cache's arrays through the program's operations: one that gathers or slices reads what it gives,
any other (a product) all of its operand, and mere views nothing. It is the program without kernels for a CPU, of which
a trace does not tell what they read. Nothing is run.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from research.nn.cache import Cache
from research.nn.cpu_kernels import without_cpu_kernels

# A dtype conversion is fused into whatever reads its result.
_VIEWS = (
    "reshape",
    "transpose",
    "convert_element_type",
    "squeeze",
    "expand_dims",
    "copy",
    "broadcast_in_dim",
)
_PARTIAL = ("gather", "dynamic_slice", "slice")


def cache_bytes(model: Any, params: Any, cache: Cache, tokens: int = 1) -> int:
    """Bytes that one `extend` of so many tokens a row reads of keys, values and whatever else is cached in floats.

    cache: an empty one, or the shapes of one (`jax.eval_shape`). Where an array is read in several places, as heads
    that share keys do when each gathers its own, every reading counts.
    """
    batch = cache.length.shape[0]
    leaves, treedef = jax.tree.flatten(cache)

    def step(*leaves: jax.Array) -> jax.Array:
        given = jnp.zeros((batch, tokens), jnp.int32)
        arguments = ({"params": params}, given, jax.tree.unflatten(treedef, leaves))
        return model.apply(*arguments, method="extend")[0]

    with without_cpu_kernels():
        traced = jax.make_jaxpr(step)(*leaves).jaxpr
    sizes = [
        leaf.dtype.itemsize if jnp.issubdtype(leaf.dtype, jnp.floating) else 0 for leaf in leaves
    ]  # of what is followed
    return _read(traced, sizes)[0]


def _read(program: Jaxpr, sizes: Sequence[int]) -> tuple[int, list[int]]:
    """sizes: of each input the bytes of an element where it is the cache's, else 0. -> bytes read, sizes of outputs."""
    followed = {var: size for var, size in zip(program.invars, sizes, strict=True) if size}
    total = 0

    def size_of(var: Any) -> int:
        return followed.get(var, 0) if isinstance(var, Var) else 0

    for equation in program.eqns:
        inputs = [size_of(var) for var in equation.invars]
        if not any(inputs):
            continue
        inner = next((x for x in equation.params.values() if isinstance(x, Jaxpr | ClosedJaxpr)), None)
        if inner is not None:
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            read, outputs = _read(inner, inputs)
            total += read
            followed |= {var: size for var, size in zip(equation.outvars, outputs, strict=True) if size}
        elif equation.primitive.name in _VIEWS:
            followed[equation.outvars[0]] = inputs[0]
        elif equation.primitive.name in _PARTIAL:
            total += equation.outvars[0].aval.size * inputs[0]
        else:
            total += sum(
                var.aval.size * size for var, size in zip(equation.invars, inputs, strict=True) if size
            )
    return total, [size_of(var) for var in program.outvars]
