"""Feed-forward layers.

Any module with the signature x [..., width] -> [..., width] serves as an FFN. One that must know where its tokens
are (which are padding, what belongs to which sequence) sets the class attribute `takes_context = True` and is
called with (x, context).
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.silu_product import silu_product
from research.nn.attention import Context
from research.nn.cpu_kernels import trained_by
from research.nn.linear import Linear, check_sizes

_LARGE = 1 << 14  # numbers from where on a kernel pays

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu_squared": lambda x: jnp.square(nn.relu(x)),
}


def gated(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) * up, of one shape; training on a CPU takes the kernel for silu."""

    def plain(gate: jax.Array, up: jax.Array) -> jax.Array:
        return ACTIVATIONS[activation](gate) * up

    suits = activation == "silu" and gate.size >= _LARGE and gate.dtype == up.dtype == jnp.float32
    return (trained_by(silu_product, plain) if suits else plain)(gate, up)


def feed_forward(mlp: nn.Module, x: jax.Array, context: Context) -> jax.Array:
    """x [B, T, width] or [B * T, width] through any FFN."""
    return mlp(x, context) if getattr(mlp, "takes_context", False) else mlp(x)


class MLP(nn.Module):
    """act(x W_up + b) W_down + b, with `hidden_dim` units."""

    hidden_dim: int
    activation: Activation = "gelu"
    use_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "hidden_dim")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(self.hidden_dim, self.use_bias, name="up")(x)
        return Linear(x.shape[-1], self.use_bias, name="down")(ACTIVATIONS[self.activation](hidden))


class GatedMLP(nn.Module):
    """(act(x W_gate) * x W_up) W_down (GLU variants, arXiv 2002.05202), with `hidden_dim` units.

    Where the tree holds one fused kernel `gate_up` [width, 2 hidden] (`research.nn.fuse`) it is used instead.
    """

    hidden_dim: int
    activation: Activation = "silu"
    use_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "hidden_dim")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if "gate_up" in self.variables.get("params", {}):
            both = Linear(2 * self.hidden_dim, self.use_bias, name="gate_up")(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = Linear(self.hidden_dim, self.use_bias, name="gate")(x)
            up = Linear(self.hidden_dim, self.use_bias, name="up")(x)
        return Linear(x.shape[-1], self.use_bias, name="down")(gated(self.activation, gate, up))
