"""Windows of Python's own standard library, and which package each is from: real text with a label."""

import dataclasses
import functools
import hashlib
from typing import Literal

import jax
import numpy as np

from research.data.pipeline import RecordDataset
from research.data.shapes import SPLITS
from research.data.stdlib_code import source_files, stdlib_root
from research.data.tokenizer import Tokenizer
from research.errors import UserError

PACKAGES = ("asyncio", "email", "encodings", "importlib", "multiprocessing", "unittest", "xml")


@dataclasses.dataclass(frozen=True)
class PackageWindows(RecordDataset):
    """`tokens` int32[length] of the tokenizer that ships, from anywhere in a file of one of `PACKAGES`; `labels`
    int32[], the package, each as often; `weights`.

    A file belongs to one split by a hash of its path: about 60 % train, 15 % validation, 25 % test. Tests inside of the
    packages are left out. A record is a function of its number, the split, the seed and the interpreter's version.

    Args:
        size: windows of an epoch.
    """

    split: Literal["train", "validation", "test"] = "train"
    length: int = 32
    size: int = 1 << 12
    seed: int = 0

    num_classes = len(PACKAGES)

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"PackageWindows: the splits are {', '.join(SPLITS)}, not {self.split!r}")
        if not 1 <= self.length <= 256 or self.size < 1 or not 0 <= self.seed < 1 << 32:
            raise UserError(
                f"PackageWindows: length={self.length}, size={self.size}, seed={self.seed}: 1 to 256, at least 1 and 0 "
                "are expected"
            )

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "tokens": jax.ShapeDtypeStruct((self.length,), np.int32),
            "labels": jax.ShapeDtypeStruct((), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def __len__(self) -> int:
        return self.size

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        texts = _texts(self.split)
        labels, windows = [], []
        for number in numbers:
            random = np.random.RandomState([self.seed, SPLITS.index(self.split), int(number) % self.size])
            labels.append(random.randint(len(PACKAGES)))
            text = texts[labels[-1]]
            start = random.randint(len(text) - self.length + 1)
            windows.append(text[start : start + self.length])
        weights = np.ones(len(labels), np.float32)
        return {"tokens": np.stack(windows), "labels": np.array(labels, np.int32), "weights": weights}


@functools.cache
def _texts(split: str) -> tuple[np.ndarray, ...]:
    """int32[n] of each package, its files one after the other."""
    root, tokenizer = stdlib_root(), Tokenizer.load(None)
    found: dict[str, list[int]] = {package: [] for package in PACKAGES}
    for path, _ in source_files(root):
        package = path.partition("/")[0]
        if package not in found or "/test" in path or "_test" in path:
            continue
        share = hashlib.sha256(path.encode()).digest()[0] / 256
        if split == ("train" if share < 0.6 else "validation" if share < 0.75 else "test"):
            found[package] += tokenizer.encode((root / path).read_text(encoding="utf-8"))
    if missing := [package for package, tokens in found.items() if len(tokens) < 256]:
        raise UserError(f"PackageWindows: {root} has next to no text of {missing[0]} for the split {split}")
    return tuple(np.array(tokens, np.int32) for tokens in found.values())
