"""What every test runs under: 8 simulated CPU devices, no network, one compilation cache for all."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# All of this must be in the environment before anything imports jax; pytest-xdist workers inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
DEVICES_FLAG = "--xla_force_host_platform_device_count"
if DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES_FLAG}=8".strip()
# Tests run each program once or twice on tiny shapes, so most of their time is compilation: leave out LLVM's
# optimizations, the emitters that set up an MLIR pipeline for every kernel (half of all compile time), and the cutting
# of a program's code into 32 modules that threads compile side by side (a fifth of what remains). None of these changes
# a program or its exactness.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {QUICK_COMPILATION}"
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: one thread each, in XLA's pool (NPROC) and in BLAS (OMP). Kernels keep their helpers.
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Tracing makes many objects and few cycles: what is imported is left out of collections, and they come less often
    (6 to 8 % of all time went into them)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


# Every compiled program maps a few pieces of memory. A process may have 65,530 of them on Linux, which a worker reaches
# before the suite ends; the next compilation then crashes. A module adds up to 22,000; to forget takes seconds.
MOST_MAPPINGS = 30_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Forgets compiled programs after a module that left many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax  # only here: the environment above must come first

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def run_program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m experiments.<name> args...` as a user does: new process, one device, in `tmp_path`."""

    def run(name: str, *args: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(DEVICES_FLAG)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags), "COLUMNS": "120"}
        environment["LATHE_COMPILATION_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
        return subprocess.run(
            [sys.executable, "-m", f"experiments.{name}", *args],
            cwd=tmp_path,
            env={**environment, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
