"""The trials of a sweep on disk: one file that says how each stands, and a workdir for each.

sweep.json             what was swept: the base config, the fields, the metric
trials.json            every trial: its point, status, attempts, final metrics; written whole after each change
configs/000.json       the config of a trial, as `experiments.train --config` reads it
trials/000/            its workdir, and beside it 000.log, what its processes said
optuna.journal         the searcher's storage, where there is one
table.csv  table.md  figures/

All of it is data: reading it runs nothing, and no path is read from it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from research.errors import UserError
from research.training.checkpoint_files import write_atomically
from research.training.metrics import final_metrics, read_rows

STATUSES = ("waiting", "running", "done", "diverged", "pruned", "failed")
OVER = ("done", "diverged", "pruned", "failed")


@dataclasses.dataclass
class Trial:
    """One point. attempts: processes that were started for it; error: the last line of the one that failed."""

    number: int
    point: dict[str, Any]
    status: str = "waiting"
    attempts: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def over(self) -> bool:
        return self.status in OVER


class Trials:
    """The trials below a sweep's workdir."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.trials: list[Trial] = []
        path = directory / "trials.json"
        if path.exists():
            self.trials = [_trial(entry, path) for entry in _json(path)]
        for expected, trial in enumerate(self.trials):
            if trial.number != expected:
                raise UserError(f"{path}: trial {expected} is called {trial.number}")

    def add(self, point: dict[str, Any]) -> Trial:
        trial = Trial(len(self.trials), point)
        self.trials.append(trial)
        return trial

    def save(self) -> None:
        content = json.dumps([dataclasses.asdict(trial) for trial in self.trials], indent=1)
        write_atomically(self.directory / "trials.json", content + "\n")

    def workdir(self, trial: Trial) -> Path:
        return self.directory / "trials" / trial.name

    def config(self, trial: Trial) -> Path:
        return self.directory / "configs" / f"{trial.name}.json"

    def log(self, trial: Trial) -> Path:
        return self.directory / "trials" / f"{trial.name}.log"

    def read_metrics(self, trial: Trial) -> dict[str, float]:
        """The final metrics that the trial's run has logged so far."""
        path = self.workdir(trial) / "metrics.jsonl"
        return final_metrics(read_rows(path)) if path.exists() else {}

    def evaluations(self, trial: Trial, metric: str) -> list[tuple[int, float]]:
        """[(step, value)] of a metric in the evaluations so far."""
        path = self.workdir(trial) / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["kind"] == "eval"] if path.exists() else []
        found = [(row["step"], final_metrics([row]).get(metric)) for row in rows]
        return [(step, value) for step, value in found if value is not None]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def _trial(entry: Any, path: Path) -> Trial:
    try:
        trial = Trial(**entry)
        if (
            trial.status not in STATUSES
            or not isinstance(trial.number, int)
            or not isinstance(trial.point, dict)
        ):
            raise TypeError(f"its status is {trial.status!r}, its number {trial.number!r}")
    except TypeError as error:
        raise UserError(f"{path}: an entry is no trial: {error}") from None
    return trial


def check_same(directory: Path, description: dict[str, Any]) -> None:
    """Writes what is swept, and compares it with what is there, whose `points` may have become more at their end.

    Raises `UserError` where it is another sweep.
    """
    path = directory / "sweep.json"
    saved = _json(path) if path.exists() else {}
    for name, value in json.loads(json.dumps(description)).items():
        kept = value[: len(saved.get(name, ()))] if name == "points" else value
        if saved and saved.get(name) != kept:
            raise UserError(
                f"{directory} holds another sweep: its {name} is not that of this config; take another workdir"
            )
    write_atomically(path, json.dumps(description, indent=1) + "\n")
