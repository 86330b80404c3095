"""A data folder of its own for every test, and a corpus small enough to follow by hand."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `LATHE_DATA_DIR` names."""
    home = tmp_path / "data_home"
    monkeypatch.setenv("LATHE_DATA_DIR", str(home))
    return home


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library: 60 different modules, near copies, and what must be left out."""
    root = tmp_path / "library"
    for i in range(60):
        path = root / f"package_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"def function_{i}_{j}(x_{i}):\n    return x_{i} ** {j} - value_{i}_{j}\n" for j in range(5)]
        path.write_text("\n".join(lines), encoding="utf-8")
    body = "".join(f"alpha_{j} = beta_{j} + gamma_{j}\n" for j in range(40))
    for i in range(12):
        (root / f"edition_{i}.py").write_text(f"# edition {i}\n{body}", encoding="utf-8")
    (root / "same.py").write_text(f"# edition 0\n{body}", encoding="utf-8")
    (root / "empty.py").write_text(" \n", encoding="utf-8")
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\r\nname = 'Gödel'\r\n".encode("latin-1"))
    (root / "broken.py").write_bytes(b"name = '\xff'\n")
    (root / "_sysconfigdata_x.py").write_text("prefix = '/home/builder'\n", encoding="utf-8")
    for folder in ("site-packages", "package_0/__pycache__"):
        (root / folder).mkdir()
        (root / folder / "other.py").write_text("installed = True\n", encoding="utf-8")
    return root
