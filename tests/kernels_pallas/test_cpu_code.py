"""Code written by Python: what it reads of XLA's call."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import cpu
from kernels_pallas.cpu import Kernel
from kernels_pallas.cpu_code import Function


def test_operands_and_results_are_told_apart_and_have_their_sizes_and_numbers():
    """x float32[2, 3, 5], places int32[2] -> the sizes of x and of the second result, int32[4]; x at the places."""
    f = Function("execute", "ptr %frame", lanes=4)
    x, places = f.array("%frame", 0), f.array("%frame", 1)
    named = f.arrays("%frame", {"sizes": -1, "found": -2})
    for i, size in enumerate([*x.dims(3), named["found"].dim(0)]):
        named["sizes"].set_whole(i, size)
    for i in range(2):
        f.store(f.load(f.at(x.data, places.whole(i)), "float"), f.at("%found", i), "float")
    name = Kernel("lathe_test_reads", f.text()).register()

    results = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.float32)
    values = jnp.arange(30, dtype=jnp.float32).reshape(2, 3, 5)
    sizes, found = jax.jit(jax.ffi.ffi_call(name, results))(values, jnp.array([29, 7], jnp.int32))
    np.testing.assert_array_equal(sizes, [2, 3, 5, 2])
    np.testing.assert_array_equal(found, [29, 7])


def test_threads_that_ask_at_once_make_a_kernel_once(monkeypatch):
    made = []

    def slowly(code: str):
        made.append(code)
        time.sleep(0.1)  # the others ask meanwhile
        return compiled(code)

    compiled = cpu.compile_code
    monkeypatch.setattr(cpu, "compile_code", slowly)
    code = Function("execute", "ptr %frame", lanes=4).text()
    names = []
    ask = lambda: names.append(Kernel("lathe_test_asked_at_once", code).register())  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["lathe_test_asked_at_once"] * 4 and len(made) == 1
