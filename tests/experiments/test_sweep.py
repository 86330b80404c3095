"""Sweeps: points by hand, trials that end in every way, a sweep that goes on, a searcher, Ray where it is installed."""

import csv
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments import sweep as program
from experiments.sweeping import backends, report
from experiments.sweeping.search import Search
from experiments.sweeping.trials import Trial, Trials
from research.errors import UserError
from research.training.sweeps import (
    Sweep,
    choice,
    drawn,
    grid,
    integers,
    log_uniform,
    pareto_front,
    product,
    uniform,
    zipped,
)

ROOT = Path(__file__).resolve().parents[2]
# A vision transformer of one layer on the digits, and a sweep of it.
CONFIG = """
from research.config import of
from research.data.images import ImageDataset
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import constant, sgd
from research.training.stages import Stage
from research.training.sweeps import Sweep
from research.training.task import Classification
from research.vision.vit import ViT

PRESETS = ("tiny",)


def get_config(preset="tiny"):
    attention = of(Attention, num_heads=1, head_dim=8, rule=of(Full))
    block = of(Block, attention=attention, mlp=of(GatedMLP, hidden_dim=8))
    model = of(ViT, num_classes=10, width=8, patch=4, num_layers=1, blocks=(block,))
    optimizer = of(sgd, schedule=of(constant, peak=0.1))
    return of(
        Trainer,
        task=of(Classification, model=model, image_shape=(8, 8, 1)),
        data=of(ImageDataset, split="train"),
        stages=(of(Stage, name="train", steps=30, batch_size=16, optimizer=optimizer),),
        evaluators=(of(Evaluate, name="validation", data=of(ImageDataset, split="validation"), every=10, batches=1),),
        checkpoint_every=10,
        clip=None,
    )


def get_sweep(preset="tiny"):
    rate = "stages.0.optimizer.schedule.peak"
    points = [{rate: 0.1, "seed": 0}, {rate: 1e30, "seed": 0}]
    return Sweep(points=POINTS, metric="validation/loss", pareto=("validation/loss", "validation/parameters"))
"""


def test_points_by_hand():
    assert grid({"a": (1, 2), "b": "xy"}) == (
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    )
    assert zipped({"a": (1, 2), "b": "xy"}) == ({"a": 1, "b": "x"}, {"a": 2, "b": "y"})
    assert product(grid({"a": (1, 2)}), [{"b": 3}]) == ({"a": 1, "b": 3}, {"a": 2, "b": 3})
    fields = {
        "rate": log_uniform(1e-4, 1e-1),
        "n": integers(1, 3),
        "k": choice("p", "q"),
        "u": uniform(-1, 1),
    }
    points = drawn(fields, 200)
    assert points[:5] == drawn(fields, 5) != drawn(fields, 5, seed=1)
    assert {p["n"] for p in points} == {1, 2, 3} and {p["k"] for p in points} == {"p", "q"}
    # Even in the logarithm: a third of the rates in each decade, 67 of 200 with a deviation of 6.7.
    decades = np.histogram([np.log10(p["rate"]) for p in points], bins=[-4, -3, -2, -1])[0]
    assert decades.sum() == 200 and (abs(decades - 66.7) < 4 * 6.7).all()


