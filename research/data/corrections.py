"""Lines of real code with generated errors: what a model that corrects its input trains on.

A line is taken from the documents of any source of text, and letters of it are swapped, dropped, doubled or
put in the other case. The lines are real; the errors are made.
"""

import dataclasses
import functools

import jax
import numpy as np

from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.sources import open_source
from research.data.stdlib_code import Progress
from research.data.tokenizer import Tokenizer
from research.errors import UserError


def corrupt(text: str, rate: float, rng: np.random.RandomState) -> str:
    """`text` with each character, with probability `rate`, swapped with the next one, dropped, doubled, or
    put in the other case, all four alike; the case of what is no letter stays."""
    result, i = [], 0
    edited = rng.random_sample(len(text)) < rate
    kinds = rng.randint(4, size=len(text))
    while i < len(text):
        kind = kinds[i] if edited[i] else None
        if kind == 0 and i + 1 < len(text):
            result += text[i + 1], text[i]
            i += 1
        elif kind == 2:
            result += text[i], text[i]
        elif kind == 3:
            result.append(text[i].swapcase())
        elif kind != 1:
            result.append(text[i])
        i += 1
    return "".join(result)


@dataclasses.dataclass(eq=False)
class Corrections(RecordDataset):
    """Pairs of a corrupted line and the line itself, each line once an epoch, with errors of its own.

    A record: source int32[length], <bos> and the corrupted line, padded on the right, and source_lengths
    int32[]; targets int32[length], the line and <eos>, and weights f32[length], 1 on them; record int32[],
    its number in the run, for losses that change over training.

    Attributes:
      sources: what `research.data.sources.open_source` reads.
      split: the part of it.
      length: tokens of source and target. Lines of a quarter to three quarters as many bytes are taken,
        without white space around them, each once; a source that its errors make too long is cut.
      rates: the least and the greatest share of corrupted characters; every record draws its own.
      tokenizer: path of a `tokenizer.json` (or its folder); by default the one that ships. Afterwards the
        `Tokenizer` itself.
      seed: of the order and the errors.
      shuffle: whether the lines are shuffled.
      reverse: the target is the line backwards, as something that can't be copied.
    """

    sources: str = "builtin"
    split: str = "train"
    length: int = 64
    rates: tuple[float, float] = (0.0, 0.3)
    tokenizer: str | Tokenizer | None = None
    seed: int = 0
    shuffle: bool = True
    reverse: bool = False

    def __post_init__(self):
        if not isinstance(self.tokenizer, Tokenizer):
            self.tokenizer = Tokenizer.load(self.tokenizer)
        if self.length < 8:
            raise UserError(f"length {self.length}: a line and its end take at least 8 tokens")
        low, high = self.rates
        if not 0.0 <= low <= high <= 1.0:
            raise UserError(
                f"rates {low}, {high}: the least and the greatest share, from 0 to 1, are expected"
            )
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    def prepare(self, progress: Progress | None = None) -> "Corrections":
        """Reads the lines if they aren't yet; else the first use does so."""
        if not hasattr(self, "_lines"):
            source = open_source(self.sources, self.split, progress)
            found: dict[str, None] = {}
            for i in range(len(source)):
                found.update(dict.fromkeys(line.strip() for line in source[i].splitlines()))
            # In bytes, because no text has more tokens than bytes and encoding all lines takes long.
            least, most = self.length // 4, self.length * 3 // 4
            self._lines = [line for line in found if least <= len(line.encode()) <= most]
            if not self._lines:
                raise UserError(
                    f"{self.sources}: split {self.split} has no line of {least} to {most} bytes; change length"
                )
        return self

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        row, number = (self.length,), ()
        return {
            "source": jax.ShapeDtypeStruct(row, np.int32),
            "source_lengths": jax.ShapeDtypeStruct(number, np.int32),
            "targets": jax.ShapeDtypeStruct(row, np.int32),
            "weights": jax.ShapeDtypeStruct(row, np.float32),
            "record": jax.ShapeDtypeStruct(number, np.int32),
        }

    def __len__(self) -> int:
        """Lines of the split."""
        return len(self.prepare()._lines)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        numbers = np.asarray(numbers, np.int64)
        sources, targets = zip(*map(self._pair, numbers.tolist()), strict=True)
        result = {k: np.zeros((len(numbers), *s.shape), s.dtype) for k, s in self.element_spec().items()}
        result["record"] = numbers.astype(np.int32)
        for row, ids in enumerate(self.tokenizer.encode_batch(sources, bos=True)):
            ids = ids[: self.length]
            result["source"][row, : len(ids)] = ids
            result["source_lengths"][row] = len(ids)
        for row, ids in enumerate(self.tokenizer.encode_batch(targets, eos=True)):
            result["targets"][row, : len(ids)] = ids
            result["weights"][row, : len(ids)] = 1.0
        return result

    def texts(self, numbers: np.ndarray) -> list[tuple[str, str]]:
        """The corrupted and the right line of each record."""
        return [self._pair(number) for number in np.asarray(numbers).tolist()]

    def _pair(self, number: int) -> tuple[str, str]:
        epoch, place = divmod(number, len(self))
        line = self._lines[self._order(epoch)[place]]
        # RandomState, because numpy promises that its stream never changes.
        rng = np.random.RandomState([self.seed, number % (1 << 32)])
        source = corrupt(line, rng.uniform(*self.rates), rng)
        return source, line[::-1] if self.reverse else line

    def _compute_order(self, epoch: int) -> np.ndarray:
        return permutation(len(self), self.seed, epoch) if self.shuffle else np.arange(len(self))
