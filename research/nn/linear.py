"""Linear projection, embedding table: the two places where parameters are large."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn import weights
from research.nn.cpu_kernels import dense_product

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def parameter(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> weights.Kernel:
    """The parameter `name` of a module: what the tree holds, else a new float32 array of `shape`.

    Unlike `module.param` this accepts any value that the tree holds under the name: a structured weight, or
    an array narrower than the module's own configuration (a nested slice).
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


def check_sizes(module: nn.Module, *fields: str) -> None:
    """Raise `UserError` unless each of these fields that the module has is at least 1, or None."""
    for name in fields:
        size = vars(module).get(name)  # getattr would run `setup` in search of a field that is not there
        if size is not None and size < 1:
            raise UserError(f"{type(module).__name__}.{name} is {size}; it must be at least 1")


def check_softcap(module: nn.Module, field: str) -> None:
    """Raise `UserError` unless this field, where the module has it, is None or a positive number."""
    cap = vars(module).get(field)
    if cap is not None and not cap > 0:
        raise UserError(
            f"{type(module).__name__}.{field} is {cap}; it must be more than 0, or None for no cap"
        )


class Linear(nn.Module):
    """y = x W + b over the last axis, x [..., in] -> [..., features].

    The kernel is drawn from a truncated normal of variance `init_scale` / in. A kernel in the parameter tree
    may be structured or narrower than `features`.
    """

    features: int
    use_bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.parameters(x.shape[-1])
        y = weights.dot(x, kernel)
        return y if bias is None else y + bias.astype(y.dtype)

    def parameters(self, width: int) -> tuple[weights.Kernel, jax.Array | None]:
        """Kernel and bias for inputs of `width`, where subclasses multiply by parts of them."""
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        kernel = parameter(self, "kernel", init, (width, self.features))
        if kernel.shape[0] != width:
            path = "/".join(self.path)
            raise UserError(f"{path}/kernel takes {kernel.shape[0]} inputs, but its input is {width} wide")
        if not self.use_bias:
            return kernel, None
        return kernel, parameter(self, "bias", nn.initializers.zeros, (self.features,))


class Embedding(nn.Module):
    """Token embedding: ids int32[...] -> [..., width], times `multiplier` (Gemma: sqrt(width)).

    Parameters: table [vocab_size, width]; in a model made ready to decode also `head`, its transpose as a kernel.
    """

    vocab_size: int
    width: int
    multiplier: float = 1.0
    init_stddev: float = 0.02

    def setup(self) -> None:
        init = nn.initializers.normal(self.init_stddev)
        self.table = parameter(self, "table", init, (self.vocab_size, self.width))

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = jnp.take(self.table, ids, axis=0)
        return x if self.multiplier == 1.0 else x * jnp.asarray(self.multiplier, x.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Tied output head: x [..., width] -> float32 logits [..., vocab], without the multiplier."""
        if self.has_variable("params", "head"):
            return weights.dot(x, self.get_variable("params", "head")).astype(jnp.float32)
        return dense_product(x, self.table.astype(x.dtype), transposed=True)
