"""The benchmark of experts: what it measures on tiny layers, and that the peer computes the same."""

import pytest

from experiments.bench import moe, turns


def test_measures_every_part_and_agrees_with_transformers(monkeypatch):
    pytest.importorskip("transformers", reason="the benchmark's peer needs the extra `parity`")
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    monkeypatch.setattr(moe, "REPEATS", 0.0)
    lines = []
    # The run itself refuses outputs that differ from those of any implementation in transformers.
    rows = moe.run([(8, 16)], tokens=16, inference=(6,), decoded=(4, 8), rounds=2, report=lines.append)
    kinds = [row.kind for row in rows]
    # A dense layer, and each dispatch with and without its experts; one number of tokens; two of experts.
    assert [kinds.count(kind) for kind in ("training", "inference", "decoding")] == [5, 1, 2]
    assert all(len(row.seconds) == len(row.baseline) == 2 and min(row.seconds) > 0 for row in rows)
    assert len(lines) == 1 + 4 + 1 + 2


def test_ratios_are_of_the_contender_over_its_baseline():
    row = moe.Row("training", 8, 16, "sorted", seconds=(2.0, 1.0, 4.0), baseline=(4.0, 5.0, 9.0))
    assert (row.ratio, row.best_ratio) == (2 / 5, 1 / 4)
    assert row.as_dict()["ratio"] == 2 / 5
