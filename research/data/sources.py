"""Where documents come from: one string names a source of text, whatever it is stored in.

    builtin, stdlib         Python's standard library (research.data.stdlib_code)
    arithmetic              generated sums in sentences (research.data.arithmetic)
    tfds:NAME[#FIELD]       a TFDS dataset, e.g. tfds:lm1b or tfds:wikipedia/20230601.en#text
    jsonl:PATH:FIELD        one JSON object a line; PATH may be a glob, and end in .gz
    hf:ID[@CONFIG][#FIELD]  a dataset of the Hugging Face `datasets` library
    PATH                    a text file, a glob of them, or a folder: one document a file

A PATH may hold `{split}`. Where it does not, files have no splits of their own, and each document belongs to
one by a hash of its text: about 92 % `train`, 4 % `validation` and 4 % `test`, equal texts on one side. Split
`all` takes every document.
"""

import functools
import glob
import gzip
import hashlib
import json
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from research.data.arithmetic import Arithmetic
from research.data.stdlib_code import SPLITS, Progress
from research.data.stdlib_code import prepare as prepare_stdlib
from research.errors import UserError, nearest
from research.paths import expand

_HELD_OUT = 0.04
_KINDS = ("builtin", "stdlib", "arithmetic", "tfds:", "jsonl:", "hf:")


class TextSource(Protocol):
    """Documents in a fixed order, read one at a time.

    `fingerprint` names the content (including the split) and is cheap: it doesn't read the documents.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_source(spec: str, split: str, progress: Progress | None = None) -> TextSource:
    """Opens the split `split` of the source that `spec` names.

    Raises:
      UserError: unknown kind, no such file, data set or split, or a library that isn't installed. What is
        wrong inside a file is raised when it is read: bad JSON (file and line), a missing field (the nearest
        one), bytes that are not UTF-8, a split without documents.
    """
    if not spec.strip():
        raise UserError(
            f"source {spec!r} is empty: name a source, as in builtin or texts/*.txt; . is this folder"
        )
    kind, colon, rest = spec.partition(":")
    if spec in ("builtin", "stdlib"):
        builder = prepare_stdlib(progress=progress)
        return TfdsText(builder, split, "text", f"builtin {Path(builder.data_dir).parents[1].name}")
    if spec == "arithmetic":
        return Arithmetic(split)
    if colon and kind == "tfds":
        name, _, field = rest.partition("#")
        return TfdsText(tfds_builder(name), split, field, f"tfds {name}")
    if colon and kind == "jsonl":
        pattern, colon, field = rest.rpartition(":")
        if not colon or not field or not pattern:
            raise UserError(
                f"{spec}: a JSONL source is written jsonl:PATH:FIELD, as in jsonl:data.jsonl:text"
            )
        return JsonLines(pattern, field, split)
    if colon and kind == "hf":
        return HuggingFaceText(rest, split)
    return TextFiles(spec, split)


class _Files:
    """What sources made of files share: which files, the split, and the index of documents on first use."""

    def __init__(self, pattern: str, split: str):
        self._named = "{split}" in pattern
        if not self._named and split not in (*SPLITS, "all"):
            hint = did_you_mean(split, (*SPLITS, "all"))
            raise UserError(
                f"{pattern}: files have the splits {', '.join(SPLITS)} and all, not {split!r}{hint}"
            )
        self._pattern, self._split = pattern, split
        self._paths = matching_files(pattern.replace("{split}", split))
        stats = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in self._paths]
        self.fingerprint = digest(type(self).__name__, None if self._named else split, stats)

    def _belongs(self, text: str) -> bool:
        return self._named or self._split in ("all", hashed_split(text))

    def _scan(self) -> Iterator[tuple[Any, str]]:
        """Yields (how to find the document again, its text) for every document of the files."""
        raise NotImplementedError

    @functools.cached_property
    def _index(self) -> list[Any]:
        found, total = [], 0
        for key, text in self._scan():
            if text:
                total += 1
                if self._belongs(text):
                    found.append(key)
        if not total:
            raise UserError(f"{self._pattern}: the corpus is empty: no text in {len(self._paths)} files")
        if not found:
            raise UserError(
                f"{self._pattern}: split {self._split} is empty: a hash of the text puts none of the {total} "
                "documents there; use split all, or files of your own with {split} in the path"
            )
        return found

    def __len__(self) -> int:
        return len(self._index)


class TextFiles(_Files):
    """Text files in order of path, each a document. UTF-8, line ends kept."""

    def _scan(self) -> Iterator[tuple[Path, str]]:
        return ((path, self._read(path)) for path in self._paths)

    def _read(self, path: Path) -> str:
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{path} is not UTF-8 text: byte {error.start} is {byte:#x}") from error

    def __getitem__(self, index: int) -> str:
        return self._read(self._index[index])


class JsonLines(_Files):
    """One JSON object a line, its text in the field `field`; blank lines don't count."""

    def __init__(self, pattern: str, field: str, split: str):
        super().__init__(pattern, split)
        self._field = field
        self.fingerprint = digest(self.fingerprint, field)
        self._lock = threading.Lock()  # a handle has one position

    @functools.cached_property
    def _handles(self) -> dict[Path, IO[bytes]]:
        return {path: gzip.open(path) if path.suffix == ".gz" else path.open("rb") for path in self._paths}

    def _scan(self) -> Iterator[tuple[tuple[Path, int, int], str]]:
        for path, handle in self._handles.items():
            handle.seek(0)
            offset = 0
            try:
                for number, line in enumerate(handle, 1):
                    if line.strip():
                        yield (path, number, offset), self._text(path, number, line)
                    offset += len(line)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path} can't be read after byte {offset}: {error}") from error

    def _text(self, path: Path, number: int, line: bytes) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a {type(record).__name__} and not a JSON object")
        if self._field not in record:
            raise UserError(f"{path}, line {number}: {missing_field(self._field, record)}")
        return checked_text(record[self._field], f"{path}, line {number}: field {self._field}")

    def __getitem__(self, index: int) -> str:
        path, number, offset = self._index[index]
        with self._lock:
            self._handles[path].seek(offset)
            line = self._handles[path].readline()
        return self._text(path, number, line)


