"""The benchmark of decoding by bits: every way is measured at a tiny size, and its bytes are those that are held."""

import pytest

from experiments.bench import quant, turns
from experiments.bench.shapes import Shape


def test_measures_every_way(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    lines = []
    shape = Shape("tiny", 64, 1, 2, 64, 32)
    rows = quant.run(shape, batches=(2,), rounds=1, new_tokens=3, report=lines.append)
    assert [row.kind for row in rows] == ["float32", "bfloat16", "int8", "int4", "int2"]
    assert rows[0].ratio == 1 and all(min(row.seconds) > 0 for row in rows)
    assert not any("COUNTED" in line for line in lines) and len(lines) == 6
    # 2 * 32 * 64 numbers of embedding and head, 4 * 64^2 of attention and 3 * 64^2 of the FFN; 3 * 64 of norms.
    held = {row.kind: row.held_bytes for row in rows}
    assert (
        held["float32"] == 4 * (2 * 32 * 64 + 7 * 64**2 + 3 * 64) and held["bfloat16"] * 2 == held["float32"]
    )
    # Kernels of 64 inputs: codes of 4 bits and one float32 scale for each output, of which there are 32 + 7 * 64.
    arrays = 4 * (32 * 64 + 3 * 64)
    assert held["int4"] == arrays + (32 + 7 * 64) * (64 // 2 + 4)
    assert held["int8"] - held["int4"] == (32 + 7 * 64) * 32


def test_ratios():
    row = quant.Row(
        "tiny", "int4", 1, seconds=(2.0, 1.0, 4.0), baseline=(4.0, 5.0, 9.0), held_bytes=1, counted_bytes=1
    )
    assert row.ratio == pytest.approx(2.5) and row.best_ratio == 4
