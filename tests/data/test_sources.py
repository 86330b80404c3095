import gzip
import json
import sys
import types

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from research.data import sources, stdlib_code
from research.data.sources import hashed_split, open_source
from research.errors import UserError


def read(source) -> list[str]:
    return [source[i] for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(100):
        (root / f"{i:03}.txt").write_bytes(f"text number {i}\r\n".encode())
    return root


def write_lines(path, *records):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_builtin(library, monkeypatch):
    monkeypatch.setattr(stdlib_code, "stdlib_root", lambda: library)
    source = open_source("builtin", "train")
    texts = read(source)
    assert "# edition 0\nalpha_0 = beta_0 + gamma_0\n" in "".join(texts)
    assert open_source("stdlib", "train").fingerprint == source.fingerprint
    assert open_source("builtin", "test").fingerprint != source.fingerprint
    with pytest.raises(UserError, match="no split 'valid'; .*did you mean validation?"):
        open_source("builtin", "validation"[:5])


def test_files_and_their_splits(folder):
    everything = read(open_source(f"{folder}/*.txt", "all"))
    assert everything == [f"text number {i}\r\n" for i in range(100)]  # in order of path, bytes kept
    parts = {split: read(open_source(str(folder), split)) for split in ("train", "validation", "test")}
    assert sorted(sum(parts.values(), [])) == sorted(everything)
    for split, texts in parts.items():
        assert texts and all(hashed_split(text) == split for text in texts)
    (folder / "again.txt").write_bytes((folder / "000.txt").read_bytes())
    where = [split for split in parts if everything[0] in read(open_source(str(folder), split))]
    assert len(where) == 1  # equal texts on one side


def test_named_splits(tmp_path):
    for split in ("train", "held"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(split)
    assert read(open_source(f"{tmp_path}/{{split}}/*.txt", "held")) == ["held"]
    with pytest.raises(UserError, match=r"no file matches .*did you mean .*/train\?"):
        open_source(f"{tmp_path}/{{split}}", "trian")


def test_fingerprint_follows_the_files(folder):
    pattern = f"{folder}/*.txt"
    before = open_source(pattern, "all").fingerprint
    assert open_source(pattern, "all").fingerprint == before
    assert open_source(pattern, "train").fingerprint != before
    (folder / "000.txt").write_text("changed")
    assert open_source(pattern, "all").fingerprint != before


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_json_lines(tmp_path, name):
    path = write_lines(tmp_path / name, {"text": "é\n"}, "", {"id": 3, "text": "second"}, {"text": "third"})
    source = open_source(f"jsonl:{path}:text", "all")
    assert [source[i] for i in (2, 0, 1)] == ["third", "é\n", "second"]
    assert open_source(f"jsonl:{path}:id", "all").fingerprint != source.fingerprint


def test_json_lines_from_several_files(tmp_path):
    for i in range(3):
        write_lines(tmp_path / f"part-{i}.jsonl", {"body": f"a{i}"}, {"body": f"b{i}"})
    source = open_source(f"jsonl:{tmp_path}/part-*.jsonl:body", "all")
    assert read(source) == ["a0", "b0", "a1", "b1", "a2", "b2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"data.jsonl, line 2: not JSON: "),
        pytest.param("[" * 100_000, r"data.jsonl, line 2: not JSON: maximum recursion depth", id="deep"),
        ("[1]", r"data.jsonl, line 2: a list and not a JSON object"),
        ('{"txt": "x"}', r"data.jsonl, line 2: no field 'text'; did you mean txt\?"),
        ('{"q": "x", "z": 1}', r"data.jsonl, line 2: no field 'text'; there are q, z"),
        ('{"text": 5}', r"data.jsonl, line 2: field text is a int, not text"),
        ('{"text": "\\ud83d"}', r"data.jsonl, line 2: field text is not Unicode text"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    path = write_lines(tmp_path / "data.jsonl", {"text": "fine"}, line)
    with pytest.raises(UserError, match=message):
        len(open_source(f"jsonl:{path}:text", "all"))


def test_damaged_files(tmp_path):
    whole = write_lines(
        tmp_path / "whole.jsonl.gz", *({"text": f"line {i}"} for i in range(100))
    ).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.jsonl.gz can't be read after byte \d+"):
        len(open_source(f"jsonl:{tmp_path}/cut.jsonl.gz:text", "all"))
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="bad.txt is not UTF-8 text: byte 3 is 0xff"):
        len(open_source(f"{tmp_path}/bad.txt", "all"))


def test_empty_corpus_and_empty_split(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="the corpus is empty: no text in 1 files"):
        len(open_source(f"{tmp_path}/*.txt", "all"))
    (tmp_path / "a.txt").write_text("one document")
    other = next(s for s in ("train", "test") if s != hashed_split("one document"))
    with pytest.raises(
        UserError, match=f"split {other} is empty: a hash of the text puts none of the 1 documents"
    ):
        len(open_source(f"{tmp_path}/*.txt", other))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("buitlin", r"no file matches 'buitlin'; did you mean builtin\?"),
        ("{folder}/00.txt", r"no file matches .*; did you mean .*/000.txt\?"),
        ("jsonl:data.jsonl", r"written jsonl:PATH:FIELD"),
        ("jsonl:{folder}/none.jsonl:text", r"no file matches .*none.jsonl"),
        ("jsonl:none.jsonl:text", r"^no file matches 'none.jsonl'$"),
        ("", "source '' is empty: name a source, as in builtin"),
    ],
)
def test_wrong_names(folder, spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec.format(folder=folder), "train")
    with pytest.raises(UserError, match=r"not 'vaildation'; did you mean validation\?"):
        open_source(str(folder), "vaildation")


class TinyText(tfds.core.GeneratorBasedBuilder):
    """A dataset as the TFDS catalogue has them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"prompt": text, "answer": text}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"prompt": f"question {i}", "answer": f"answer {i}"}


def test_tfds(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    assert read(open_source("tfds:tiny_text#answer", "test")) == ["answer 0", "answer 1"]
    assert read(open_source("tfds:tiny_text#prompt", "train[2:4]")) == ["question 2", "question 3"]
    assert list(tmp_path.glob("tiny_text/1.0.0/*.array_record*"))
    with pytest.raises(UserError, match="which field is the text.*there are answer, prompt"):
        open_source("tfds:tiny_text", "train")
    with pytest.raises(UserError, match=r"no field 'anwser'; did you mean answer\?"):
        open_source("tfds:tiny_text#anwser", "train")
    with pytest.raises(UserError, match=r"no split 'tset'; it has test, train; did you mean test\?"):
        open_source("tfds:tiny_text#answer", "tset")
    with pytest.raises(UserError, match=r"tfds:tiny_txt: no such dataset; did you mean tiny_text\?"):
        open_source("tfds:tiny_txt", "train")


class Rows(list):
    """As much of `datasets.Dataset` as is used."""

    _fingerprint = "abc"
    column_names = ["body"]


def test_hugging_face(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="hf:org/name needs the datasets library: pip install datasets"):
        open_source("hf:org/name", "train")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if split != "train":
            raise ValueError(f"Unknown split {split!r}")
        return Rows([{"body": "x"}, {"body": None}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = open_source("hf:org/name@en#body", "train")
    assert asked == [("org/name", "en", "train")]
    assert (len(source), source[0]) == (2, "x")
    with pytest.raises(UserError, match="hf:org/name@en#body, row 1: body is a NoneType, not text"):
        _ = source[1]
    with pytest.raises(UserError, match="no field 'text'; there are body"):
        open_source("hf:org/name", "train")
    with pytest.raises(UserError, match="cannot load split test: Unknown split 'test'"):
        open_source("hf:org/name", "test")


def test_kinds_are_the_documented_ones():
    for kind in sources._KINDS:
        assert kind in sources.__doc__
