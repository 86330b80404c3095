import os
import subprocess
import sys
from pathlib import Path

import pytest

from research.data.storage import data_dir, publish
from research.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_data_dir(data_home, monkeypatch):
    assert data_dir() == data_home
    monkeypatch.delenv("LATHE_DATA_DIR")
    assert data_dir() == Path.home() / ".cache" / "lathe" / "data"


def test_publish_shows_all_or_nothing(tmp_path):
    target = tmp_path / "deep" / "target"
    with publish(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["target"]


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "target") as folder:
        (folder / "a").write_text("1")
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


def test_the_first_of_two_wins(tmp_path):
    target = tmp_path / "target"
    with publish(target) as slow:
        (slow / "who").write_text("slow")
        with publish(target) as fast:
            (fast / "who").write_text("fast")
    assert (target / "who").read_text() == "fast"
    assert os.listdir(tmp_path) == ["target"]


def test_a_killed_process_leaves_no_target(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from research.data.storage import publish\n"
        "with publish(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); os._exit(9)\n"
    )
    target = tmp_path / "target"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program, str(target)], env=env).returncode == 9
    assert not target.exists()
    with publish(target) as folder:
        (folder / "whole").write_text("x")
    assert os.listdir(target) == ["whole"]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"cannot write prepared data to .*LATHE_DATA_DIR"),
        publish(tmp_path / "file" / "target"),
    ):
        pass


def test_full_disk(tmp_path):
    with pytest.raises(UserError, match="No space left on device"), publish(tmp_path / "target"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []
