"""Imports, those inside functions too, name what is there and go in the directions of docs/architecture.md."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("research", "experiments", "kernels_pallas", "configs")

BASE = {f"research.{name}" for name in ("errors", "paths", "config", "config_names", "config_types")}
BASE |= {"research.config_capture"}
LAYERS = {"kernels_pallas", "research.nn", *BASE}
PROTOCOLS = {f"research.{name}" for name in ("training", "data", "decoding")}
EFFICIENCY = {f"research.{name}" for name in ("elastic", "moe", "ssm", "sparse", "compression", "adapters")}
DOMAINS = {f"research.{name}" for name in ("language", "vision", "multimodal")}
RESEARCH = {"research.interop", "research.runtime", *LAYERS, *PROTOCOLS, *EFFICIENCY, *DOMAINS}
# What each part may import, besides itself.
MAY_IMPORT = {
    "kernels_pallas": set(),
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(("research.nn", "research.runtime"), {"kernels_pallas", *BASE}),
    **dict.fromkeys(PROTOCOLS, LAYERS | PROTOCOLS),
    **dict.fromkeys(EFFICIENCY, LAYERS | PROTOCOLS),
    **dict.fromkeys(DOMAINS, LAYERS | PROTOCOLS | EFFICIENCY),
    "research.interop": RESEARCH,
    "configs": RESEARCH,
    "experiments": {"configs", *RESEARCH},
}
# Within a row: experts of LoRA are a mixture of experts; a model that reads images holds a decoder.
BESIDE = {("research/adapters/mole.py", "research.moe"), ("research/multimodal", "research.language")}


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


@functools.cache
def imports_of(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of the project's own; the name is empty in `import module`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in PACKAGES]


def unresolved(file: Path) -> Iterator[str]:
    """`module.name` of every import of the project's own that leads nowhere."""
    for module, name in imports_of(file):
        target = file_of(module)
        known = target is not None and (not name or name in names_of(target))
        if not known and file_of(f"{module}.{name}") is None and not is_folder(module, name):
            yield f"{module}.{name}"


def is_folder(module: str, name: str) -> bool:
    """Whether an import names a package without an `__init__.py`."""
    return ROOT.joinpath(*module.split("."), name).is_dir()


def part_of(module: str) -> str:
    """The part of the architecture: `research.nn` of `research.nn.mlp`, `configs` of `configs.matlm`."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "research" else names[0]


def misdirected(file: Path, place: str) -> Iterator[str]:
    """Parts that a file at `place` in the repository imports although its own may not."""
    part = part_of(place.removesuffix(".py").replace("/", "."))
    for module, name in imports_of(file):
        other = part_of(f"{module}.{name}" if module == "research" else module)
        beside = any(place.startswith(folder) and other == sibling for folder, sibling in BESIDE)
        if other not in {part, *MAY_IMPORT[part]} and not beside:
            yield other


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_there(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    assert {str(f.relative_to(ROOT)): found for f in files if (found := list(unresolved(f)))} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down_the_layers(package):
    places = {file: str(file.relative_to(ROOT)) for file in (ROOT / package).rglob("*.py")}
    assert {place: found for file, place in places.items() if (found := list(misdirected(file, place)))} == {}


def test_an_import_upwards_is_found(tmp_path):
    file = tmp_path / "any.py"
    file.write_text(
        "import research.moe.layer\nfrom research.nn import mlp\ndef f():\n    from research import vision"
    )
    assert list(misdirected(file, "research/training/any.py")) == ["research.moe", "research.vision"]
    assert list(misdirected(file, "research/nn/any.py")) == ["research.moe", "research.vision"]
    assert list(misdirected(file, "research/adapters/mole.py")) == ["research.vision"]
    assert list(misdirected(file, "research/multimodal/any.py")) == ["research.vision"]
    assert list(misdirected(file, "research/interop/any.py")) == []


def test_a_name_that_has_moved_is_found(tmp_path):
    file = tmp_path / "late.py"
    lines = (
        "def f():",
        "from research.errors import UserError, Nothing",
        "from research import errors, gone",
    )
    file.write_text("\n    ".join(lines))
    assert list(unresolved(file)) == ["research.errors.Nothing", "research.gone"]
