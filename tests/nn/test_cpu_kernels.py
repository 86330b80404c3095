"""Whether the kernels for a CPU compute, and that nobody is left in the dark where they don't."""

import jax
import pytest

from kernels_pallas.common import Unsupported
from research.errors import UserError
from research.nn import cpu_kernels
from research.nn.cpu_kernels import use_cpu_kernels


def test_they_do_on_a_cpu_that_is_alone():
    assert use_cpu_kernels()
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert not use_cpu_kernels()


def test_they_can_be_turned_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LATHE_CPU_KERNELS", "off")
    assert not use_cpu_kernels()
    monkeypatch.setenv("LATHE_CPU_KERNELS", "no")
    with pytest.raises(UserError, match="LATHE_CPU_KERNELS=no: expected on or off"):
        use_cpu_kernels()


def test_a_processor_without_them_is_named_once(monkeypatch: pytest.MonkeyPatch, recwarn):
    def missing() -> int:
        raise Unsupported("no such processor")

    monkeypatch.setattr(cpu_kernels, "panel_columns", missing)
    cpu_kernels._there_are_kernels.cache_clear()
    try:
        assert not use_cpu_kernels() and not use_cpu_kernels()
    finally:
        cpu_kernels._there_are_kernels.cache_clear()
    (line,) = recwarn
    assert "without the kernels for a CPU, and slower: no such processor" in str(line.message)
