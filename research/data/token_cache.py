"""Tokenized sources on disk: each text is encoded once, and every later run maps the file into memory."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from research.data.sources import TextSource
from research.data.stdlib_code import Progress
from research.data.storage import data_dir, publish
from research.data.tokenizer import Tokenizer
from research.errors import UserError

_LAYOUT = 1  # of the files; a change makes every cache a new one
_CHUNK = 1 << 22  # characters encoded at once: enough for all cores, little enough for memory


@dataclasses.dataclass(frozen=True)
class TokenizedSource:
    """The documents of a source as ids, each between `<bos>` and `<eos>` where the tokenizer has them.

    Attributes:
      tokens: uint16[S] or uint32[S], all documents one after the other, mapped from disk.
      offsets: int64[N + 1], where each of N documents begins; the last entry is S.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64[N]: tokens of each document."""
        return np.diff(self.offsets)


def tokenized(source: TextSource, tokenizer: Tokenizer, progress: Progress | None = None) -> TokenizedSource:
    """The tokens of `source`, from `data_dir()/tokens` or encoded now.

    The folder's name is a digest of the two fingerprints, so it is never out of date.

    Raises:
      UserError: what reading the source raises, a corpus of no tokens, or files that are damaged. That an id lies
        outside of the vocabulary is told when it is packed: files are large.
    """
    key = hashlib.sha256(f"{_LAYOUT} {source.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()[:32]
    folder = data_dir() / "tokens" / key
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    if not folder.is_dir():
        with publish(folder) as scratch:
            _encode(source, tokenizer, dtype, scratch, progress)
    try:
        with open(folder / "offsets.npy", "rb") as file:
            offsets = np.lib.format.read_array(file, allow_pickle=False)
        tokens = np.memmap(folder / "tokens.bin", dtype, mode="r")
        if offsets.dtype != np.int64 or offsets.ndim != 1 or offsets[0] or np.any(np.diff(offsets) < 0):
            raise ValueError("offsets.npy holds no offsets")
        if len(tokens) != offsets[-1]:
            raise ValueError(f"{len(tokens)} tokens where {offsets[-1]} belong")
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{folder} is damaged: {error}; delete it") from error
    return TokenizedSource(tokens, offsets)


def _encode(
    source: TextSource, tokenizer: Tokenizer, dtype: np.dtype, folder: Path, progress: Progress | None
) -> None:
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    lengths: list[int] = []
    chunk: list[str] = []
    size = 0
    with open(folder / "tokens.bin", "wb") as file:
        for index in range(len(source)):
            chunk.append(source[index])
            size += len(chunk[-1])
            if size >= _CHUNK or index == len(source) - 1:
                for ids in tokenizer.encode_batch(chunk):
                    document = np.array([*before, *ids, *after], dtype)
                    lengths.append(len(document))
                    document.tofile(file)
                chunk, size = [], 0
                if progress:
                    progress("tokenize", index + 1, len(source))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
