"""The benchmark of contexts: that every way decodes, Llama of transformers the same as ours, and what grows."""

import pytest

from experiments.bench import context, turns
from research.nn.accounting import count_bytes


def test_measures_every_way_and_agrees_with_transformers(monkeypatch):
    pytest.importorskip("transformers", reason="the benchmark's peer needs the extra `parity`")
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    monkeypatch.setattr(context, "LAYERS", 3)
    monkeypatch.setattr(context, "SELECTOR", context.Tidal(k=8, select=0))
    lines = []
    # The run itself refuses logits that differ from those of transformers.
    rows = context.run(contexts=(64,), rounds=2, report=lines.append)
    ways = ["tidal", "spans", "mamba2", "transformers"]
    assert [(row.kind, row.length) for row in rows] == [(way, 64) for way in ways]
    assert all(len(row.seconds) == len(row.baseline) == 2 and min(row.seconds) > 0 for row in rows)
    assert len(lines) == 5
    # Keys and values of 3 layers of 4 heads of 32, in float32: of all tokens, or of 1024 and three times 256.
    token = 3 * 2 * 4 * 4 * 32
    cached = {
        kind: [
            count_bytes(context.random_model(kind, 64)[0].init_cache(1, length, margin=1).layers)
            for length in (2048, 4096)
        ]
        for kind in ("attention", "spans", "mamba2")
    }
    assert cached["attention"] == [2048 * token, 4096 * token]
    assert cached["spans"] == 2 * [(1024 + 3 * 256 + 4) * token // 4]
    assert cached["mamba2"][0] == cached["mamba2"][1]
