"""The kernels' benchmark: rooflines by hand, every entry of the catalogue runs, the pages say which tier they are."""

import jax
import numpy as np
import pytest

from experiments.bench import aot, kernels
from experiments.bench.accelerators import Accelerator
from kernels_pallas.catalogue import Case, Cost
from kernels_pallas.catalogue import kernels as catalogue
from research.errors import UserError


def test_roofline_by_hand():
    """100 FLOPs at 50 a second take 2 s, 30 bytes at 10 take 3: bound by memory. In float32 at 20 a second, 5 s."""
    roof = Accelerator("here", bfloat16=50, float32=20, bandwidth=10)
    for dtype, seconds, bound in (("bfloat16", 3.0, "memory"), ("float32", 5.0, "compute")):
        case = Case("", "small", {"dtype": dtype})
        assert roof.roofline(Cost(100, 30), case) == seconds
        assert roof.bound(Cost(100, 30), case) == bound


def test_costs_by_hand():
    """1 x 4096 times 4096 x 14336 of 4 bits: 2 * 4096 * 14336 FLOPs; half a byte a weight, two numbers of two
    bytes for every 128, and one row each of x and of the output. 32 x 4096 rows of 8 experts read all of them."""
    by_name = {kernel.name: kernel for kernel in catalogue()}
    quantized = by_name["quantized_matmul"]
    case = next(case for case in quantized.cases if case.name == "1 token, 4 bits")
    weights = 4096 * 14336
    assert quantized.cost(case) == (2 * weights, weights / 2 + 4 * weights / 128 + 2 * (4096 + 14336))
    grouped = by_name["grouped_matmul"]
    assert grouped.cost(grouped.cases[0]) == (64 * weights, 16 * weights + 64 * (4096 + 14336))


def test_every_case_has_arguments_and_a_cost():
    for kernel in catalogue():
        for case in (*kernel.cases, kernel.small):
            assert jax.tree.leaves(kernel.shapes(case)), (kernel.name, case.name)
            cost = kernel.cost(case)
            assert cost.bytes > 0 and (cost.flops > 0 or kernel.name == "append_rows")  # which only moves
            assert case.sizes["dtype"] in ("float32", "bfloat16")


def test_a_row_and_a_failure_on_the_page():
    kernel = next(kernel for kernel in catalogue() if kernel.name == "ssd_step")
    roof = Accelerator("here", 1e9, 1e9, 1e9)
    row = kernels._row(kernel, kernel.small, "reference", roof, rounds=1)
    assert row.error is None and row.fraction == pytest.approx(row.roofline / row.seconds[0])
    # 1.3 MFLOP and 2.1 MB take a CPU more than 10 us: no call was left out.
    assert row.seconds[0] > 1e-5
    failed = kernels._row(kernel, kernel.small, "tpu", roof, rounds=1)
    assert failed.error and failed.fraction is None
    text = kernels.page(kernels.Report("cpu", roof, [row, failed]), {"load": 0.5}, {"jax": "1"})
    assert "load 0.5, jax 1" in text and "No Pallas kernel ran here" in text and "**failed**" in text


def test_the_page_of_what_was_compiled():
    rows = [
        aot.Row("v5e", "ssd_step", "decode: Mamba-2 2.7B, 1 sequence", 1.0, 2**20, 2**21, 0, 0),
        aot.Row("h100", "ssd", "?", 1.0, error="too | large"),
    ]
    text = aot.page({"date": "2000-01-01", "versions": {"jax": "1"}}, rows)
    assert "2 programs, 1 failed." in text and "**failed**: too / large" in text
    assert "| 1.0 | 2.0 | 0.0 |" in text and "Nothing here was run" in text
    with pytest.raises(UserError, match="no kernel 'sdd'; did you mean ssd"):
        aot._check(["sdd"], ("ssd", "decoder"), "no kernel")


def test_what_runs_where():
    by_name = {kernel.name: kernel for kernel in catalogue()}

    def runs(name: str, platform: str) -> list[str]:
        return [implementation for _, implementation in kernels._runs(by_name[name], platform)]

    assert runs("ssd_step", "cpu") == ["reference"]
    assert runs("tree_attention", "cpu") == ["cpu", "reference"]
    assert runs("tree_attention", "gpu") == ["gpu", "reference"] * 3
    assert set(runs("skinny_matmul", "cpu")) == {"cpu", "reference"} and not runs("skinny_matmul", "tpu")


def test_what_a_case_runs_with_its_gradient():
    """The gradient of a sum of squares of x W is 2 x W W^T, of the first argument that is floating."""
    kernel = next(kernel for kernel in catalogue() if kernel.name == "grouped_matmul")
    sizes = dict(rows=4, features=8, columns=8, groups=1, dtype="float32")
    x, weights, groups = kernel.make(jax.random.key(0), **sizes)
    run = kernel.call(Case("", "small", sizes, gradient=True), "reference")
    dx, _ = run(x, weights, groups)
    np.testing.assert_allclose(dx, 2 * (x @ weights[0]) @ weights[0].T, rtol=1e-4)
