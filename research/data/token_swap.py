"""The word-swap attack on text: a share of the words that a language model reads is replaced by one generic token.

It measures how a model bears contaminated input. Targets stay as they were, so the loss is that of the true text given
the contaminated one, and clean and attacked losses are means over the same targets.
"""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from research.data.pipeline import RecordDataset
from research.data.text import TokenDataset
from research.data.tokenizer import Tokenizer
from research.errors import UserError


@dataclasses.dataclass(eq=False)
class TokenSwap(RecordDataset):
    """The rows of `data` with `rate` of the words in `tokens` replaced; `targets` and all else are untouched.

    In a config: `of(Evaluate, name="attacked", data=of(TokenSwap, data=held_out, rate=0.05))`.

    Of n units in a row, rate * n are replaced, the fraction rounded up or down at random so that the mean is `rate`
    exactly. Which ones is a function of `seed` and the record's number; a larger rate adds to those of a smaller one.
    Padding and special tokens are never replaced.

    Attributes:
      data: rows of text.
      rate: the share of units.
      unit: "word": a run of letters, digits and underscores, all of whose tokens are replaced, with the sign or space
        that a token may hold before them; "token": single tokens, whatever they hold.
      generic: the text of the token that replaces; one token of the data's tokenizer.
      seed: of the choice.
    """

    data: TokenDataset
    rate: float = 0.05
    unit: Literal["word", "token"] = "word"
    generic: str = "?"
    seed: int = 0

    def __post_init__(self):
        if not 0.0 <= self.rate <= 1.0:
            raise UserError(f"rate {self.rate}: the share of replaced {self.unit}s is from 0 to 1")
        if self.unit not in ("word", "token"):
            raise UserError(f"unit {self.unit!r}: words or single tokens are replaced: word, token")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: from 0 to 2**32 - 1 is expected")
        ids = self.data.tokenizer.encode(self.generic)
        if len(ids) != 1:
            raise UserError(
                f"generic {self.generic!r}: it is {len(ids)} tokens of the tokenizer; one is expected"
            )
        self._generic = ids[0]

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.data.element_spec()

    def requires(self) -> dict[str, int | str]:
        return self.data.requires()

    def __len__(self) -> int:
        return len(self.data)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: arrays [n, length]."""
        batch = self.data.take(numbers)
        units = self._units(batch["tokens"], batch["segments"])
        replaced = np.zeros(units.shape, bool)
        for row, number in enumerate(np.asarray(numbers, np.int64).tolist()):
            # RandomState, because numpy promises that its stream never changes.
            rng = np.random.RandomState([self.seed, number % (1 << 32)])
            count = units[row].max(initial=-1) + 1
            chosen = int(np.floor(self.rate * count + rng.random_sample()))
            replaced[row] = np.isin(units[row], rng.permutation(count)[:chosen])
        return {**batch, "tokens": np.where(replaced, np.int32(self._generic), batch["tokens"])}

    def _units(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """int[n, L]: the number of the unit that each token belongs to, from 0 in every row; -1 where to none."""
        table = self._vocabulary
        text = (segments > 0) & ~table.special[tokens]
        if self.unit == "token":
            return np.where(text, np.cumsum(text, axis=1) - 1, -1)
        part = text & table.word[tokens]
        goes_on = part[:, 1:] & part[:, :-1] & (segments[:, 1:] == segments[:, :-1])
        goes_on &= table.opens[tokens[:, 1:]] & table.ends[tokens[:, :-1]]
        begins = part.copy()
        begins[:, 1:] &= ~goes_on
        return np.where(part, np.cumsum(begins, axis=1) - 1, -1)

    @functools.cached_property
    def _vocabulary(self) -> "_Vocabulary":
        return _Vocabulary.of(self.data.tokenizer)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """bool[vocab_size] each: the token is special; holds a character of a word; begins, ends with one."""

    special: np.ndarray
    word: np.ndarray
    opens: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "_Vocabulary":
        # The bytes of half a character show as U+FFFD, and what takes several bytes is mostly a letter.
        texts = [tokenizer.decode([i], skip_special=False) for i in range(tokenizer.vocab_size)]
        inside = [[c.isalnum() or c in "_\ufffd" for c in text] for text in texts]
        return cls(
            tokenizer.token_bytes == 0,
            np.array([any(marks) for marks in inside]),
            np.array([bool(marks) and marks[0] for marks in inside]),
            np.array([bool(marks) and marks[-1] for marks in inside]),
        )
