"""The benchmark of models that read images: what it measures at tiny sizes, and that the peer computes the same."""

import importlib.util

from experiments.bench import multimodal, turns


def test_measures_planners_and_agrees_with_transformers(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    tiny = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    for name, value in {"TEXT": tiny, "VISION": tiny, "SIDE": 28, "VOCAB": 40, "PLACE": 39}.items():
        monkeypatch.setattr(multimodal, name, value)
    lines = []
    # The run itself refuses logits and tokens that differ from those of transformers.
    rows = multimodal.run(("llava", "llava_uhd"), (20, 30), new_tokens=4, rounds=2, report=lines.append)
    kinds = [(row.kind, row.length) for row in rows]
    assert kinds[:2] == [("planner llava", 0), ("planner llava_uhd", 0)]
    assert all(len(row.seconds) == len(row.baseline) == 2 and min(row.seconds) > 0 for row in rows)
    if importlib.util.find_spec("transformers") is None:
        assert len(rows) == 2 and "install .[parity]" in lines[-1]
    else:
        assert kinds[2:] == [("prefill", 2 * 2 + multimodal.WORDS), ("decode", 4)]
        assert lines[-1].endswith("tokens equal")