class TfdsText:
    """The text feature `field` of a prepared TFDS dataset; by default `text`, or the only one."""

    def __init__(self, builder: Any, split: str, field: str, name: str):
        self._name = name
        self._records = tfds_records(builder, split, name)
        self._field = field or _only_text_field(builder, name)
        if self._field not in builder.info.features:
            raise UserError(f"{name}: {missing_field(self._field, builder.info.features)}")
        self.fingerprint = digest(name, builder.info.full_name, split, self._field, len(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        value = self._records[index][self._field]
        return checked_text(value.decode("utf-8") if isinstance(value, bytes) else value, self._name)


class HuggingFaceText:
    """The column `FIELD` (default `text`) of a dataset of the `datasets` library."""

    def __init__(self, spec: str, split: str):
        rest, _, field = spec.partition("#")
        name, _, config = rest.partition("@")
        field = field or "text"
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"hf:{spec} needs the datasets library: pip install datasets") from error
        try:
            self._records = datasets.load_dataset(name, config or None, split=split)
        except (ValueError, OSError) as error:  # unknown id, configuration or split; no network
            raise UserError(f"hf:{spec}: cannot load split {split}: {error}") from error
        if field not in self._records.column_names:
            raise UserError(f"hf:{spec}: {missing_field(field, self._records.column_names)}")
        if not len(self._records):
            raise UserError(f"hf:{spec}: split {split} is empty")
        self._field, self._name = field, f"hf:{spec}"
        self.fingerprint = digest("hf", name, config, split, field, self._records._fingerprint)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        return checked_text(self._records[index][self._field], f"{self._name}, row {index}: {self._field}")


def tfds_builder(name: str) -> Any:
    """The prepared TFDS builder `name` (`dataset[/config][:version]`), looked up where TFDS keeps its data.

    A dataset that isn't prepared yet is downloaded and written as ArrayRecord files.

    Raises:
      UserError: no such dataset, or it can't be prepared.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        hint = did_you_mean(name.partition("/")[0].partition(":")[0], known)
        raise UserError(f"tfds:{name}: no such dataset{hint}") from error
    except ValueError as error:
        raise UserError(f"tfds:{name}: {error}") from error
    if not Path(builder.data_dir).is_dir():
        try:
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            builder.download_and_prepare(file_format="array_record", download_config=config)
        except ImportError as error:
            raise UserError(
                f"tfds:{name}: preparing this dataset needs the module {error.name}; prepare it once with "
                f"`tfds build --file_format=array_record` where that is installed, in {builder.data_dir}"
            ) from error
        except OSError as error:
            raise UserError(f"tfds:{name}: cannot prepare it in {builder.data_dir}: {error}") from error
    return builder


def tfds_records(builder: Any, split: str, name: str) -> Any:
    """The random-access records of `split`.

    Raises:
      UserError: no such split (the nearest one), an empty one, or files in a format without random access.
    """
    base = split.partition("[")[0]
    if base not in builder.info.splits:
        there = ", ".join(sorted(builder.info.splits)) or "none"
        hint = did_you_mean(base, builder.info.splits)
        raise UserError(f"{name}: no split {base!r}; it has {there}{hint}")
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise UserError(
            f"{name}: {builder.data_dir} is not in ArrayRecord format; tfds convert_format makes it so"
        ) from error
    if not len(records):
        raise UserError(f"{name}: split {split} is empty")
    return records


def missing_field(field: str, options: Iterable[str]) -> str:
    """The sentence about a field that isn't there."""
    options = sorted(options)
    return f"no field {field!r}{did_you_mean(field, options) or '; there are ' + ', '.join(options)}"


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of a sentence about a wrong `name`: the nearest option, or nothing."""
    hint = nearest(name, options)
    return f"; did you mean {hint}?" if hint else ""


def checked_text(value: Any, where: str) -> str:
    """`value` if it is Unicode text; else the error says `where` it stands."""
    if not isinstance(value, str):
        raise UserError(f"{where} is a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not Unicode text: {error}") from error
    return value


def matching_files(pattern: str) -> list[Path]:
    """The files that `pattern` (a path, a glob with `**`, or a folder) names, sorted.

    Raises:
      UserError: none; names the nearest file of that folder or the nearest kind of source.
    """
    expanded = str(expand(pattern))
    if Path(expanded).is_dir():
        expanded = f"{glob.escape(expanded)}/**"
    paths = sorted(p for p in map(Path, glob.glob(expanded, recursive=True)) if p.is_file())
    if not paths:
        folder = Path(expanded).parent
        siblings = [str(p) for p in folder.iterdir()] if folder.is_dir() else []
        # A kind has no suffix: what has one is meant to be a file.
        kinds = () if Path(pattern).suffix else _KINDS
        hint = did_you_mean(pattern, kinds) or did_you_mean(expanded, siblings)
        raise UserError(f"no file matches {pattern!r}{hint}")
    return paths


def hashed_split(text: str) -> str:
    """The split that a document of files without splits belongs to."""
    draw = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    if draw < _HELD_OUT:
        return "validation"
    return "test" if draw < 2 * _HELD_OUT else "train"


def _only_text_field(builder: Any, name: str) -> str:
    import tensorflow_datasets as tfds

    features = builder.info.features.items()
    fields = [key for key, feature in features if isinstance(feature, tfds.features.Text)]
    if "text" in fields:
        return "text"
    if len(fields) != 1:
        there = ", ".join(sorted(builder.info.features))
        raise UserError(f"{name}: which field is the text? Write tfds:NAME#FIELD; there are {there}")
    return fields[0]


def digest(*parts: object) -> str:
    """A fingerprint of what names some content."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
