"""The claims harness on a made-up claim: numbers, resume, verdicts, what is refused, what is written."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments import systems
from experiments.claims import __main__ as program
from experiments.claims import harness, report
from experiments.claims.harness import Arm, Claim
from research.errors import UserError


class Lab:
    """A claim whose arms count their runs and can be told to fail."""

    def __init__(self):
        self.runs: list[tuple[str, int]] = []
        self.fail: tuple[str, int] | None = None
        self.verdict = "yes"

    def base(self, seed, workdir, progress, needs):
        assert needs == {}
        self.runs.append(("base", seed))
        attempts = workdir / "attempts"
        attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
        progress(0.5, "half way")
        self._maybe_fail("base", seed)
        return {"loss": 2.0 + seed, "curve": np.array([4.0, 3.0]), "budget": 100, "bytes": 8000}

    def method(self, seed, workdir, progress, needs):
        self.runs.append(("method", seed))
        self._maybe_fail("method", seed)
        assert (needs["base"].workdir / "attempts").is_file()
        return {"loss": np.float32(needs["base"].measured["loss"] - 0.5), "budget": 2.5, "bytes": 2000}

    def _maybe_fail(self, arm: str, seed: int):
        if self.fail == (arm, seed):
            raise KeyboardInterrupt

    def judge(self, results):
        gain = np.mean(np.subtract(results["base"]["loss"], results["method"]["loss"]))
        return self.verdict, f"The method is {gain:.2f} nats better."

    def figure(self, results, path: Path):
        assert results["base"]["curve"][0] == [4.0, 3.0]
        path.write_bytes(b"png")

    def claim(self, **changes) -> Claim:
        fields = {
            "system": "fake",
            "paper": "arXiv 0000.00000, table 1",
            "statement": "The method\n is better.",
            "setting": "Two numbers.",
            "measures": {"loss": "nats", "curve": "nats"},
            "budget": "tokens",
            "arms": {"base": Arm(self.base, "plain"), "method": Arm(self.method, "better", needs=("base",))},
            "judge": self.judge,
            "figure": self.figure,
            "seeds": (0, 1),
        }
        return Claim(**(fields | changes))


SYSTEM = systems.System("fake", "Fake", "0000.00000", "moe", "module.py", "config.py", "claim.py")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of three files, in which the claims program finds the system `fake`."""
    for name in ("module.py", "config.py", "claim.py"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(program, "read_catalogue", lambda: [SYSTEM])
    return tmp_path


def run(lab: Lab, place: Path, monkeypatch, *argv: str, **changes) -> int:
    monkeypatch.setattr(program, "load_claim", lambda system: lab.claim(**changes))
    return program.PROGRAM.call(program.main, ["fake", f"--workdir={place / 'runs'}", *argv])


def result(place: Path) -> dict:
    return json.loads((place / "runs" / "fake" / "result.json").read_text())


def test_a_claim_runs_and_leaves_its_report(place, monkeypatch, capsys):
    lab = Lab()
    assert run(lab, place, monkeypatch, "--record") == 0
    assert lab.runs == [("base", 0), ("method", 0), ("base", 1), ("method", 1)]
    record = result(place)
    assert list(record) == [
        "system", "paper", "statement", "setting", "arms", "seeds", "measured", "holds", "why",
    ]  # fmt: skip
    assert record["statement"] == "The method is better."
    assert record["seeds"] == [0, 1]
    assert (record["holds"], record["why"]) == ("yes", "The method is 0.50 nats better.")
    # Losses 2 and 3: mean 2.5, sample deviation sqrt((0.5^2 + 0.5^2) / 1) = 0.7071.
    assert record["measured"]["base"]["loss"] == {"values": [2.0, 3.0], "mean": 2.5, "spread": 0.5**0.5}
    assert record["measured"]["base"]["curve"] == {"values": [[4.0, 3.0], [4.0, 3.0]]}
    assert record["measured"]["method"] == {"loss": {"values": [1.5, 2.5], "mean": 2.0, "spread": 0.5**0.5}}
    arm = record["arms"]["method"]
    assert (arm["description"], arm["budget"], arm["bytes"]) == ("better", 2.5, 2000)
    assert arm["seconds"] >= 0
    readme = (place / "runs" / "fake" / "README.md").read_text()
    assert "| arm | loss (nats) | budget (tokens) | bytes | seconds |" in readme
    assert "| method | 2 ± 0.71 | 2.50 | 2,000 |" in readme
    assert "python -m experiments.claims fake" in readme
    out = capsys.readouterr().out
    assert "2.5 ± 0.71" in out and out.count("fake holds: yes. The method is 0.50 nats better.") == 1
    for name in report.FILES:
        assert (place / "results" / "fake" / name).read_bytes() == (
            place / "runs" / "fake" / name
        ).read_bytes()


def test_what_is_recorded_is_shown_without_a_run(place, monkeypatch, capsys):
    other = dataclasses.replace(SYSTEM, name="other")
    monkeypatch.setattr(program, "read_catalogue", lambda: [SYSTEM, other])
    lab = Lab()
    monkeypatch.setattr(program, "load_claim", lambda system: lab.claim())
    argv = ["--family=moe", "--recorded"]
    assert program.PROGRAM.call(program.main, argv) == 2
    assert capsys.readouterr().err.startswith("error: nothing is recorded of fake, other: run the claims")
    assert run(lab, place, monkeypatch, "--record") == 0
    count, _ = len(lab.runs), capsys.readouterr()
    assert program.PROGRAM.call(program.main, argv) == 0
    out = capsys.readouterr().out
    assert len(lab.runs) == count and out.startswith(
        "fake: The method is better. (arXiv 0000.00000, table 1)"
    )
    assert [cell.strip() for cell in out.splitlines()[5].split("│")[1:5]] == [
        "method",
        "2 ± 0.71",
        "2.50",
        "2,000",
    ]
    assert out.endswith("0.50 nats better.\nholds: yes 1; not recorded: other\n")
    assert program.PROGRAM.call(program.main, [*argv, "--record"]) == 2
    assert "--recorded runs nothing" in capsys.readouterr().err
    assert program.PROGRAM.call(program.main, [*argv, "--workdir=nowhere"]) == 2
    assert capsys.readouterr().err == "error: --workdir=nowhere: --recorded reads docs/results alone\n"


def test_an_interrupted_claim_goes_on_where_it_stopped(place, monkeypatch, capsys):
    lab = Lab()
    lab.fail = ("base", 1)
    assert run(lab, place, monkeypatch) == 130
    assert not (place / "runs" / "fake" / "result.json").exists()
    lab.fail = ("method", 1)
    assert run(lab, place, monkeypatch) == 130
    assert lab.runs == [("base", 0), ("method", 0), ("base", 1), ("base", 1), ("method", 1)]
    lab.fail = None
    lab.runs.clear()
    assert run(lab, place, monkeypatch) == 0
    assert lab.runs == [("method", 1)]
    assert "fake: 3 of 4 runs were saved before" in capsys.readouterr().out
    # Its own folder survived the interruption, so an arm can go on from its checkpoint.
    assert [file.read_text() for file in sorted((place / "runs").rglob("attempts"))] == ["x", "xx"]
    interrupted = result(place)
    whole = Lab()
    assert run(whole, place / "again", monkeypatch) == 0
    for arm in (*interrupted["arms"].values(), *(uninterrupted := result(place / "again"))["arms"].values()):
        del arm["seconds"]
    assert interrupted == uninterrupted


def test_seconds_add_up_over_attempts(place, monkeypatch):
    lab = Lab()
    now = [100.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    original = lab.base

    def slow(seed, workdir, progress, needs):
        now[0] += 7.0
        return original(seed, workdir, progress, needs)

    arms = {"base": Arm(slow, "slow")}
    changes = {"arms": arms, "judge": lambda results: ("no", "x"), "seeds": (0,)}
    lab.fail = ("base", 0)
    assert run(lab, place, monkeypatch, **changes) == 130
    lab.fail = None
    assert run(lab, place, monkeypatch, **changes) == 0
    assert result(place)["arms"]["base"]["seconds"] == 14.0  # 7 interrupted + 7


@pytest.mark.parametrize("changed", ["claim.py", "module.py", "config.py"])
def test_changed_sources_run_again_and_say_so(place, monkeypatch, capsys, changed: str):
    lab = Lab()
    assert run(lab, place, monkeypatch) == 0
    assert run(lab, place, monkeypatch) == 0
    assert len(lab.runs) == 4
    capsys.readouterr()
    (place / changed).write_text("something else")
    assert run(lab, place, monkeypatch) == 0
    assert len(lab.runs) == 8
    assert "fake: its sources changed, so the arms saved before are not used" in capsys.readouterr().out


@pytest.mark.parametrize("verdict", ["yes", "partly", "no"])
def test_every_verdict_is_a_result(place, monkeypatch, verdict: str):
    lab = Lab()
    lab.verdict = verdict
    assert run(lab, place, monkeypatch, "--seeds=5") == 0
    assert result(place)["holds"] == verdict
    assert result(place)["measured"]["method"]["loss"] == {"values": [6.5], "mean": 6.5, "spread": None}
    assert "One seed: 5." in (place / "runs" / "fake" / "README.md").read_text()


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"los": 1.0}, "measured 'los', which the claim does not name; did you mean loss?"),
        ({"loss": float("nan")}, "loss is nan"),
        ({"curve": [1.0, float("inf")]}, "curve is inf"),
        ({"loss": "1"}, "loss is '1' (str), expected a number or a list of numbers"),
        ({"loss": True}, "loss is True (bool), expected a number or a list of numbers"),
        ({"loss": np.zeros((2, 2))}, "loss has shape (2, 2), expected a number or a curve"),
        ({}, "measured nothing; the claim's measures are loss, curve"),
        ({"loss": 1.0, "seconds": 3.0}, "measured 'seconds', which the claim does not name; the claim's"),
    ],
)
def test_what_is_not_a_measurement_is_refused(place, monkeypatch, capsys, measured: dict, message: str):
    arms = {"base": Arm(lambda *_: {"budget": 1, "bytes": 1, **measured}, "x")}
    assert run(Lab(), place, monkeypatch, arms=arms) == 2
    assert capsys.readouterr().err.startswith(f"error: fake: arm base, seed 0: {message}")
    assert not (place / "runs" / "fake" / "result.json").exists()


