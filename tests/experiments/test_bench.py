"""The benchmark program: what it measures on tiny shapes, its help and its mistakes."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import __main__ as program
from experiments.bench import startup, train
from experiments.bench.contender import Contender
from experiments.bench.peak import matmul_flops, memory_bandwidth
from experiments.bench.shapes import Shape
from research.errors import UserError

TINY = Shape("tiny", width=32, layers=2, heads=2, hidden=48, vocab=64)


def call(*argv: str) -> int:
    return program.PROGRAM.call(program.main, argv)


def test_training_agrees_with_torch_and_counts(monkeypatch):
    pytest.importorskip("torch", reason="the benchmark's peer needs the extra `parity`")
    monkeypatch.setitem(train.TOKENS, "tiny", 2 * 16)
    lines = []
    # The run itself refuses losses that differ from torch's, before and after an update.
    (row,) = train.run([TINY], ["eager"], rounds=2, threads=1, length=16, turn=0.0, report=lines.append)
    matrices = 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert row.parameters == matrices + (2 * 2 + 1) * 32  # two norms a layer and the last
    # Of attention, each of 2 layers: scores and values, 2 FLOP, width 32, 16 * 17 / 2 pairs a row of 16.
    assert row.flops == 32 * 6 * matrices + 3 * 2 * (2 * 2 * 32 * 16 * 17 / 2) * 2
    assert abs(row.loss - np.log(64)) < 0.2  # untrained
    assert [len(seconds) for seconds in row.seconds.values()] == [2, 2]
    numbers = row.as_dict()
    speeds = numbers["tokens_per_second"]
    assert numbers["ratio"]["eager"] == pytest.approx(speeds["lathe"] / speeds["eager"], rel=1e-12)
    assert len(lines) == 3 and "PyTorch eager" in lines[2]


def test_ratios_by_hand():
    seconds = {"lathe": [2.0, 1.0, 4.0], "eager": [3.0, 9.0, 5.0]}
    peaks = {"lathe": 60.0, "eager": 40.0}
    row = train.Row("x", parameters=1, tokens=100, flops=30.0, peaks=peaks, loss=0.0, seconds=seconds)
    assert row.ratio("eager") == 5 / 2  # medians
    assert row.best_ratio("eager") == 3 / 1
    assert row.tokens_per_second("lathe") == 100 / 2
    assert row.peak_fraction("lathe") == 30 / 2 / 60
    assert row.peak_fraction("eager") == 30 / 5 / 60  # of the best library's, not of its own


def test_different_losses_are_no_comparison():
    train.check_losses({"lathe": [1.0, 0.9], "eager": [1.00005, 0.9]})
    with pytest.raises(RuntimeError, match="eager has losses .* not the same training"):
        train.check_losses({"lathe": [1.0, 0.9], "eager": [1.0, 0.9002]})


def test_a_contender_lives_in_another_process():
    with Contender(dict, {"pid": os.getpid()}) as contender:
        assert contender("get", "pid") == os.getpid()  # the dict was sent
        with pytest.raises(RuntimeError, match="AttributeError"):
            contender("absent")
        assert contender("pop", "pid") == os.getpid()  # a defect does not end it
        assert contender("get", "pid") is None  # and it keeps its state
    with pytest.raises(RuntimeError, match="exit code 3"):
        Contender(os._exit, 3)


def test_peaks_are_positive():
    assert matmul_flops(size=64, repeats=1) > 0
    assert memory_bandwidth(megabytes=1, repeats=1) > 0


def test_writes_the_numbers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "measure", lambda part, shapes: {"part": part, "sizes": len(shapes)})
    monkeypatch.setenv("NPROC", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    path = tmp_path / "speed.json"
    assert call("startup", "train", "--sizes=1M", "--threads=1", f"--json={path}") == 0
    assert os.environ["NPROC"] == os.environ["OMP_NUM_THREADS"] == "1"
    record = json.loads(path.read_text())
    assert list(record) == ["machine", "versions", "train", "startup"]
    assert record["train"] == {"part": "train", "sizes": 1}
    assert record["machine"]["threads"] == 1 and record["versions"]["jax"]
    assert f"numbers: {path}" in capsys.readouterr().out


def test_everything_is_what_is_measured_by_default():
    every = {
        "peak",
        "kernels",
        "train",
        "decode",
        "startup",
        "multimodal",
        "scaling",
        "assisted",
        "moe",
        "context",
        "ssm",
        "quant",
        "costs",
        "drafters",
    }
    assert program.select([]) == program.select(["all", "peak"]) == every


@pytest.mark.parametrize(
    "flags, message",
    [
        (["trian"], "no benchmark 'trian'; did you mean train?"),
        (["--sizes=1M,30M"], "no size '30M'; did you mean 20M?"),
        (["--peers=eagre"], "--peers: no peer 'eagre'; did you mean eager?"),
        (["--threads=4096"], "--threads=4096: this process may use "),
        (["--rounds=0"], "rounds"),
        (["--json=absent/x.json"], "--json=absent/x.json: its folder does not exist"),
        (["peak", "--json=."], "--json=.: a folder; name a file"),
        (["train", "--sizes="], "--sizes=: it names nothing to measure"),
        (["scaling", "--sizes="], "--sizes=: it names nothing to measure"),
        (["drafters", "--drafters="], "--drafters=: it names nothing to measure"),
        (["scaling", "--sizes=1M,6M"], "--sizes=1M,6M: scaling measures one size"),
        (["decode", "peak", "--sizes=1M"], "--sizes: read by train and scaling, not by decode, peak"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert call(*flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_startup_sees_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    config = "configs/matlm.py:tiny"
    smaller = ("--config.task.task.model.width=16", "--config.task.task.model.num_layers=1")
    overrides = (
        *startup.ONE_STEP,
        *smaller,
        "--config.stages.0.batch_size=8",
        "--config.evaluators.0.batches=1",
    )
    begun = time.perf_counter()
    seconds = startup.first_step(
        config, overrides, tmp_path / "run", Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    )
    assert 0 < seconds < time.perf_counter() - begun
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1]


def test_startup_names_what_went_wrong(tmp_path):
    with pytest.raises(UserError, match="ended with 2 on absent.py: error: .*absent.py"):
        startup.first_step("absent.py", (), tmp_path / "run", tmp_path / "cache")


def test_the_share_of_collectives_by_hand():
    """12 of 40 ns; what names no operation does not count."""
    from types import SimpleNamespace as Made

    from experiments.bench.scaling import Row, share, table

    def event(name, duration, **stats):
        return Made(name=name, duration_ns=duration, stats=list(stats.items()))

    line = Made(
        name="thread",
        events=[
            event("dot.3", 28.0, hlo_op="dot.3"),
            event("all-reduce.1", 10.0, hlo_op="all-reduce.1"),
            event("all-gather-start", 2.0, hlo_op="all-gather-start"),
            event("ThunkExecutor", 1e6),
        ],
    )
    assert share(Made(planes=[Made(name="/host:CPU", lines=[line])])) == 12 / 40
    rows = [Row(1, "data", "cpu", [1.0], 0.0), Row(4, "data", "cpu", [0.5], 0.25)]
    assert rows[1].efficiency(rows[0]) == 0.5  # twice as fast on four
    assert "SIMULATED" in table("1M", rows) and "50%" in table("1M", rows).splitlines()[-1]
