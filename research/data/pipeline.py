"""What every dataset shares: records numbered over the whole run, and batches of them with prefetch."""

import abc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
        self, start: int, batch_size: int, *, rows: Sequence[int] | None = None, epochs: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]: ...


class RecordDataset(abc.ABC):
    """A dataset whose record i of the run is a function of i alone.

    So a position in the data is one number, and neither batch size nor number of hosts changes the order.
    """

    @abc.abstractmethod
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of one record, without a batch axis."""

    def requires(self) -> dict[str, int | str]:
        """What a model and other datasets must have, as in `research.training.feed.check_fit`."""
        return {}

    @abc.abstractmethod
    def __len__(self) -> int:
        """Records of an epoch."""

    @abc.abstractmethod
    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n], each array with a leading axis n."""

    def batches(
        self, start: int, batch_size: int, *, rows: Sequence[int] | None = None, epochs: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of records `start`, `start + 1`, ..., made ahead by threads.

        Args:
          start: the global number of the first record.
          batch_size: of all hosts together.
          rows: only these rows of every batch, numbered from 0; by default all.
          epochs: stop after record `epochs * len(self) - 1` (counted from record 0, not from `start`), the
            last batch filled with records of zeros, whose `weights` are 0. By default there is no end.

        Raises:
          UserError: an impossible start, batch size or row.
        """
        if start < 0 or batch_size < 1:
            raise UserError(f"record {start}, batch size {batch_size}: at least 0 and 1 are expected")
        wanted = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        if not len(wanted) or not 0 <= wanted.min() <= wanted.max() < batch_size:
            raise UserError(
                f"rows {wanted.tolist()} of a batch of {batch_size}: some of 0 to {batch_size - 1}"
            )
        size = len(self)  # always: what is wrong with the data is told here and not by a thread
        end = sys.maxsize if epochs is None else epochs * size

        def batch(number: int) -> dict[str, np.ndarray]:
            numbers = start + number * batch_size + wanted
            return self._padded(numbers, end)

        return self._iterate(batch, -(-max(end - start, 0) // batch_size))

    def _padded(self, numbers: np.ndarray, end: int) -> dict[str, np.ndarray]:
        """The records, and zeros for those from `end` on."""
        real = numbers < end
        if real.all():
            return self.take(numbers)
        padded = {k: np.zeros((len(numbers), *s.shape), s.dtype) for k, s in self.element_spec().items()}
        if real.any():
            for name, values in self.take(numbers[real]).items():
                padded[name][real] = values
        return padded

    @staticmethod
    def _iterate(
        batch: Callable[[int], dict[str, np.ndarray]], count: int
    ) -> Iterator[dict[str, np.ndarray]]:
        threads = min(os.cpu_count() or 1, 16)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(8, threads))
        return iter(grain.MapDataset.range(count).map(batch).to_iter_dataset(options))