def test_costs_and_verdict_and_figure_are_required(place, monkeypatch, capsys):
    arms = {"base": Arm(lambda *_: {"loss": 1.0, "budget": 1}, "x")}
    assert run(Lab(), place, monkeypatch, arms=arms) == 2
    assert capsys.readouterr().err == "error: fake: arm base, seed 0: returned no bytes\n"
    assert run(Lab(), place, monkeypatch, judge=lambda results: ("maybe", "x")) == 2
    assert capsys.readouterr().err == "error: fake: the verdict is 'maybe', expected one of yes, partly, no\n"
    assert run(Lab(), place, monkeypatch, figure=lambda results, path: None) == 2
    assert "its figure function drew no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fak"], "no system 'fak'; did you mean fake?"),
        (["zzz"], "no system 'zzz'; `python -m experiments.systems` lists them"),
        ([], "name a system or a --family"),
        (["--family=mo"], "no family 'mo'; did you mean moe?"),
        (["fake", "--seeds=a"], "--seeds=a: expected different whole numbers"),
        (["fake", "--seeds=1,1"], "--seeds=1,1: expected different whole numbers"),
        (
            ["fake", "--seeds=1", "--record"],
            "--record needs at least the claim's own seeds, --seeds=0,1 (fake)",
        ),
    ],
)
def test_wrong_requests_are_one_line(place, monkeypatch, capsys, argv: list[str], message: str):
    monkeypatch.setattr(program, "load_claim", lambda system: Lab().claim())
    assert program.PROGRAM.call(program.main, argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("workdir", ["module.py", "module.py/runs", "/proc/x"])
def test_a_workdir_that_can_be_no_folder_is_named(place, monkeypatch, capsys, workdir: str):
    lab = Lab()
    assert run(lab, place, monkeypatch, f"--workdir={place / workdir}") == 2
    message = f"error: {place / workdir / 'fake'}: no folder can be made there: "
    assert capsys.readouterr().err.startswith(message) and not lab.runs


def test_a_claim_file_must_define_the_claim_of_its_system():
    missing = dataclasses.replace(SYSTEM, claim="experiments/claims/nothing.py")
    with pytest.raises(UserError, match="experiments/claims/nothing.py: no such claim file"):
        program.load_claim(missing)
    other = dataclasses.replace(SYSTEM, claim="experiments/claims/report.py")
    with pytest.raises(UserError, match=r"report.py: defines no CLAIM = Claim\(system='fake', ...\)"):
        program.load_claim(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"a": Arm(print, "x", needs=("b",)), "b": Arm(print, "x")}},
            "arm a needs 'b', which is not",
        ),
        ({"arms": {"a/b": Arm(print, "x")}}, "arm 'a/b': a name is used as a folder"),
        ({"arms": {}}, "a claim has arms and different seeds"),
        ({"seeds": (1, 1)}, "a claim has arms and different seeds"),
        ({"measures": {"bytes": "B"}}, "bytes can't be a measure"),
    ],
)
def test_a_claim_that_can_not_run_is_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        Lab().claim(**changes)


def test_family_and_names_select_each_system_once():
    others = [dataclasses.replace(SYSTEM, name=name) for name in ("a", "b")]
    chosen = program.select(["b", "fake"], "moe", [SYSTEM, *others])
    assert [system.name for system in chosen] == ["b", "fake", "a"]


def test_the_bar_of_a_terminal_takes_the_arms_fraction(place, capsys):
    console = Console(force_terminal=True, width=100)
    with program._bar(console, "[1/2] base, seed 0") as progress:
        progress(0.5, "half way")
    assert "[1/2] base, seed 0" in capsys.readouterr().out
