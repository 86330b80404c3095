"""How fast steps are: records or tokens per second, and the share of the device's peak."""

import math
import time
from typing import Any

import jax

from research.nn.accounting import active_share
from research.training.feed import Dataset, batch_spec
from research.training.paths import PyTree, named_leaves
from research.training.topologies import peak_flops


class Clock:
    """Throughput between logged steps."""

    def __init__(
        self, data: Dataset, batch_size: int, model: Any, shapes: PyTree, mesh: jax.sharding.Mesh, step: int
    ):
        spec = batch_spec(data, batch_size)
        self._unit = "tokens" if "tokens" in spec else "records"
        self._count = math.prod(spec["tokens"].shape) if "tokens" in spec else batch_size
        device = mesh.devices.flat[0]
        peak = peak_flops(device.device_kind)
        # 6 FLOP for every token and matrix element (forward 2, backward 4), without attention's products.
        self._mfu = (
            6 * matrix_elements(shapes, model) / (peak * mesh.size)
            if peak and self._unit == "tokens"
            else None
        )
        self._warm = False
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forgets the time that passed since: it went into something else than steps."""
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int) -> tuple[float | None, str, float | None]:
        """(per second since the last call or restart, unit, model FLOPs utilisation or `None`).

        The first call, which includes the device's warming up, has no rate.
        """
        now = time.perf_counter()
        steps, seconds = step - self._step, now - self._time
        self.restart(step)
        if steps <= 0 or not self._warm:
            self._warm = True
            return None, self._unit, None
        rate = steps * self._count / seconds
        return rate, self._unit, None if self._mfu is None else rate * self._mfu


def matrix_elements(params: PyTree, model: Any = None) -> int:
    """Elements of the matrices that a token is multiplied by: not an embedding that is only looked up, and of the
    experts of `model` those that it goes to."""
    leaves = named_leaves(params)
    share = active_share(model)
    tied = not any("head" in path.split("/") for path in leaves)
    elements = sum(
        leaf.size * share(path)
        for path, leaf in leaves.items()
        if leaf.ndim >= 2 and (path.split("/")[-1] != "table" or (tied and path.startswith("embedding/")))
    )
    return round(elements)
