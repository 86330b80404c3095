"""Whether the kernels for a CPU (`kernels_pallas.cpu`) compute what a model decodes."""

import functools
import os
import warnings

import jax

from kernels_pallas.common import target_platform
from kernels_pallas.skinny_matmul import Unsupported, panel_columns
from research.errors import UserError


def use_cpu_kernels() -> bool:
    """They do on a CPU that is alone (XLA divides no foreign function among devices), unless the environment has
    LATHE_CPU_KERNELS=off. Where this processor has no such kernels, a warning says so once.

    Raises UserError for another value of LATHE_CPU_KERNELS.
    """
    choice = os.environ.get("LATHE_CPU_KERNELS", "on")
    if choice not in ("on", "off"):
        raise UserError(f"LATHE_CPU_KERNELS={choice}: expected on or off")
    alone = jax.sharding.get_abstract_mesh().size <= 1
    return choice == "on" and target_platform() == "cpu" and alone and _there_are_kernels()


@functools.cache
def _there_are_kernels() -> bool:
    try:
        panel_columns()
    except Unsupported as error:
        warnings.warn(f"decoding without the kernels for a CPU, and slower: {error}", stacklevel=3)
        return False
    return True
