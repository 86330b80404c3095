"""Modules called under jit, every program compiled once in a process.

`module.apply(...)` alone compiles each of its operations apart, and `jax.jit(module.apply)(...)` compiles anew at every
call: the bound method is another object each time. Here the module is a static argument, and equal modules share.
"""

import functools
from typing import Any

import jax


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def call(module: Any, params: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
    """`module.apply({"params": params}, *args, method=method, **kwargs)`; all arguments are arrays or trees of them."""
    return module.apply({"params": params}, *args, method=method, **kwargs)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def init(module: Any, key: jax.Array, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
    """The parameters of a module for arguments like these."""
    return module.init(key, *args, method=method, **kwargs)["params"]
