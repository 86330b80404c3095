"""Self-distilled text: what the target itself says after the beginnings of a corpus' documents.

A drafter guesses the target, not the corpus, so it learns most from the target's own output (Medusa, arXiv
2401.10774, section 2.3.2). `SelfDistilled` is a dataset for configs; it writes its rows on first use:

    data=of(SelfDistilled, target="package:language/base", rows=2048, length=128)
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from research.data.packing import permutation
from research.data.pipeline import RecordDataset
from research.data.sources import open_source
from research.data.stdlib_code import Progress
from research.data.storage import data_dir, publish
from research.data.text import TokenDataset
from research.decoding.generator import Generator
from research.decoding.sampling import Sampling
from research.errors import UserError
from research.training.model_directory import Loaded, fingerprint
from research.training.workdir import load_model

_LAYOUT = 1  # of the files; a change makes every cache a new one
_BATCH = 32  # rows decoded together, and kept in one file


@dataclasses.dataclass(frozen=True)
class Rows:
    """tokens int32[n, length + 1]: a prompt, from `begin` int32[n] on what the target said, from `end` int32[n]
    on nothing."""

    tokens: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def self_distill(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    length: int,
    sampling: Sampling,
    seed: int,
    first: int,
) -> Rows:
    """The target's continuations of prompts number `first`, first + 1, ..., each filling a row or ended by the
    target's end token, which is kept. Row i depends on the seed and i, not on the other rows."""
    room = length + 1 - min(map(len, prompts))
    ids = range(first, first + len(prompts))
    result = generator.generate(prompts, max_new_tokens=room, sampling=sampling, seed=seed, ids=ids)
    tokens = np.zeros((len(prompts), length + 1), np.int32)
    end = np.zeros(len(prompts), np.int32)
    for row, (prompt, sample) in enumerate(zip(prompts, result.samples, strict=True)):
        ending = [generator.ends[0]] if sample.finish == "eos" else []
        text = [*prompt, *sample.tokens, *ending][: length + 1]
        tokens[row, : len(text)], end[row] = text, len(text)
    return Rows(tokens, np.asarray([len(prompt) for prompt in prompts], np.int32), end)


