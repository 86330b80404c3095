"""What every dataset shares: records numbered over the whole run, and batches of them with prefetch."""

import abc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import jax
import numpy as np

from research.errors import UserError


class Dataset(Protocol):
    """What training and evaluation know of data (docs/architecture.md, Batches)."""

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]: ...

    def __len__(self) -> int: ...

    def batches(
        self, start: int, batch_size: int, *, shard: tuple[int, int] = (0, 1), epochs: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]: ...


class RecordDataset(abc.ABC):
    """A dataset whose record i of the run is a function of i alone.

    So a position in the data is one number, and neither batch size nor number of hosts changes the order.
    """

    @abc.abstractmethod
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of one record, without a batch axis."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Records of an epoch."""

    @abc.abstractmethod
    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n], each array with a leading axis n."""

    def batches(
        self, start: int, batch_size: int, *, shard: tuple[int, int] = (0, 1), epochs: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of records `start`, `start + 1`, ..., made ahead by threads.

        Args:
          start: the global number of the first record.
          batch_size: of all hosts together.
          shard: (k, n): only rows k, k + n, ... of every batch; `batch_size` must be a multiple of n.
          epochs: stop after record `epochs * len(self) - 1` (counted from record 0, not from `start`), the
            last batch filled with records of zeros, whose `weights` are 0. By default there is no end.

        Raises:
          UserError: an impossible start, batch size or shard.
        """
        index, count = shard
        if start < 0 or batch_size < 1:
            raise UserError(f"record {start}, batch size {batch_size}: at least 0 and 1 are expected")
        if not 0 <= index < count:
            raise UserError(f"shard {index} of {count}: the shards of {count} are 0 to {count - 1}")
        if batch_size % count:
            raise UserError(f"a batch of {batch_size} can't be divided among {count} hosts evenly")
        size = len(self)  # always: what is wrong with the data is told here and not by a thread
        end = sys.maxsize if epochs is None else epochs * size
        rows = np.arange(index, batch_size, count, dtype=np.int64)

        def batch(number: int) -> dict[str, np.ndarray]:
            numbers = start + number * batch_size + rows
            return self._padded(numbers[numbers < end], len(rows))

        return self._iterate(batch, -(-max(end - start, 0) // batch_size))

    def _padded(self, numbers: np.ndarray, size: int) -> dict[str, np.ndarray]:
        if not len(numbers):
            return {k: np.zeros((size, *s.shape), s.dtype) for k, s in self.element_spec().items()}
        records = self.take(numbers)
        if len(numbers) == size:
            return records
        return {k: np.pad(v, [(0, size - len(v))] + [(0, 0)] * (v.ndim - 1)) for k, v in records.items()}

    @staticmethod
    def _iterate(
        batch: Callable[[int], dict[str, np.ndarray]], count: int
    ) -> Iterator[dict[str, np.ndarray]]:
        threads = min(os.cpu_count() or 1, 16)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(8, threads))
        return iter(grain.MapDataset.range(count).map(batch).to_iter_dataset(options))