def test_the_front_by_hand():
    # (1, 5) and (3, 1) are beaten by nobody, nor is (2, 2); (2, 3) is by (2, 2), (4, 1) by (3, 1).
    assert pareto_front([(4, 1), (2, 3), (1, 5), (3, 1), (2, 2)]) == [2, 4, 3]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: zipped({"a": (1,), "b": (1, 2)}), "as many values each"),
        (lambda: product([{"a": 1}], [{"a": 2}]), "two parts set a"),
        (lambda: Sweep(), "neither points nor a space"),
        (lambda: Sweep(points=[{"a": 1}, {"a": 1}]), "there twice"),
        (lambda: log_uniform(0, 1), "above 0"),
        (lambda: uniform(1, 1), "must be less"),
    ],
)
def test_impossible_sweeps(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs run: one device and one trial at a time."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LATHE_COMPILATION_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(folder: Path, points: str) -> None:
    text = "\n".join(line for line in CONFIG.splitlines() if not line.startswith("    points = "))
    (folder / "digits.py").write_text(text.replace("POINTS", points) + "\n")


def call(*arguments: str) -> int:
    return program.PROGRAM.call(
        program.main, ["--config=digits.py", "--workdir=sweep", "--parallel=1", *arguments]
    )


def test_trials_end_and_the_sweep_goes_on(folder, capsys):
    """One that ends well; one that diverges; then, in a sweep of more points, only the new one is run."""
    write_config(folder, '[{rate: 0.1, "seed": 0}, {rate: 1e30, "seed": 0}]')
    assert call() == 0
    out, err = capsys.readouterr()
    assert "trial 000: done, validation/loss" in err and "trial 001: diverged" in err, err
    first, second = json.loads(Path("sweep/trials.json").read_text())
    assert (first["status"], second["status"]) == ("done", "diverged")
    assert first["attempts"] == second["attempts"] == 1 and "is nan at step" in second["error"]
    rows = list(csv.reader(Path("sweep/table.csv").read_text().splitlines()))
    assert rows[0][:4] == ["trial", "stages.0.optimizer.schedule.peak", "seed", "validation/loss"]
    assert [row[0] for row in rows[1:]] == ["000", "001"] and float(rows[1][3]) < 2.4
    for name in ("fields", "parallel", "pareto"):
        assert (folder / f"sweep/figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert Path("sweep/table.md").read_text().count("\n") == 4

    before = Path("sweep/trials/000/metrics.jsonl").stat().st_mtime_ns
    assert call() == 0
    assert "every trial is over already" in capsys.readouterr().out
    assert Path("sweep/trials/000/metrics.jsonl").stat().st_mtime_ns == before
    assert call("--config.seed=1") == 2
    assert "holds another sweep: its config is not that" in capsys.readouterr().err
    write_config(folder, '[{rate: 0.1, "seed": 0}, {rate: 1e30, "seed": 0}, {rate: 1e30, "seed": 1}]')
    assert call() == 0  # one more, which diverges as soon
    err = capsys.readouterr().err
    assert "trial 002: diverged" in err and "trial 000" not in err and "trial 001" not in err
    write_config(folder, '[{rate: 0.1, "seed": 1}, {rate: 1e30, "seed": 0}]')
    assert call() == 2 and "its points is not that" in capsys.readouterr().err


class Scripted:
    """A backend whose tasks end with given codes, the next at each start; negative numbers are signals."""

    slots = 1

    def __init__(self, codes, directory):
        self.codes, self.directory, self.stopped = list(codes), directory, []

    def start(self, command, log):
        log.write_text("error: said so\n")
        workdir = Path(command[4].removeprefix("--workdir="))
        workdir.mkdir(parents=True, exist_ok=True)
        rows = [
            {"step": 10 * k, "kind": "eval", "name": "validation", "variant": "", "loss": 1.0} for k in (1, 2)
        ]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.codes.pop(0)

    def poll(self, task):
        return task

    def stop(self, task):
        self.stopped.append(task)

    def close(self):
        pass


def test_crashes_are_retried_and_mistakes_are_not(folder, monkeypatch):
    monkeypatch.setattr(program, "POLL", 0.0)
    program.PROGRAM.call(lambda _: None, ["--config=digits.py", "--workdir=sweep", "--retries=2"])
    write_config(folder, "[]")
    base = program.CONFIG.load()
    (folder / "sweep/trials").mkdir(parents=True)
    (folder / "sweep/configs").mkdir()
    sweep = Sweep(points=grid({"seed": (0, 1, 2, 3)}))
    trials = Trials(folder / "sweep")
    for point in sweep.points:
        trials.add(point)
    backend = Scripted([-9, 75, 0, 2, 1, 1, 1, 0], folder)
    program._Driver(base, sweep, trials, backend, None).run()
    ended = [(trial.status, trial.attempts) for trial in Trials(folder / "sweep").trials]
    assert ended == [("done", 3), ("failed", 1), ("failed", 3), ("done", 1)]
    assert trials.trials[1].error == "error: said so"


@pytest.mark.parametrize("set_before, expected", [(None, "2"), ("4", "2"), ("3", "3")])
def test_a_trial_has_its_share_of_the_cores(tmp_path, monkeypatch, set_before, expected):
    """Also where all of them are set for XLA, as under a quota; another choice stays."""
    monkeypatch.setattr(backends, "cores", lambda: 4)
    monkeypatch.setenv("NPROC", set_before or "")
    if set_before is None:
        monkeypatch.delenv("NPROC")
    process, _ = backends.Local(parallel=2).start(["sh", "-c", "echo $NPROC"], tmp_path / "log")
    assert process.wait() == 0
    assert (tmp_path / "log").read_text().strip() == expected


@pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="Optuna is not installed (extra sweep)"
)
def test_the_searcher_finds_prunes_and_remembers(tmp_path):
    sweep = Sweep(space={"x": uniform(-1, 1), "kind": choice("a", "b"), "n": integers(1, 4)}, trials=30)
    search = Search(sweep, tmp_path)
    values, pruned = [], 0
    for number in range(30):
        if number == 12:
            search = Search(sweep, tmp_path)  # another process goes on
            assert len(search) == 12
        point = search.propose()
        assert search.proposed(number) == point
        value = (point["x"] - 0.5) ** 2 + (point["kind"] == "b")
        if number > 6 and search.heard(number, [(1, value)]):
            search.finished(number, "pruned", None)
            pruned += 1
        else:
            search.heard(number, [(1, value)])
            search.finished(number, "done", value)
            values.append(value)
    assert min(values) < 0.05 and pruned > 3


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra sweep)")
def test_a_local_ray_cluster_runs_trials(folder, capsys):
    write_config(folder, '[{"seed": 3}]')
    assert call("--backend=ray") == 0
    assert "trial 000: done" in capsys.readouterr().err
    assert call("--backend=ray", "--resources=CPU=1000") == 0  # nothing is left to run