@dataclasses.dataclass(eq=False)
class SelfDistilled(RecordDataset):
    """Language batches of a target's own text; `weights` are 1 on the tokens that the target said.

    What was written is kept below `data_dir()/distilled` under a digest of everything that decides it, the
    target's parameters included, `_BATCH` rows a file: whoever asks for more rows, or died on the way, goes on
    from there.

    Attributes:
      target: a workdir or a model directory, as for `load_model`.
      rows: records of an epoch.
      length: tokens of a row, the prompt's included.
      prompt: tokens of the beginning; it lies in one document.
      temperature: of the target; 0 is greedy.
      sources, split: where prompts come from, as in `TokenDataset`.
      seed: of prompts and draws, so of the text.
      order: seed of the order of each epoch: another one is another run over the same text.
    """

    target: str
    rows: int = 2048
    length: int = 128
    prompt: int = 32
    temperature: float = 0.0
    sources: str = "builtin"
    split: str = "train"
    seed: int = 0
    order: int = 0

    def __post_init__(self):
        if self.rows < 1 or not 1 <= self.prompt < self.length:
            raise UserError(
                f"SelfDistilled: {self.rows} rows of {self.length} tokens after prompts of {self.prompt}: at least "
                "one row is expected, and a prompt shorter than the row"
            )
        self._sampling = Sampling(self.temperature)
        self._rows: Rows | None = None
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(self.rows, self.order, epoch))

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Six arrays of `length`; nothing is read for it."""
        integers = ("tokens", "targets", "segments", "positions", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in integers}
        return {**spec, "weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def __len__(self) -> int:
        self.prepare()
        return self.rows

    @functools.cached_property
    def _loaded(self) -> Loaded:
        loaded = load_model(self.target)
        if loaded.tokenizer is None:
            raise UserError(
                f"{self.target} has no tokenizer.json, so it can't read prompts from {self.sources}"
            )
        if self.length >= loaded.model.max_length:
            raise UserError(
                f"SelfDistilled: rows of {self.length} tokens do not fit the context of {self.target}, "
                f"{loaded.model.max_length}"
            )
        return loaded

    def prepare(self, progress: Progress | None = None) -> "SelfDistilled":
        """Lets the target write whatever rows are not there yet; else the first use does so."""
        if self._rows is not None:
            return self
        loaded = self._loaded
        described = {
            "layout": _LAYOUT,
            "target": fingerprint(loaded.params),
            "tokenizer": loaded.tokenizer.fingerprint,
            "source": open_source(self.sources, self.split, progress).fingerprint,
            **{name: getattr(self, name) for name in ("split", "length", "prompt", "temperature", "seed")},
        }
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        folder = data_dir() / "distilled" / key
        parts = [folder / f"{number:06d}" for number in range(-(-self.rows // _BATCH))]
        missing = [number for number, part in enumerate(parts) if not part.is_dir()]
        if missing:
            generator = Generator(loaded.model, loaded.params, loaded.tokenizer)
            prompts = self._prompts(len(parts) * _BATCH, progress)
        for number in missing:
            first = number * _BATCH
            batch = prompts[first : first + _BATCH]
            rows = self_distill(generator, batch, self.length, self._sampling, self.seed, first)
            with publish(parts[number]) as scratch:
                np.savez(scratch / "rows.npz", **dataclasses.asdict(rows))
            if progress is not None:
                progress(f"{self.target} writes rows", min(first + _BATCH, self.rows), self.rows)
        read = [_read(part / "rows.npz", self.length) for part in parts]
        fields = (f.name for f in dataclasses.fields(Rows))
        self._rows = Rows(*(np.concatenate([getattr(rows, name) for rows in read]) for name in fields))
        return self

    def _prompts(self, count: int, progress: Progress | None) -> list[list[int]]:
        """The first `count` windows of the corpus that lie in one document."""
        corpus = TokenDataset(self.sources, self.split, self.prompt, self._loaded.tokenizer, self.seed)
        corpus.prepare(progress)
        found: list[list[int]] = []
        for record in range(0, len(corpus), 1024):
            windows = corpus.take(np.arange(record, min(record + 1024, len(corpus))))
            # No padding (segment 0), no second document.
            whole = np.all(windows["segments"] == np.maximum(windows["segments"][:, :1], 1), axis=1)
            found += windows["tokens"][whole].tolist()
            if len(found) >= count:
                return found[:count]
        raise UserError(
            f"{self.sources}: split {self.split} has {len(found)} windows of {self.prompt} tokens in one document, "
            f"and {self.rows} rows need {count} of them: ask for fewer rows or shorter prompts"
        )

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]: arrays [n, length]."""
        self.prepare()
        epoch, place = np.divmod(np.asarray(numbers, np.int64), self.rows)
        chosen = np.asarray([self._order(int(e))[p] for e, p in zip(epoch, place, strict=True)], np.int64)
        text, begin, end = (getattr(self._rows, f.name)[chosen] for f in dataclasses.fields(Rows))
        at = np.arange(self.length)
        targets = text[:, 1:]
        said = (at + 1 >= begin[:, None]) & (at + 1 < end[:, None])
        return {
            "tokens": text[:, :-1],
            "targets": targets,
            "segments": (at < end[:, None]).astype(np.int32),
            "positions": np.where(at < end[:, None], at, 0).astype(np.int32),
            "target_bytes": np.where(said, self._loaded.tokenizer.token_bytes[targets], 0).astype(np.int32),
            "weights": said.astype(np.float32),
        }


def _read(path: Path, length: int) -> Rows:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows = Rows(**arrays)
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder {path.parent.parent}") from None
    if rows.tokens.shape != (_BATCH, length + 1):
        raise UserError(
            f"{path} is damaged: it holds {rows.tokens.shape}; delete its folder {path.parent.parent}"
        )
    return rows
