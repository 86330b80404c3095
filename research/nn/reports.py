"""What layers report beside their output: terms of the loss, and measurements.

A layer calls `report_loss` and `report_measurement`. Nothing is kept, and XLA drops what it costs, unless the
model is called through `apply_reporting`, as the tasks do. So nothing is global, and a term is counted once
under rematerialisation, scanned layers and accumulation alike.
"""

from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from research.errors import UserError

LOSSES, MEASUREMENTS = "losses", "measurements"
COLLECTIONS = (LOSSES, MEASUREMENTS)

Measurement = tuple[jax.Array, jax.Array]


def report_loss(module: nn.Module, name: str, value: jax.Array) -> None:
    """Adds `value` f32[], with its coefficient, to the model's loss; terms of one name add up over the layers."""
    _keep(module, LOSSES, name, value)


def report_measurement(module: nn.Module, name: str, total: jax.Array, weight: jax.Array) -> None:
    """Reports total / weight, both summed over batches first; a total may be a vector, its weight a scalar."""
    _keep(module, MEASUREMENTS, name, (jax.lax.stop_gradient(total), weight))


def apply_reporting(
    model: nn.Module, variables: dict[str, Any], *args: Any, **keywords: Any
) -> tuple[Any, dict[str, jax.Array], dict[str, Measurement]]:
    """`model.apply` -> its output, {name: f32[] over all layers}, {"layer_0/mlp/name": (total, weight)}."""
    output, reported = model.apply(variables, *args, mutable=list(COLLECTIONS), **keywords)
    losses: dict[str, jax.Array] = {}
    for path, value in traverse_util.flatten_dict(reported.get(LOSSES, {})).items():
        losses[path[-1]] = losses.get(path[-1], 0.0) + value.sum()  # scanned layers are stacked
    measured = dict(reported.get(MEASUREMENTS, {}))
    scanned = measured.pop("layers", {})
    by_path = {"/".join(path): value for path, value in traverse_util.flatten_dict(measured).items()}
    if scanned:
        by_path |= _unstacked(scanned, period=len(model.blocks))
    return output, losses, by_path


def _keep(module: nn.Module, collection: str, name: str, value: Any) -> None:
    if not module.is_mutable_collection(collection):
        return
    if module.has_variable(collection, name):
        raise UserError(f"{'/'.join(module.path)} reports {name!r} twice in one call")
    module.put_variable(collection, name, value)


def _unstacked(scanned: dict[str, Any], period: int) -> dict[str, Measurement]:
    """{"layer_j/...": stacked} of scanned layers -> named one by one, as those of unrolled layers."""
    values = {}
    for (layer, *rest), value in traverse_util.flatten_dict(scanned).items():
        place = int(layer.removeprefix("layer_"))
        for repeat in range(value[0].shape[0]):
            name = "/".join((f"layer_{repeat * period + place}", *rest))
            values[name] = jax.tree.map(lambda x, i=repeat: x[i], value)
    return values
