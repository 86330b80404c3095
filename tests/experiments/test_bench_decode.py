"""The decoding benchmark: both sides decode the same tokens from the same weights."""

import pytest

pytest.importorskip("torch", reason="the benchmark's peer needs the extra `parity`")
pytest.importorskip("transformers", reason="the benchmark's peer needs the extra `parity`")

from experiments.bench import assisted, decode  # noqa: E402


def test_rows_of_a_small_shape():
    lines = []
    shape = decode.Shape("tiny", width=32, layers=2, heads=2, hidden=48, vocab=64)
    (row,) = decode.run([shape], batches=(2,), rounds=2, new_tokens=8, report=lines.append)
    assert row.equal
    # 2 tables of 64 * 32, 2 layers of 4 * 32 * 32 + 3 * 32 * 48 + 2 norms of 32, a final norm of 32.
    assert row.parameters == 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert 0 < row.median <= row.best and 0 < row.peer_median <= row.peer_best
    assert row.ratio == row.median / row.peer_median
    assert len(lines) == 2 and "tokens equal" in lines[1]


def test_speculation_on_both_sides():
    shape = decode.Shape("tiny", width=32, layers=3, heads=2, hidden=48, vocab=64)
    rows = assisted.run(shape, rounds=1, new_tokens=16, report=lambda line: None)
    assert [row.method for row in rows] == ["draft model", "prompt lookup"]
    for row in rows:
        assert row.equal and row.tokens_per_call >= 1 and row.ratio == row.median / row.peer_median
