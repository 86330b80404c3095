"""Batches from a dataset onto the devices."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from research.errors import UserError
from research.training.partitioning import BATCH_AXES, batch_parts, batch_sharding

PyTree = Any


@runtime_checkable
class Dataset(Protocol):
    """What the loop asks of data; see docs/architecture.md, Batches."""

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """One record's arrays, without the batch axis."""

    def __len__(self) -> int:
        """Records in an epoch."""

    def batches(
        self, start: int, batch_size: int, *, rows: Sequence[int] | None = None, epochs: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches from global record `start` on; of each only these `rows`, by default all."""


def check_fit(model: Any, data: Dataset, stages: Sequence[Any], evaluators: Sequence[Any]) -> None:
    """Raise `UserError` where a model has no layers, or does not fit what stages and evaluators read (`data` where a
    stage brings none), or these do not fit each other.

    A dataset may have `requires() -> {name: value}`. A number is the least that the model's field of that name must
    be, where it has one (`vocab_size`, `max_length`, `num_classes`); text must be that of all other datasets
    (`tokenizer`).
    """
    if getattr(model, "num_layers", 1) < 1:
        raise UserError(f"num_layers is {model.num_layers}; training needs at least 1")
    read = {f"stage {s.name!r}": data if s.data is None else s.data for s in stages}
    read |= {f"evaluator {e.name!r}": e.data for e in evaluators}
    said: dict[str, tuple[str, str]] = {}
    for where, dataset in read.items():
        for name, value in dataset.requires().items() if hasattr(dataset, "requires") else ():
            if isinstance(value, str):
                other, first = said.setdefault(name, (value, where))
                if value != other:
                    raise UserError(
                        f"the {name} of {where} is {value}, that of {first} is {other}; give both the same"
                    )
            elif (has := getattr(model, name, value)) < value:
                raise UserError(
                    f"{name} of the model is {has}, but the data of {where} needs at least {value}"
                )


def check_batch_size(where: str, batch_size: int, mesh: jax.sharding.Mesh, accumulate: int = 1) -> None:
    """Raise `UserError` unless a (micro)batch divides over the devices that share it."""
    parts = batch_parts(mesh)
    each = batch_size // accumulate
    if each % parts:
        axes = " x ".join(f"{name}={mesh.shape[name]}" for name in BATCH_AXES)
        what = "microbatch" if accumulate > 1 else "batch_size"
        raise UserError(f"{where}: {what} {each} is not a multiple of the {parts} parts of the mesh ({axes})")


def batch_spec(data: Dataset, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *spec.shape), spec.dtype)
        for name, spec in data.element_spec().items()
    }


def feed(
    data: Dataset,
    start: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    spec: dict[str, jax.ShapeDtypeStruct],
    *,
    epochs: int | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays, divided over the mesh, of the batches from record `start` on.

    A process reads the rows that its own devices hold, and no others: row i of a batch is record i of it on any number
    of processes, and where the axes that divide a row (`tensor`, `seq`) span processes, each of them reads it.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        for batch in data.batches(start, batch_size, epochs=epochs):
            yield jax.device_put(batch, sharding)
        return
    mine = own_rows(sharding, batch_size)
    for batch in data.batches(start, batch_size, rows=mine, epochs=epochs):
        yield {name: _place(array, mine, sharding, spec[name].shape) for name, array in batch.items()}


def own_rows(sharding: jax.sharding.NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, ascending."""
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def _place(
    array: np.ndarray, rows: np.ndarray, sharding: jax.sharding.NamedSharding, shape: tuple[int, ...]
) -> jax.Array:
    """The global array of `shape`, of which `array` has the rows of this process."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        wanted = np.arange(shape[0])[index[0]]
        return array[np.searchsorted(rows, wanted)]

    return jax.make_array_from_callback(shape, sharding, part)
