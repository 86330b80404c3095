"""The state of a training run as one value."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

PyTree = Any


class State(struct.PyTreeNode):
    """Everything a step reads and writes. With the position in the data it is all that a resumed run needs.

    step: int32[], optimizer updates done since the run began.
    params: the model's parameters, float32 masters.
    opt_state: the state of the stage's optimizer, over the stage's trainable parameters only.
    key: uint32[2], the data of the run's random key. A step uses `step_key(state)`; this never changes.
    ema: exponential moving average of `params`, or `None`.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    key: jax.Array
    ema: PyTree | None = None


def step_key(state: State) -> jax.Array:
    """The typed random key of the step that `state` is about to make. Runs on the device, inside the step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def initial_state(params: PyTree, opt_state: PyTree, seed: int | jax.Array, *, ema: bool) -> State:
    """The state before the first step. Traceable; `ema` starts as the parameters."""
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        key=run_key(seed),
        ema=params if ema else None,
    )


def run_key(seed: int | jax.Array) -> jax.Array:
    """uint32[2]: the key data that steps fold their number into."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 1))


def init_key(seed: int | jax.Array) -> jax.Array:
    """The typed key that parameters are initialised with, independent of `run_key`."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 0)
