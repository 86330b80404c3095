"""Modules called under jit, every program compiled once in a process; parameters that need no program.

`module.apply(...)` alone compiles each of its operations apart, and `jax.jit(module.apply)(...)` compiles anew at every
call: the bound method is another object each time. Here the module is a static argument, and equal modules share.
Drawing parameters by `module.init` takes longer to compile than anything else that a small model does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def call(module: Any, params: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
    """`module.apply({"params": params}, *args, method=method, **kwargs)`; all arguments are arrays or trees of them."""
    return module.apply({"params": params}, *args, method=method, **kwargs)


def drawn(module: Any, *args: Any, seed: int = 0) -> Any:
    """Parameters of a module for arguments like these, see `drawn_like`."""
    return drawn_like(lambda: module.init(jax.random.key(0), *args)["params"], seed)


def drawn_like(init: Callable[[], Any], seed: int = 0) -> Any:
    """A tree of the shapes that `init` gives: kernels of variance 1 / inputs, scales around 1, all else around 0.

    Not the values of `init`, which is only traced. No two leaves are alike, and none is a constant.
    """
    generator = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = generator.standard_normal(leaf.shape)
        if len(leaf.shape) > 1:
            values /= np.sqrt(leaf.shape[-2])
        else:
            values = 0.1 * values + path[-1].key.endswith("scale")
        return jax.device_put(values.astype(leaf.dtype))  # compiles nothing; `jnp.asarray` does

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def scaled(params: Any, factor: float) -> Any:
    """Kernels, and all else of two axes or more, times a factor, without a program for every shape."""

    def scale(x: jax.Array) -> jax.Array:
        return x if x.ndim < 2 else jax.device_put(np.asarray(x) * x.dtype.type(factor))

    return jax.tree.map(scale, params)
