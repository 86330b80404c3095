"""Packing and mixing as index tables: which tokens make row i, and which source gives record i.

Letters: N documents, S tokens of all documents, L row length, R rows of an epoch.

A source's documents, in the epoch's order, are one stream of S tokens. Row i is the window of L + 1 tokens
from i * L on: its first L are the inputs and its last L the targets, so that every token but the stream's
first is a target exactly once. Nothing is stored per row: a row number and the epoch's order of documents
give the row.
"""

import dataclasses

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """int64[count]: a random order of `range(count)`, a function of the integers `key` (32 bits each)."""
    # RandomState, because numpy promises that its stream never changes: a run resumes under any version.
    return np.random.RandomState(list(key)).permutation(count).astype(np.int64)


def num_rows(num_tokens: int, length: int) -> int:
    """R: how many rows of `length` hold the S - 1 targets of a stream (the last one may be padded)."""
    return -(-max(num_tokens - 1, 0) // length)


@dataclasses.dataclass(frozen=True)
class Stream:
    """One epoch's order of the documents of a source.

    Attributes:
      order: int64[N], the document at each place of the stream.
      starts: int64[N + 1], where in the stream each place begins; the last entry is S.
    """

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, order: np.ndarray) -> "Stream":
        """From the documents' `lengths` int64[N] and their `order`."""
        return cls(order, np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64))


def pack_rows(
    rows: np.ndarray,
    stream: Stream,
    tokens: np.ndarray,
    offsets: np.ndarray,
    length: int,
    pad: int,
    token_bytes: np.ndarray,
) -> dict[str, np.ndarray]:
    """The rows `rows` of a stream, as the arrays of a language batch.

    Args:
      rows: int64[n], row numbers in [0, R).
      stream: the epoch's order of documents.
      tokens: integer[S], the tokens of all documents, one after the other.
      offsets: int64[N + 1], where in `tokens` each document begins.
      length: L.
      pad: id that fills the last row.
      token_bytes: int32[vocabulary], bytes of text that each token stands for.

    Returns:
      `tokens`, `targets`, `segments`, `positions`, `target_bytes` int32[n, L] and `weights` f32[n, L].
      Segments count the row's documents from 1 and are 0 on padding. Positions count from the document's
      first token in the row. A target counts (weight 1) where it continues the document of its token.
    """
    column = np.arange(length + 1)
    place = rows[:, None] * length + column
    real = place < stream.starts[-1]
    place = np.minimum(place, stream.starts[-1] - 1)
    slot = np.searchsorted(stream.starts, place, side="right") - 1
    within = place - stream.starts[slot]  # from the document's first token
    ids = np.where(real, tokens[offsets[stream.order[slot]] + within], pad).astype(np.int32)
    counted = (slot[:, 1:] == slot[:, :-1]) & real[:, 1:]
    targets = ids[:, 1:]
    inside = real[:, :-1]
    return {
        "tokens": ids[:, :-1],
        "targets": targets,
        "segments": np.where(inside, (slot - slot[:, :1] + 1)[:, :-1], 0).astype(np.int32),
        "positions": np.where(inside, np.minimum(within, column)[:, :-1], 0).astype(np.int32),
        "target_bytes": np.where(counted, token_bytes[targets], 0).astype(np.int32),
        "weights": counted.astype(np.float32),
    }


def mixture_counts(weights: np.ndarray, total: int) -> np.ndarray:
    """int64[K]: how many of `total` records each of K sources gives, in proportion to `weights`.

    Shares are rounded down, and the records left over go to the largest remainders (the first of equal ones).
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(-(shares - counts), kind="stable")[:left]] += 1
    return counts


def mixture_table(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spreads each source's records evenly over an epoch.

    Args:
      counts: int64[K], records of each source.

    Returns:
      (int32[sum(counts)] the source of each record, int64[sum(counts)] how many of that source came before).
    """
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    index = np.concatenate([np.arange(c, dtype=np.int64) for c in counts])
    # Record j of a source with c of them stands at the middle of the j-th of c equal parts.
    moment = (index + 0.5) / counts[source]
    order = np.argsort(moment, kind="stable")
    return source[order], index[order]
