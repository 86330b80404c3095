"""Safetensors in directories: reading tensor by tensor from one file or several shards, writing, publishing.

No pickle is ever read. The names of shards come from the index and are not trusted.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from research.errors import UserError
from research.interop.fields import read_json
from research.training.checkpoint_files import write_failure

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_WORDS = {"I32": np.dtype(np.int32)}
_SHARD_BYTES = 4 * 2**30

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_HOW_TO_CONVERT = (
    "in an environment with torch and transformers, "
    "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, safe_serialization=True)"
)


class TensorFiles:
    """The tensors of a directory. `with TensorFiles(directory) as files`; every error is a UserError.

    other: the name of the file where there are neither model.safetensors nor shards.
    """

    def __init__(self, directory: Path, other: str | None = None):
        self.directory = directory
        self._other = other
        self._stack = contextlib.ExitStack()
        self._handles: dict[str, tuple[Path, Any]] = {}  # by tensor

    def __enter__(self) -> "TensorFiles":
        try:
            if (self.directory / SINGLE).is_file():
                self._open(self.directory / SINGLE)
            elif (self.directory / INDEX).is_file():
                self._open_shards()
            elif self._other is not None and (self.directory / self._other).is_file():
                self._open(self.directory / self._other)
            else:
                raise UserError(self._absent())
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name][1].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The tensor as it is stored: float32, float16 or bfloat16."""
        return self._read(name, _STORED)

    def read_words(self, name: str) -> np.ndarray:
        """A tensor of int32."""
        return self._read(name, _WORDS)

    def _read(self, name: str, dtypes: dict[str, np.dtype]) -> np.ndarray:
        path, handle = self._handles[name]
        stored = handle.get_slice(name).get_dtype()
        if stored not in dtypes:
            raise UserError(f"{path}: {name} is stored as {stored}; supported: {', '.join(dtypes)}")
        try:
            return handle.get_tensor(name).view(dtypes[stored])
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {name} can't be read: {error}") from None

    def _open(self, path: Path) -> list[str]:
        try:
            handle = self._stack.enter_context(safe_open(path, framework="numpy"))
            names = list(handle.keys())
        except FileNotFoundError:
            raise UserError(f"{path} does not exist, but {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from None
        for name in names:
            if name in self._handles:
                raise UserError(f"{path} and {self._handles[name][0]} both hold {name}")
            self._handles[name] = (path, handle)
        return names

    def _open_shards(self) -> None:
        index = self.directory / INDEX
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"{index}: weight_map must give the file of every tensor")
        shards = sorted(set(files.values()))
        for file in shards:
            # A plain name in this directory, so that no index reaches outside it.
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
                raise UserError(
                    f"{index}: {file[:80]!r} is not the name of a safetensors file in this directory"
                )
        for file in shards:
            held = self._open(self.directory / file)
            named = [name for name, other in files.items() if other == file]
            differing = sorted(set(held) ^ set(named))
            if differing:
                raise UserError(f"{index} and {file} disagree on {some(differing)}")

    def _absent(self) -> str:
        pickles = sorted(path.name for pattern in _PICKLES for path in self.directory.glob(pattern))
        if pickles:
            return (
                f"{self.directory} has {pickles[0]}, which is pickle and is never read; "
                f"make {SINGLE}: {_HOW_TO_CONVERT}"
            )
        return f"{self.directory} has neither {SINGLE} nor {INDEX}"


def some(names: list[str], count: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The array in another dtype; a value too large for it is a UserError, not an infinity."""
    target = np.dtype(DTYPES[dtype])
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(target)
    if target.itemsize < array.dtype.itemsize or target == np.float16:
        overflowed = ~np.isfinite(converted) & np.isfinite(array)
        if overflowed.any():
            raise UserError(
                f"{name} has {int(overflowed.sum())} values too large for {dtype}; use bfloat16 or float32"
            )
    return converted


def check_dtype(dtype: str | None, options: tuple[str | None, ...]) -> None:
    if dtype not in options:
        raise UserError(f"dtype {dtype!r} is not supported; one of {', '.join(map(str, options))}")


def write_tensors(directory: Path, sizes: dict[str, int], make: Callable[[str], np.ndarray]) -> None:
    """Writes one safetensors file, or shards and their index where the tensors exceed 4 GiB.

    Args:
        directory: exists.
        sizes: bytes of every tensor by name.
        make: gives the array of a name; called shard by shard, so that no more than a shard is in memory.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files, shards, strict=True):
        arrays = {name: np.ascontiguousarray(make(name)) for name in names}
        path = directory / file
        path.touch()  # with the usual permissions, which the library would narrow to the owner's
        mode = path.stat().st_mode
        save_file(arrays, path, metadata={"format": "pt"})
        path.chmod(mode)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(target: Path, needed: int) -> Iterator[Path]:
    """Yields an empty directory that becomes `target` when the block ends, and vanishes if it fails.

    Args:
        target: new, or an empty directory.
        needed: bytes that will be written, for the message about a full disk.

    Raises:
        UserError: `target` exists and isn't an empty directory, or can't be written (disk full).
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already; name a new directory")
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        content = scratch / target.name  # made with the usual permissions, unlike the scratch directory
        content.mkdir()
        yield content
        os.replace(content, target)
    except SafetensorError as error:  # reports what the file system refused, in words
        raise write_failure(OSError(str(error)), target, target.parent, needed) from error
    except OSError as error:
        raise write_failure(error, target, target.parent, needed) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
