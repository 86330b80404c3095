"""What all kernels share: names of implementations, and a line where LLVM is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas.common import Unsupported, check_name, choose

ROOT = Path(__file__).resolve().parents[2]

# Every kernel for a CPU, in a process that finds no llvmlite.
WITHOUT_LLVM = """
import sys
sys.modules["llvmlite"] = None
import jax.numpy as jnp
from kernels_pallas import cross_entropy, grouped_matmul, matmul, rms_norm, silu_product, skinny_matmul, ssd
from kernels_pallas import span_attention
from kernels_pallas.common import Unsupported
x, heads = jnp.ones((4, 4)), jnp.ones((1, 1, 4, 16))
calls = {
    "cross_entropy": lambda: cross_entropy.cross_entropy(x, jnp.zeros(4, int)),
    "grouped_matmul": lambda: grouped_matmul.grouped_matmul(x, x[None], jnp.array([4]), implementation="cpu"),
    "matmul": lambda: matmul.matmul(x, x),
    "rms_norm": lambda: rms_norm.rms_norm(x, x[0], 1e-5),
    "silu_product": lambda: silu_product.silu_product(x, x),
    "skinny_matmul": skinny_matmul.panel_columns,
    "span_attention": lambda: span_attention.span_attention(heads, heads, heads, 4, implementation="cpu"),
    "span_attention.takes_on_cpu": lambda: span_attention.takes_on_cpu(16),
    "ssd.takes_on_cpu": lambda: ssd.takes_on_cpu(8, 8, 4),
}
for name, call in calls.items():
    try:
        call()
    except Unsupported as error:
        assert "llvmlite is missing (" in str(error) and str(error).endswith("; pip install llvmlite"), error
        print(name)
assert matmul.matmul(x, x, implementation="reference").sum() == 64  # which needs none
print(len(calls), "called")
"""


def test_without_llvm_every_kernel_for_a_cpu_says_so():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", WITHOUT_LLVM]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert found[-2:] == ["9", "called"] and len(found) == 9 + 2


def test_names_of_implementations():
    check_name("reference", "cpu")
    assert choose("any", "gpu") == "gpu" and choose("any", None, ("tpu", "cpu")) == "cpu"
    with pytest.raises(Unsupported, match="^no implementation 'tpu': there are reference and cpu$"):
        check_name("tpu", "cpu")
    with pytest.raises(Unsupported, match="^no implementation 'cpu': there are reference, tpu and gpu$"):
        choose("any", "cpu")
    with pytest.raises(Unsupported, match="no any kernel for the backend 'cpu': there are tpu and gpu; impl"):
        choose("any", None)
