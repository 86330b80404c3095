"""The benchmark of state-space layers: what it measures at tiny lengths, and that the peer computes the same."""

import pytest

from experiments.bench import ssm, turns


def test_measures_every_part_and_agrees_with_transformers(monkeypatch):
    pytest.importorskip("transformers", reason="the benchmark's peer needs the extra `parity`")
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    monkeypatch.setattr(ssm, "WIDTH", 32)
    lines = []
    # The run itself refuses logits and tokens that differ from those of transformers.
    rows = ssm.run(prompts=(70,), new_tokens=4, rounds=2, report=lines.append)
    assert [(row.kind, row.length) for row in rows] == [("prefill", 70), ("decode", 4)]
    assert all(len(row.seconds) == len(row.baseline) == 2 and min(row.seconds) > 0 for row in rows)
    assert len(lines) == 3 and lines[-1].endswith("tokens equal")
    row = turns.Row("prefill", 8, seconds=(2.0, 1.0, 4.0), baseline=(4.0, 5.0, 9.0))
    assert (row.ratio, row.best_ratio) == (5 / 2, 4)
