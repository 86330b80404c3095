"""Cross-entropy: which implementation runs, and what it can compute."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.common import Unsupported, check_name, needs_llvm
from kernels_pallas.cross_entropy import reference


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, implementation: Literal["reference", "cpu"] = "cpu"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits float32[N, V], labels int[N] -> (nats [N], logsumexp [N], correct [N]), all float32.

    `correct` is 1 where no class has a larger logit than the label. A negative label counts from behind; for one that
    is no class nats are not a number. The gradient reaches the logits, from nats and logsumexp. On a CPU there is a
    first derivative in reverse mode, and no other.

    Raises `Unsupported` for other dtypes and shapes, and on a processor without a kernel.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.shape[1]:
        raise Unsupported(f"logits {logits.shape} with labels {labels.shape}: expected [N, V] and [N]")
    if logits.dtype != jnp.float32 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise Unsupported(f"logits are {logits.dtype}, labels {labels.dtype}: expected float32 and integers")
    check_name(implementation, "cpu")
    if implementation == "reference":
        return reference.cross_entropy(logits, labels)
    with needs_llvm():
        from kernels_pallas.cpu import lanes
        from kernels_pallas.cross_entropy import cpu
    return cpu.cross_entropy(logits, labels.astype(jnp.int32), lanes())
