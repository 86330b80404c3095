"""The machine code of kernels for a CPU is made once, and kept where jax keeps its programs."""

import ctypes

import jax
import numpy as np
import pytest

from kernels_pallas import cpu_compile
from kernels_pallas.cpu_code import Function

LANES = 4


def twice(name: str) -> str:
    """A function that doubles numbers: %count of them."""
    f = Function("double", "ptr %x", "i64 %count", lanes=LANES)
    for here, _, mask in f.vectors("%count", 2):
        x = f.read(f.at("%x", here), mask)
        f.write(f.fadd(x, x), f.at("%x", here), mask)
    entry = (
        f"define void @{name}(ptr %x, i64 %count) {{\n  call void @double(ptr %x, i64 %count)\n  ret void\n}}"
    )
    return "\n".join([f.text(), entry])


@pytest.fixture
def directory(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "lathe_kernels"
    jax.config.update("jax_compilation_cache_dir", before)


def run(name: str) -> np.ndarray:
    engine = cpu_compile.compile_code(twice(name))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(engine.get_function_address(name))
    x = np.arange(17, dtype=np.float32)
    function(x.ctypes.data, 15)  # a round of two vectors, one vector, three numbers of a last one
    return x


EXPECTED = [*range(0, 30, 2), 15, 16]


def test_code_is_made_once(directory, monkeypatch):
    assert run("kept").tolist() == EXPECTED
    (file,) = directory.iterdir()
    monkeypatch.setattr(cpu_compile.llvm, "create_pass_builder", None)  # nothing is made a second time
    assert run("kept").tolist() == EXPECTED
    monkeypatch.undo()
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:10], b"", whole[:40] + b"x" + whole[41:]):
        file.write_bytes(broken)
        assert run("kept").tolist() == EXPECTED and file.read_bytes() == whole


def test_a_directory_that_takes_nothing_is_named(directory):
    directory.write_text("a file")
    with pytest.warns(UserWarning, match="the machine code of a kernel can't be kept"):
        assert run("homeless").tolist() == EXPECTED


def test_nothing_is_kept_elsewhere(directory):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert run("remote").tolist() == EXPECTED and not directory.exists()
