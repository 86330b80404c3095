"""Batches from a dataset onto the devices."""

from collections.abc import Iterator
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
        self, start: int, batch_size: int, *, shard: tuple[int, int] = (0, 1), epochs: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches from global record `start` on; shard (k, n) yields rows k::n of each."""


def check_batch_size(where: str, batch_size: int, mesh: jax.sharding.Mesh, accumulate: int = 1) -> None:
    """Raise `UserError` unless a (micro)batch divides over the devices that share it and over the hosts."""
    parts = batch_parts(mesh)
    each = batch_size // accumulate
    if each % parts:
        axes = " x ".join(f"{name}={mesh.shape[name]}" for name in BATCH_AXES)
        what = "microbatch" if accumulate > 1 else "batch_size"
        raise UserError(f"{where}: {what} {each} is not a multiple of the {parts} parts of the mesh ({axes})")
    if batch_size % jax.process_count():
        raise UserError(f"{where}: batch_size {batch_size} is not a multiple of {jax.process_count()} hosts")


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

    Every host reads its own rows only.
    """
    sharding = batch_sharding(mesh)
    shard = (jax.process_index(), jax.process_count())
    for rows in data.batches(start, batch_size, shard=shard, epochs=epochs):
        if jax.process_count() == 1:
            yield jax.device_put(rows, sharding)
        else:
            yield {
                name: jax.make_array_from_process_local_data(sharding, array, spec[name].shape)
                for name, array in rows.items()
            }
