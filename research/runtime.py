"""What must happen to the process before jax is imported: the allocator, the threads and the compilation cache.

`experiments/cli.py` is the only caller: a library that is imported must not change the process of its user.

Environment:
  LATHE_ALLOCATOR=system          leave malloc alone.
  LATHE_COMPILATION_CACHE=DIR     where compiled programs are kept (default ~/.cache/lathe/xla), or `off`. A folder,
                                  or a place that jax knows, such as gs://bucket/folder.
  NPROC=N                         XLA's threads on a CPU (default: as many as the cores this process may use).
"""

import ctypes
import errno
import mmap
import os
import platform
import sys
from pathlib import Path

from kernels_pallas.cores import cores, quota
from research.errors import UserError
from research.paths import expand

# mallopt parameters of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_LARGE_PAGE = 2 << 20
_LEAST_HEAP = 1 << 30


def prepare() -> None:
    """Tunes the allocator, bounds XLA's threads and turns the compilation cache on. Call it once, before jax is
    imported.

    Raises:
      UserError: an environment variable has a value that means nothing, or the cache can't be written.
      RuntimeError: jax is imported already, so that it would be too late for all of them.
    """
    if "jax" in sys.modules:
        raise RuntimeError("research.runtime.prepare() must run before jax is imported")
    tune_allocator()
    bound_threads()
    use_compilation_cache()


def tune_allocator() -> bool:
    """Makes glibc keep the memory it freed. Returns whether it did.

    XLA on CPU takes its temporaries (half a gigabyte for a small model) afresh each step. By default glibc
    maps and unmaps them, and the kernel zeroes every page again: a fifth to a half of a training step. All
    three settings are needed: no mmap for large blocks, no trimming at all (the largest threshold, 2 GiB,
    would trim every step of a larger model), and one arena, because XLA's threads would use their own. The
    price: freed memory is not given back to the system. The heap is in large pages where the system has them.

    Applies to Linux with glibc where the CPU computes; nothing is done elsewhere or with
    LATHE_ALLOCATOR=system.
    """
    choice = os.environ.get("LATHE_ALLOCATOR", "tuned")
    if choice not in ("tuned", "system"):
        raise UserError(f"LATHE_ALLOCATOR={choice}: expected tuned or system")
    if choice == "system" or not _is_cpu_only() or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    tuned = all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)
    if tuned:
        _ask_for_large_pages(libc)
    return tuned


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap once, by half of the memory or what a limit leaves, and asks for pages of 2 MiB in what it grew
    by. Memory is taken only when it is touched.

    Training steps took 0.90 to 0.93 of the time at 1M parameters, 0.96 at 6M, with as much memory resident.
    """
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    heap = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    while heap >= _LEAST_HEAP:
        block = libc.malloc(heap)
        if block is not None:
            start = -(-block // _LARGE_PAGE) * _LARGE_PAGE
            libc.madvise(start, heap - 2 * _LARGE_PAGE, mmap.MADV_HUGEPAGE)
            libc.free(block)
            return
        heap //= 2  # a limit on address space


def bound_threads() -> None:
    """Gives XLA as many threads as a container's quota lets compute at once, unless NPROC is set already.

    XLA knows the affinity mask and no quota: with 64 threads for 2 cores' worth of time, each product would wait for
    threads that the system has stopped.

    Raises UserError for an NPROC that XLA would ignore without a word.
    """
    chosen = os.environ.get("NPROC")
    if chosen is not None and not (chosen.isdecimal() and int(chosen) > 0):
        raise UserError(f"NPROC={chosen}: expected a number of threads")
    if chosen is None and quota() is not None:
        os.environ["NPROC"] = str(cores())


def use_compilation_cache() -> str | None:
    """Points jax at a persistent compilation cache that keeps every program. Returns where it is, None where it is off.

    Small programs are kept too (jax's own thresholds skip them): the dozens that initialisation compiles cost
    as much as the training step. What the user set through jax's own variables is left as it is.
    """
    choice = os.environ.get("LATHE_COMPILATION_CACHE")
    if choice == "off":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
        return None
    place = choice or os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/lathe/xla"
    if "://" not in place:  # those are jax's to open
        place = str(_writable_folder(expand(place).absolute()))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = place
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    return place


def _writable_folder(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"compilation cache {directory}: {error.strerror}; set LATHE_COMPILATION_CACHE to a folder or off"
        ) from error
    return directory


def _is_cpu_only() -> bool:
    """Whether jax will compute on the CPU, told without importing it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    accelerators = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")  # NVIDIA, AMD, TPU, TPU
    return not any(os.path.exists(device) for device in accelerators)
