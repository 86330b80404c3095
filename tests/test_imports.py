"""Imports inside functions name what is there: a benchmark whose peer is not installed would find out late."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("research", "experiments", "kernels_pallas", "configs")


def file_of(module: str) -> Path | None:
    """The file of a module of the project, None where there is none."""
    path = ROOT.joinpath(*module.split("."))
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()]
    return found[0] if found else None


@functools.cache
def names_of(file: Path) -> set[str]:
    """What a module defines, assigns or imports; names are looked for at any depth (`if`, `try`, `with`)."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def unresolved(file: Path) -> Iterator[str]:
    """`module.name` of every import of the project's own that leads nowhere."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in PACKAGES:
            target = file_of(node.module)
            for alias in node.names:
                known = target is not None and alias.name in names_of(target)
                if (
                    not known
                    and file_of(f"{node.module}.{alias.name}") is None
                    and not is_folder(node.module, alias)
                ):
                    yield f"{node.module}.{alias.name}"


def is_folder(module: str, alias: ast.alias) -> bool:
    """Whether an import names a package without an `__init__.py`."""
    return ROOT.joinpath(*module.split("."), alias.name).is_dir()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_there(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    assert {str(f.relative_to(ROOT)): found for f in files if (found := list(unresolved(f)))} == {}


def test_a_name_that_has_moved_is_found(tmp_path):
    file = tmp_path / "late.py"
    lines = (
        "def f():",
        "from research.errors import UserError, Nothing",
        "from research import errors, gone",
    )
    file.write_text("\n    ".join(lines))
    assert list(unresolved(file)) == ["research.errors.Nothing", "research.gone"]
