"""Text as packed rows of tokens: what a language model trains on."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from research.data.filters import Filtered
from research.data.packing import (
    Stream,
    mixture_counts,
    mixture_table,
    num_rows,
    pack_rows,
    permutation,
)
from research.data.pipeline import RecordDataset
from research.data.sources import open_source
from research.data.stdlib_code import Progress
from research.data.token_cache import TokenizedSource, tokenized
from research.data.tokenizer import Tokenizer
from research.errors import UserError

_DOCUMENTS, _ROWS = 0, 1  # what a permutation orders, the last part of its key


@dataclasses.dataclass(eq=False)
class TokenDataset(RecordDataset):
    """Packed rows of `length` tokens from one or several sources of text.

    A record is one row (see `packing`): arrays `tokens`, `targets`, `segments`, `positions`, `target_bytes`
    int32[length] and `weights` f32[length]. Every epoch of a source has its own order of documents, and its
    own order of rows.

    Several sources are mixed row by row: the share of each in an epoch is its weight's to the row, and so is,
    to one row, its share in any stretch. Each source goes on where the last epoch left it and starts anew
    when all its rows were seen. An epoch has as many records as the sources have rows in all.

    Attributes:
      sources: what `research.data.sources.open_source` reads, or pairs of such a string and a weight.
      split: the part of every source.
      length: tokens of a row.
      tokenizer: path of a `tokenizer.json` (or its folder); by default the one that ships. Afterwards the
        `Tokenizer` itself.
      seed: of the orders.
      shuffle: whether documents and rows are shuffled; else they come as the source has them.
      keep: says of a document's text whether it is used at all (`research.data.filters`); by default all are.
    """

    sources: str | tuple[tuple[str, float], ...] = "builtin"
    split: str = "train"
    length: int = 256
    tokenizer: str | Tokenizer | None = None
    seed: int = 0
    shuffle: bool = True
    keep: Callable[[str], bool] | None = None

    def __post_init__(self):
        if not isinstance(self.tokenizer, Tokenizer):
            self.tokenizer = Tokenizer.load(self.tokenizer)
        if self.length < 1:
            raise UserError(f"length {self.length}: a row has at least one token")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")
        self._weights = self._checked_weights()
        self._packed: list[_PackedSource] | None = None

    def _checked_weights(self) -> dict[str, float]:
        pairs = [(self.sources, 1.0)] if isinstance(self.sources, str) else list(self.sources)
        if not pairs:
            raise UserError("sources: at least one is expected")
        weights = dict(pairs)
        if len(weights) != len(pairs):
            raise UserError(f"sources: {[name for name, _ in pairs]} names one twice")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"sources: {name} has weight {weight}; a positive number is expected")
        return weights

    def prepare(self, progress: Progress | None = None) -> "TokenDataset":
        """Reads, tokenizes and caches whatever isn't yet; else the first use does so.

        `progress(what, done, total)` is called now and then.
        """
        if self._packed is None:
            packed = []
            for i, name in enumerate(self._weights):
                texts = open_source(name, self.split, progress)
                if self.keep is not None:
                    texts = Filtered(texts, self.keep, name)
                source = tokenized(texts, self.tokenizer, progress)
                if not num_rows(int(source.offsets[-1]), self.length):
                    raise UserError(f"{name}: split {self.split} has no token to predict")
                key = (self.seed, i)
                packed.append(_PackedSource(source, self.tokenizer, self.length, key, self.shuffle))
            self._counts = mixture_counts(np.array(list(self._weights.values())), sum(len(p) for p in packed))
            self._source, self._index = mixture_table(self._counts)
            self._packed = packed
        return self

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Six arrays of `length`; nothing is read for it."""
        integers = ("tokens", "targets", "segments", "positions", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in integers}
        return {**spec, "weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def requires(self) -> dict[str, int | str]:
        """As in `research.training.feed.check_fit`."""
        tokenizer = self.tokenizer
        known = f"one of {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:12]}"
        return {"vocab_size": tokenizer.vocab_size, "max_length": self.length, "tokenizer": known}

    def __len__(self) -> int:
        """Records of an epoch: the rows of all sources."""
        self.prepare()
        return len(self._source)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources in this split, `<bos>` and `<eos>` included."""
        self.prepare()
        return sum(len(p.source.tokens) for p in self._packed)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: arrays [n, length]."""
        epoch, place = np.divmod(np.asarray(numbers, np.int64), len(self))
        source = self._source[place]
        count = epoch * self._counts[source] + self._index[place]  # that the source gave before
        result = {k: np.zeros((len(place), *s.shape), s.dtype) for k, s in self.element_spec().items()}
        for i, packed in enumerate(self._packed):
            chosen = np.flatnonzero(source == i)
            if len(chosen):
                for name, value in packed.take(count[chosen]).items():
                    result[name][chosen] = value
        return result


class _PackedSource:
    """One source's rows, pass after pass."""

    def __init__(
        self, source: TokenizedSource, tokenizer: Tokenizer, length: int, key: tuple[int, int], shuffle: bool
    ):
        self.source = source
        self._pad = tokenizer.pad_id or 0
        self._token_bytes = tokenizer.token_bytes
        self._length = length
        self._key = key
        self._shuffle = shuffle
        self._rows = num_rows(int(source.offsets[-1]), length)
        # Two passes, because a batch (and the threads that make the next ones) can stand in two.
        self._tables = functools.lru_cache(maxsize=2)(self._compute_tables)

    def __len__(self) -> int:
        return self._rows

    def _compute_tables(self, passes: int) -> tuple[Stream, np.ndarray]:
        lengths = self.source.lengths
        if not self._shuffle:
            return Stream.of(lengths, np.arange(len(lengths))), np.arange(self._rows)
        order = permutation(len(lengths), *self._key, passes, _DOCUMENTS)
        return Stream.of(lengths, order), permutation(self._rows, *self._key, passes, _ROWS)

    def take(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """The rows number `counts` int64[n] since the run's first."""
        passes, places = np.divmod(counts, self._rows)
        parts, order = [], []
        for number in np.unique(passes):
            chosen = np.flatnonzero(passes == number)
            stream, rows = self._tables(int(number))
            arrays = (self.source.tokens, self.source.offsets)
            try:
                parts.append(
                    pack_rows(
                        rows[places[chosen]], stream, *arrays, self._length, self._pad, self._token_bytes
                    )
                )
            except IndexError:
                folder, size = Path(self.source.tokens.filename).parent, len(self._token_bytes)
                raise UserError(
                    f"{folder} is damaged: a token is not one of the {size} of the vocabulary; delete it"
                ) from None
            order.append(chosen)
        back = np.argsort(np.concatenate(order))
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}
