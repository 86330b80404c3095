import collections
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from research.data import stdlib_code
from research.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def read(builder, split):
    records = builder.as_data_source(split)
    return {(r := records[i])["path"].decode(): r["text"].decode() for i in range(len(records))}


def test_documents(library):
    documents, undecodable = stdlib_code.read_documents(library)
    texts = {d.path: d.text for d in documents}
    assert undecodable == ["broken.py"]
    assert texts["latin.py"] == "# -*- coding: latin-1 -*-\r\nname = 'Gödel'\r\n"
    assert "edition_0.py" in texts and "same.py" not in texts  # of equal texts the first in order of path
    for left_out in (
        "empty.py",
        "_sysconfigdata_x.py",
        "site-packages/other.py",
        "package_0/__pycache__/other.py",
    ):
        assert left_out not in texts
    assert len(documents) == 60 + 12 + 1
    assert [d.path for d in documents] == sorted(texts)


def test_splits_keep_near_copies_on_one_side(library):
    documents, _ = stdlib_code.read_documents(library)
    splits = dict(zip([d.path for d in documents], stdlib_code.assign_splits(documents), strict=True))
    assert {splits[f"edition_{i}.py"] for i in range(12)} == {"train"}
    # Without its copies a file is placed by its path alone, and some of the twelve would be held out.
    alone = {d.path: stdlib_code.assign_splits([d])[0] for d in documents}
    assert {alone[f"edition_{i}.py"] for i in range(12)} != {"train"}
    for path, split in splits.items():
        if not path.startswith("edition_"):
            assert split == alone[path]
    counts = collections.Counter(splits.values())
    assert counts["train"] > counts["validation"] > 0 and counts["test"] > 0


def test_builder_writes_what_the_files_hold(library):
    builder = stdlib_code.prepare(library)
    documents, undecodable = stdlib_code.read_documents(library)
    parts = [read(builder, split) for split in stdlib_code.SPLITS]
    assert sum(map(len, parts)) == len(documents)  # disjoint
    assert {**parts[0], **parts[1], **parts[2]} == {d.path: d.text for d in documents}
    assert builder.info.metadata["undecodable"] == undecodable
    assert builder.info.file_format.value == "array_record"


def test_prepares_once_and_again_for_other_files(library):
    calls = []
    stdlib_code.prepare(library, lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == [0, 1]
    stdlib_code.prepare(library, lambda *call: calls.append(call))
    assert len(calls) == 2
    (library / "new.py").write_text("new = 1\n")
    builder = stdlib_code.prepare(library, lambda *call: calls.append(call))
    assert len(calls) == 4
    assert any("new.py" in read(builder, split) for split in stdlib_code.SPLITS)


def test_no_source(tmp_path):
    with pytest.raises(UserError, match="no Python source below"):
        stdlib_code.prepare(tmp_path)


PASS = """
import socket, sys
from pathlib import Path

def refuse(*args, **kwargs):
    raise RuntimeError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
from research.data import stdlib_code
stdlib_code.stdlib_root = lambda: Path(sys.argv[1])
from research.data.text import TokenDataset
dataset = TokenDataset("builtin", length=128)
batches = list(dataset.batches(0, 8, epochs=1))
print(len(dataset), sum(int(b["target_bytes"].sum()) for b in batches))
print("tensorflow" in sys.modules)
"""


def test_full_pass_over_real_modules_in_two_processes_without_tensorflow_or_network(data_home):
    root = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PASS, str(root)]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    train = read(stdlib_code.prepare(root), "train")
    for rows, text_bytes, has_tensorflow in outputs:
        assert int(rows) > 0
        assert int(text_bytes) == sum(len(text.encode()) for text in train.values())
        assert has_tensorflow == "False"
    assert not list(data_home.rglob(".*-*"))  # no scratch folder is left
