"""What this machine can do at best, measured: float32 matrix products and reads of memory."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def matmul_flops(size: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of a float32 product of two `size` x `size` matrices with all threads; the best run."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / _best(lambda: product(a, a), repeats)


def memory_bandwidth(megabytes: int = 256, repeats: int = 10) -> float:
    """Bytes a second at which a large float32 array is summed with all threads; the best run."""
    data = jnp.ones((megabytes * 2**18,), jnp.float32).reshape(-1, 1024)
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    return data.nbytes / _best(lambda: total(data), repeats)


def _best(function: Callable[[], jax.Array], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds)
