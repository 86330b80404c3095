"""Every notebook runs from top to bottom as it is, and is stored without outputs."""

import io
import json
import os
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import nbformat
import pytest
from nbclient import NotebookClient

import research.language
from configs.matlm import decoder
from research.config import build
from research.data.tokenizer import Tokenizer
from research.training.workdir import save_model
from tests.programs import drawn

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHIPPED = Path(research.language.__file__).parent / "base"


@pytest.fixture
def kernel(monkeypatch, tmp_path) -> None:
    """The process of a notebook: one device, no display, and a random model where none ships."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "host_platform_device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    if not SHIPPED.exists():
        config = decoder(width=32, num_layers=2, num_heads=2, hidden_dim=64, length=64)
        params = drawn(build(config), jnp.zeros((1, 2), jnp.int32))
        save_model(tmp_path / "model", config, params, Tokenizer.load())
        monkeypatch.setenv("LATHE_NOTEBOOK_MODEL", str(tmp_path / "model"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.execution_count is None and not cell.outputs for cell in code)
    assert code[0].source == install_cell()


def install_cell() -> str:
    """Every notebook's first code: installs Lathe where it is missing."""
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.fixture
def opened_from(monkeypatch) -> Callable[[bytes | OSError], str]:
    """What the install cell takes for the repository's address where Colab answers that."""

    def run(answer: bytes | OSError) -> str:
        def urlopen(address: str, timeout: float) -> io.BytesIO:
            assert address.endswith(":9000/api/sessions")
            if isinstance(answer, OSError):
                raise answer
            return io.BytesIO(answer)

        definitions, command = install_cell().split("\nif importlib")
        assert "%pip install -q git+{ADDRESS or opened_from()}" in command
        names: dict = {}
        exec(definitions, names)
        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return names["opened_from"]()

    return run


def test_colab_tells_the_address(opened_from):
    """A notebook that was opened from GitHub: Colab quotes the address, and a branch may have a slash."""
    place = "fileId=https%3A%2F%2Fgithub.com%2Fowner%2Fname%2Fblob%2Fnew%2Fidea%2Fnotebooks%2F01_matformer.ipynb"
    answer = json.dumps([{"name": "01_matformer.ipynb", "path": place}]).encode()
    assert opened_from(answer) == "https://github.com/owner/name@new/idea"


@pytest.mark.parametrize(
    "answer", [b'[{"path": "fileId=1AbC"}]', b"[]", b"{}", b"<html>", OSError("refused")], ids=repr
)
def test_asks_for_the_address_where_colab_does_not_tell(answer, opened_from):
    with pytest.raises(RuntimeError, match="fill in ADDRESS"):
        opened_from(answer)


def executed(name: str, folder: Path, smaller: dict[str, str] | None = None) -> tuple[str, int]:
    """What a notebook prints, and how many figures it draws; `smaller` replaces texts of its code."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for old, new in (smaller or {}).items():
        found = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        assert found, f"{old} is not in {name}"
        for cell in found:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    figures = [output for output in outputs if "image/png" in output.get("data", ())]
    return "".join(output.text for output in outputs if output.get("name") == "stdout"), len(figures)


def test_matformer(kernel, tmp_path):
    text, figures = executed("01_matformer.ipynb", tmp_path)
    assert figures == 1
    assert " nats  widths (" in text
    small, large = text.split("=== S, ")[1].split("=== XL, ")
    for written in (small, large):
        assert len(written.split("def read_file(path):\n")[1]) > 1


def test_decoding(kernel, tmp_path):
    text, figures = executed("02_decoding.ipynb", tmp_path)
    assert figures == 2
    fewer = re.search(r"the same tokens in (\d+) calls", text)
    assert fewer and int(fewer[1]) < 40


def test_moe(kernel, tmp_path):
    text, figures = executed("03_moe.ipynb", tmp_path, {"STEPS = 80": "STEPS = 25"})
    assert figures == 4
    losses = re.findall(r"held-out loss (\d\.\d+)", text)
    assert len(losses) == 2 and all(float(loss) < 7.5 for loss in losses)  # 8.3 before the first step
    assert len(re.findall(r"layer \d: distance from the average routing: digits \d+%", text)) == 3


def test_attention_maps(kernel, tmp_path):
    text, figures = executed("04_attention_maps.ipynb", tmp_path)
    assert figures == 4
    assert re.search(r"kept: 4\d%|kept: 50%", text)  # at most half, at least nine tenths of that
    dense, spread = re.search(r"cache: ([\d,]+) bytes dense, ([\d,]+) with", text).groups()
    assert int(spread.replace(",", "")) < 0.6 * int(dense.replace(",", ""))
    assert re.search(r"the first 24 of 24 tokens are the dense model's\n$", text)


def test_towers(kernel, tmp_path):
    smaller = {"STEPS = 500": "STEPS = 4", "COUNT = 64": "COUNT = 16", "SHOWN = 4": "SHOWN = 1", "[:3]": "[:1]"}
    text, figures = executed("06_towers.ipynb", tmp_path, smaller | {"subplots(3, 1 +": "subplots(1, 1 +"})
    assert figures == 3
    assert re.search(r"right: \d+% of 16, without seeing \d+%", text)
    crops = dict(re.findall(r"^(\S+): (\d+) crops", text, re.MULTILINE))
    assert crops == {"LLaVA": "1", "LLaVA-UHD": "7", "Dragonfly": "29", "INF-LLaVA": "9", "EVE": "2"}


def test_sweep(kernel, tmp_path, monkeypatch):
    """Two trials of two steps, as the notebook runs six of many."""
    monkeypatch.setenv("LATHE_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("LATHE_COMPILATION_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])
    text, figures = executed(
        "07_sweep.ipynb",
        tmp_path,
        {"(1.0, 1.0), (4.0, 1.0), (1.0, 4.0)": "(1.0, 1.0),", "(1e-2, 3e-3)": "(1e-2, 0.0)"},
    )
    assert figures == 3
    assert "trial 000: done" in text and "trial 001: done" in text
    losses = re.findall(r"^\d{3}  .*  (\d\.\d+)$", text, re.MULTILINE)
    assert len(losses) == 2 and all(8 < float(loss) < 9 for loss in losses)  # ln 4096 = 8.3, two steps later
