"""The process settings are made before jax is there, and the allocator really keeps its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from research import runtime
from research.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

# Page faults of taking and dropping 64 MiB thirty times: a kept block is faulted in once only.
FAULTS = """
import ctypes, resource, sys
from research import runtime
assert "jax" not in sys.modules
tuned = runtime.tune_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
size = 64 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
print(int(tuned), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**env: str) -> tuple[bool, int]:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    tuned, count = map(int, result.stdout.split())
    return bool(tuned), count


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_the_tuned_allocator_maps_memory_once_and_can_be_left_alone():
    tuned, kept = faults(JAX_PLATFORMS="cpu")
    system, remapped = faults(JAX_PLATFORMS="cpu", LATHE_ALLOCATOR="system")
    accelerator, _ = faults(JAX_PLATFORMS="cuda")
    assert (tuned, system, accelerator) == (True, False, False)
    assert remapped > 20 * kept  # 30 times, less the few faults of anything else


# KiB of memory for which pages of 2 MiB were asked.
LARGE = """
from research import runtime
runtime.tune_allocator()
size = total = 0
for line in open("/proc/self/smaps"):
    name, _, rest = line.partition(":")
    size = int(rest.split()[0]) if name == "Size" else size
    total += size if name == "VmFlags" and "hg" in rest.split() else 0
print(total)
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no pages of 2 MiB by request here"
)
def test_half_of_the_memory_may_lie_in_large_pages():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", LARGE], env=env, capture_output=True, text=True, check=True
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 10
    # All but the two pages at the ends.
    assert memory // 2 - 3 * 2048 < int(result.stdout) <= memory // 2


def test_a_meaningless_allocator_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LATHE_ALLOCATOR", "jemalloc")
    with pytest.raises(UserError, match="LATHE_ALLOCATOR=jemalloc: expected tuned or system"):
        runtime.tune_allocator()


def test_xla_has_as_many_threads_as_a_quota_allows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    monkeypatch.setattr(runtime, "quota", lambda: None)
    monkeypatch.setenv("NPROC", "any")  # so that what is set below is undone
    monkeypatch.delenv("NPROC")
    runtime.bound_threads()
    assert "NPROC" not in os.environ  # XLA counts the cores itself
    monkeypatch.setattr(runtime, "quota", lambda: 1.5)
    runtime.bound_threads()
    assert os.environ["NPROC"] == "2"
    monkeypatch.setenv("NPROC", "7")
    runtime.bound_threads()
    assert os.environ["NPROC"] == "7"  # the user's own choice stays
    for meaningless in ("many", "", "0", "-1"):
        monkeypatch.setenv("NPROC", meaningless)
        with pytest.raises(UserError, match=f"NPROC={meaningless}: expected a number of threads"):
            runtime.bound_threads()


def test_the_cache_directory_comes_from_ours_then_from_jax_then_home(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "7")
    monkeypatch.setenv("LATHE_COMPILATION_CACHE", str(tmp_path / "ours"))
    assert runtime.use_compilation_cache() == str(tmp_path / "ours")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "ours")
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "7"  # the user's own choice stays
    monkeypatch.delenv("LATHE_COMPILATION_CACHE")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    assert runtime.use_compilation_cache() == str(tmp_path / "jax")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert runtime.use_compilation_cache() == str(tmp_path / ".cache" / "lathe" / "xla")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    monkeypatch.setenv("LATHE_COMPILATION_CACHE", "off")
    assert runtime.use_compilation_cache() is None
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "0"  # also where jax's own variable names a folder


@pytest.mark.parametrize("name", ["LATHE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"])
def test_a_place_that_only_jax_knows_is_left_to_it(tmp_path, name, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "any")  # so that what is set below is undone
    monkeypatch.setenv(name, "gs://bucket/cache")
    assert runtime.use_compilation_cache() == os.environ["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/cache"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("choice, expected", [("~/mine", "home/mine"), ("here", "work/here")])
def test_a_folder_may_be_told_from_home_or_from_here(
    tmp_path, choice, expected, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "any")
    monkeypatch.setenv("LATHE_COMPILATION_CACHE", choice)
    assert runtime.use_compilation_cache() == str(tmp_path / expected)
    assert (tmp_path / expected).is_dir()


def test_a_cache_that_can_not_be_made_is_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATHE_COMPILATION_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set LATHE_COMPILATION_CACHE to a folder or off"):
        runtime.use_compilation_cache()


def test_prepare_after_jax_is_a_defect():
    import jax  # noqa: F401

    with pytest.raises(RuntimeError, match="before jax is imported"):
        runtime.prepare()