def test_what_is_read_is_data(tmp_path):
    (tmp_path / "trials.json").write_text('[{"number": 5, "point": {}}]')
    with pytest.raises(UserError, match="trial 0 is called 5"):
        Trials(tmp_path)
    (tmp_path / "trials.json").write_text('[{"number": "../../etc", "point": {}}]')
    with pytest.raises(UserError, match="is no trial"):
        Trials(tmp_path)
    (tmp_path / "trials.json").write_text("cos\nsystem\n")
    with pytest.raises(UserError, match="can't be read"):
        Trials(tmp_path)


def test_the_table_is_ordered_and_its_text_harmless(tmp_path):
    sweep = Sweep(points=[{"name": "a|b"}, {"name": "c"}, {"name": "d"}])
    trials = [
        Trial(i, p, "done", 1, 2.0, {"validation/loss": v})
        for i, (p, v) in enumerate(zip(sweep.points, (3, 1, 2), strict=True))
    ]
    trials[2].status = "diverged"
    report.write(tmp_path, sweep, trials)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 001", "| 000", "| 002"]
    assert "a\\|b" in lines[3]


@pytest.mark.parametrize(
    "points, arguments, message",
    [
        ('[{"sed": 1}]', (), "config.sed: unknown field of Trainer; did you mean seed?"),
        ('[{"seed": 1}]', ("--search=tpe",), "has no space to search: leave out --search"),
        ('[{"seed": 1}]', ("--resources=GPU",), "expected NAME=AMOUNT"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, points, arguments, message):
    write_config(folder, points)
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
