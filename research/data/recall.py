"""Generated tests of long context: multi-query associative recall, needles in filler, answers at the end of a text.

A row of `Recall` is a context of key-value pairs among filler tokens, then queries: each a key of the context and its
value. Only the values that answer have weight, so `accuracy` over these rows is the share of right answers.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np

from research.data.pipeline import RecordDataset
from research.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Recall(RecordDataset):
    """Language batches (docs/architecture.md) of recall; `target_bytes` is 0, as the tokens stand for no text.

    Tokens 0 .. keys - 1 are keys, the next `values` are values, the last `fillers` filler. Of `pairs` pairs with
    different keys `queries` are asked for, in random order. What the pairs and queries leave of `length` is filler,
    among the pairs. The default of one pair for four tokens is multi-query associative recall (arXiv 2312.04927).

    Args:
        length: tokens of a row.
        pairs, queries: how many; by default length / 4 pairs, all of them asked for.
        depth: where the one pair that is asked for begins, from 0, the first token, to 1, the last place before the
            query; the other pairs lie anywhere. None: all pairs lie anywhere.
        keys, values, fillers: sizes of the three parts of the vocabulary.
        size: records of an epoch; record i is a function of i, the split and the seed.
    """

    length: int = 128
    pairs: int | None = None
    queries: int | None = None
    depth: float | None = None
    keys: int = 64
    values: int = 64
    fillers: int = 32
    split: Literal["train", "validation", "test"] = "train"
    size: int = 1 << 16
    seed: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"recall: the splits are {', '.join(SPLITS)}, not {self.split!r}")
        if not 1 <= self.num_queries <= self.num_pairs <= self.keys:
            raise UserError(
                f"recall: {self.num_queries} queries of {self.num_pairs} pairs of {self.keys} keys: at least one "
                "query, no more than there are pairs, and no more pairs than keys are expected"
            )
        if self.filler < 0 or (self.filler and not self.fillers):
            raise UserError(
                f"recall: {self.num_pairs} pairs and {self.num_queries} queries take "
                f"{2 * (self.num_pairs + self.num_queries)} tokens, length={self.length}, fillers={self.fillers}"
            )
        if self.depth is not None and (self.num_queries != 1 or not 0.0 <= self.depth <= 1.0):
            raise UserError(
                f"recall: depth={self.depth} is the place of one queried pair, from 0 to 1; there are "
                f"{self.num_queries} queries"
            )
        if self.size < 1 or self.seed < 0:
            raise UserError(f"recall: size={self.size}, seed={self.seed}: at least 1 and 0 are expected")

    @property
    def num_pairs(self) -> int:
        return self.length // 4 if self.pairs is None else self.pairs

    @property
    def num_queries(self) -> int:
        return self.num_pairs if self.queries is None else self.queries

    @property
    def filler(self) -> int:
        """Filler tokens of a row."""
        return self.length - 2 * (self.num_pairs + self.num_queries)

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.fillers

    @property
    def prompt(self) -> int:
        """Tokens of a row up to its first answer."""
        return self.length - 2 * self.num_queries + 1

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("tokens", "targets", "segments", "positions", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in names}
        return spec | {"weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def __len__(self) -> int:
        return self.size

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: arrays [n, length]."""
        tokens = np.stack([self._row(int(number)) for number in numbers])
        shape = tokens.shape
        weights = np.zeros(shape, np.float32)
        weights[:, self.prompt - 1 :: 2] = 1.0  # at a queried key the target is its value
        return {
            "tokens": tokens,
            "targets": np.pad(tokens[:, 1:], ((0, 0), (0, 1))),
            "segments": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(self.length, dtype=np.int32), shape),
            "target_bytes": np.zeros(shape, np.int32),
            "weights": weights,
        }

    def _row(self, number: int) -> np.ndarray:
        # RandomState, because numpy promises that its stream never changes.
        rng = np.random.RandomState([self.seed, SPLITS.index(self.split), number % (1 << 32)])
        pairs, filler = self.num_pairs, self.filler
        found = np.stack(
            [rng.permutation(self.keys)[:pairs], self.keys + rng.randint(self.values, size=pairs)]
        )
        asked = rng.permutation(pairs)[: self.num_queries]
        # Units of the context: pair p is p, filler is `pairs`.
        units = rng.permutation(np.minimum(np.arange(pairs + filler), pairs))
        if self.depth is not None:
            others = units[units != asked[0]]
            units = np.insert(others, round(self.depth * len(others)), asked[0])
        context = [
            found[:, unit] if unit < pairs else [self.keys + self.values + rng.randint(self.fillers)]
            for unit in units
        ]
        return np.concatenate([*context, found[:, asked].T.reshape(-1)]).astype(np.int32)


def needle(length: int, depth: float | None = None, pairs: int = 4, **fields) -> Recall:
    """A row of filler with `pairs` pairs, one of which, at `depth`, is asked for at the end."""
    return Recall(length, pairs=pairs, queries=1, depth=depth, **fields)


@dataclasses.dataclass(frozen=True)
class Answers(RecordDataset):
    """The rows of `data` with weight on the last `count` targets alone: the row's end answers its beginning."""

    data: RecordDataset
    count: int

    def __post_init__(self):
        length = self.data.element_spec()["weights"].shape[0]
        if not 1 <= self.count < length:
            raise UserError(f"answers: count={self.count} of rows of {length}: from 1 to {length - 1}")

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.data.element_spec()

    def requires(self) -> dict[str, int | str]:
        return self.data.requires()

    def __len__(self) -> int:
        return len(self.data)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.data.take(numbers)
        late = np.arange(batch["weights"].shape[1]) >= batch["weights"].shape[1] - self.count
        return batch | {"weights": batch["weights"] * late}
