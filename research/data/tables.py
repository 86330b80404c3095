"""Tables that ship inside scikit-learn: real measurements, of which nothing is downloaded."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.shapes import SPLITS
from research.data.sources import did_you_mean
from research.errors import UserError

SOURCES = ("wine", "breast_cancer", "diabetes")


@dataclasses.dataclass(frozen=True)
class Table(RecordDataset):
    """Rows of a table: `numbers` f32[n], standardised by the training rows, `categories` int32[m] where it has any,
    `weights`, and either `labels` int32[] or, where a number is to be told, `targets` f32[1], standardised too.

    Of every ten rows in a random order that is always the same one is for validation, three are for the test.

    Args:
        source: "wine" (178 rows, 13 numbers, 3 classes), "breast_cancer" (569, 30, 2) or "diabetes" (442 rows, 9
            numbers and the sex; how far the disease has gone a year later).
        seed: of the order, which differs from epoch to epoch.
    """

    source: Literal["wine", "breast_cancer", "diabetes"] = "wine"
    split: Literal["train", "validation", "test"] = "train"
    seed: int = 0

    def __post_init__(self):
        if self.source not in SOURCES:
            raise UserError(f"Table: no source {self.source!r}{did_you_mean(self.source, SOURCES)}")
        if self.split not in SPLITS:
            raise UserError(f"Table: the splits are {', '.join(SPLITS)}, not {self.split!r}")

    @property
    def num_classes(self) -> int:
        return int(self._rows["labels"].max()) + 1

    @property
    def _rows(self) -> dict[str, np.ndarray]:
        return _read(self.source, self.split)

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in self._rows.items()}

    def __len__(self) -> int:
        return len(self._rows["weights"])

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), len(self))
        orders = {epoch: permutation(len(self), self.seed, int(epoch)) for epoch in np.unique(epochs)}
        chosen = np.array([orders[e][p] for e, p in zip(epochs, places, strict=True)])
        return {name: x[chosen] for name, x in self._rows.items()}


@functools.cache
def _read(source: str, split: str) -> dict[str, np.ndarray]:
    from sklearn import datasets

    if source == "diabetes":
        found = datasets.load_diabetes(scaled=False)
        sex, numbers = found.data[:, 1].astype(np.int32) - 1, np.delete(found.data, 1, axis=1)
        extra = {"categories": sex[:, None]}
    else:
        found = getattr(datasets, f"load_{source}")()
        numbers, extra = found.data, {}
    place = np.empty(len(numbers), int)
    place[permutation(len(numbers), 0)] = np.arange(len(numbers)) % 10
    training = place >= 4
    chosen = {"validation": place == 0, "test": (place > 0) & (place < 4), "train": training}[split]
    columns = {"numbers": _standardised(numbers, training)} | extra
    if source == "diabetes":
        columns["targets"] = _standardised(found.target[:, None], training)
    else:
        columns["labels"] = found.target.astype(np.int32)
    columns["weights"] = np.ones(len(numbers), np.float32)
    return {name: column[chosen] for name, column in columns.items()}


def _standardised(columns: np.ndarray, training: np.ndarray) -> np.ndarray:
    seen = columns[training]
    return ((columns - seen.mean(axis=0)) / seen.std(axis=0)).astype(np.float32)
