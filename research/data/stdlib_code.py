"""Python's own standard library as a code corpus: a TFDS builder that downloads nothing.

Every interpreter carries some twelve million bytes of source written and reviewed by people, and nineteen
more of tests where its distribution keeps them. A document is one `.py` file.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from research.data.duplicates import near_duplicate_groups
from research.data.storage import data_dir, publish
from research.errors import UserError

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)

SPLITS = ("train", "validation", "test")
_HELD_OUT = 0.04  # of the files, for validation and as much again for test
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One file of the corpus: `path` relative to the root, with forward slashes."""

    path: str
    text: str


def source_files(root: Path) -> list[tuple[str, int]]:
    """The corpus's files below `root` as sorted (relative path, bytes).

    Left out: installed packages, and `_sysconfigdata*.py`, which holds the paths of the machine that built
    the interpreter.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path.stat().st_size))
    return sorted(found)


def read_documents(root: Path) -> tuple[list[Document], list[str]]:
    """The documents below `root` in order of path, and the paths that no declared encoding can decode.

    Each file is decoded as Python itself would (byte order mark, coding line, else UTF-8), with its line
    ends kept. Files of nothing but white space are no documents; of equal texts the first is kept.
    """
    documents, undecodable, seen = [], [], set()
    for path, _ in source_files(root):
        raw = (root / path).read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            text = raw.decode(encoding)
        except (SyntaxError, UnicodeDecodeError):
            undecodable.append(path)
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            documents.append(Document(path, text))
    return documents, undecodable


def assign_splits(documents: Sequence[Document]) -> list[str]:
    """The split of each document: a function of its path and of whether the corpus holds a near copy of it.

    A group of near-duplicates goes to `train` as a whole: it stays on one side, and the held-out files are
    then different from each other too. Of the rest about 4 % are `validation` and 4 % `test`, by a hash of
    the path, so the same file has the same split under every interpreter that has it.
    """
    groups = near_duplicate_groups([d.text for d in documents]).tolist()
    members = {group: groups.count(group) for group in set(groups)}
    splits = []
    for document, group in zip(documents, groups, strict=True):
        digest = hashlib.sha256(document.path.encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        if members[group] > 1 or draw >= 2 * _HELD_OUT:
            splits.append("train")
        else:
            splits.append("validation" if draw < _HELD_OUT else "test")
    return splits


class StdlibCode(tfds.core.GeneratorBasedBuilder):
    """Files of Python's standard library with features `text` and `path`, in order of path."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, root: Path, data_dir: Path):
        self._root = root
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python source files of an interpreter's standard library.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
            homepage="https://docs.python.org/3/library/",
            license="PSF-2.0",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        documents, undecodable = read_documents(self._root)
        self.info.metadata["undecodable"] = undecodable
        splits = assign_splits(documents)
        parts = {name: [d for d, s in zip(documents, splits, strict=True) if s == name] for name in SPLITS}
        # TFDS refuses to write an empty split, which a small corpus may have.
        return {name: self._generate_examples(part) for name, part in parts.items() if part}

    def _generate_examples(self, documents: Sequence[Document]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, document in enumerate(documents):
            yield index, dataclasses.asdict(document)


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def corpus_name(root: Path) -> str:
    """Names the corpus below `root`: the interpreter's version, and a digest of the files' paths and sizes
    and of the builder's version."""
    files = source_files(root)
    if not files:
        raise UserError(f"no Python source below {root}: the built-in corpus is the standard library")
    digest = hashlib.sha256(repr((str(StdlibCode.VERSION), files)).encode()).hexdigest()[:12]
    return f"{platform.python_version()}-{digest}"


def prepare(root: Path | None = None, progress: Progress | None = None) -> StdlibCode:
    """The builder of the corpus below `root` (default: the standard library), prepared if it wasn't yet.

    Takes some seconds the first time and writes about as many bytes as the sources have to
    `data_dir()/builtin`. Two processes may prepare at once (see `storage.publish`).

    Raises:
      UserError: no Python source below `root`, or the folder can't be written.
    """
    root = root or stdlib_root()
    target = data_dir() / "builtin" / corpus_name(root)
    if not target.is_dir():
        if progress:
            progress("prepare the built-in corpus", 0, 1)
        # What TFDS prints on the way would break the caller's own progress display.
        quiet = io.StringIO()
        with publish(target) as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            builder = StdlibCode(root=root, data_dir=folder)
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        if progress:
            progress("prepare the built-in corpus", 1, 1)
    return StdlibCode(root=root, data_dir=target)
