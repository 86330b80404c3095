"""Datasets side by side in one batch, and datasets that are made once and kept."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.data.pipeline import RecordDataset
from research.errors import UserError


@dataclasses.dataclass(eq=False)
class SideBySide(RecordDataset):
    """Record i holds record i of every dataset, its arrays under `<name>/<array>`: no pairs, each goes through its own
    epochs. An epoch of all is one of the longest.

    To measure a single dataset, put it here alone: an epoch of several sees the shorter ones more than once.
    """

    datasets: Mapping[str, Any]

    def __post_init__(self):
        if not self.datasets or any("/" in name for name in self.datasets):
            raise UserError(
                f"SideBySide: {list(self.datasets)}: at least one dataset, its name without a slash"
            )

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            f"{d}/{k}": spec for d, data in self.datasets.items() for k, spec in data.element_spec().items()
        }

    def __len__(self) -> int:
        return max(map(len, self.datasets.values()))

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        return {f"{d}/{k}": x for d, data in self.datasets.items() for k, x in data.take(numbers).items()}


@dataclasses.dataclass(frozen=True)
class InMemory(RecordDataset):
    """The records of one epoch of `data`, made at the first use and kept in memory; every epoch is the same.

    For generated data whose making takes longer than a step. Equal ones share the memory.
    """

    data: Any

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.data.element_spec()

    def requires(self) -> dict[str, int | str]:
        return self.data.requires()

    def __len__(self) -> int:
        return len(self.data)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        return {k: x[np.asarray(numbers) % len(self)] for k, x in _kept(self.data).items()}


@functools.lru_cache(maxsize=64)
def _kept(data: Any) -> dict[str, np.ndarray]:
    return data.take(np.arange(len(data)))
