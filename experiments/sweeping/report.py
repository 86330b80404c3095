"""What a sweep found: a table as CSV and Markdown, and figures."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.sweeping.trials import Trial
from research.training.checkpoint_files import write_atomically
from research.training.sweeps import Sweep, pareto_front


def write(directory: Path, sweep: Sweep, trials: Sequence[Trial]) -> list[Path]:
    """Writes the tables, and the figures where a trial has the metric. Returns the paths."""
    header, rows = table(sweep, trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    write_atomically(directory / "table.csv", text.getvalue())
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    write_atomically(directory / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    drawn = [directory / "table.csv", directory / "table.md"]
    measured = [
        t for t in trials if math.isfinite(t.metrics.get(sweep.metric, math.nan)) and t.status == "done"
    ]
    if not measured:
        return drawn
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    drawn.append(_fields(sweep, measured, folder / "fields.png"))
    if len(sweep.fields) > 1:
        drawn.append(_parallel(sweep, measured, folder / "parallel.png"))
    if sweep.pareto is not None and all(name in t.metrics for t in measured for name in sweep.pareto):
        drawn.append(_pareto(sweep, measured, folder / "pareto.png"))
    return drawn


def table(sweep: Sweep, trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), the best trial first, those without the metric last."""
    metrics = list(dict.fromkeys([sweep.metric, *(sweep.pareto or ())]))
    header = ["trial", *sweep.fields, *metrics, "status", "attempts", "seconds"]
    sign = -1 if sweep.maximize else 1

    def order(trial: Trial) -> tuple[bool, float, int]:
        value = trial.metrics.get(sweep.metric)
        counts = trial.status == "done" and value is not None
        return not counts, sign * value if counts else 0.0, trial.number

    rows = []
    for trial in sorted(trials, key=order):
        values = [show(trial.point.get(name)) for name in sweep.fields]
        numbers = [f"{trial.metrics[name]:.6g}" if name in trial.metrics else "" for name in metrics]
        rows.append(
            [trial.name, *values, *numbers, trial.status, str(trial.attempts), f"{trial.seconds:.1f}"]
        )
    return header, rows


def show(value: Any) -> str:
    """A field's value in a table."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _places(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]], bool]:
    """(place of each value, ticks of what are no numbers, whether the axis is logarithmic)."""
    if _numeric(values):
        positive = min(values) > 0 and max(values) / min(values) >= 20
        return [float(v) for v in values], [], positive
    names = list(dict.fromkeys(map(show, values)))
    return [float(names.index(show(v))) for v in values], list(enumerate(names)), False


def _figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.5, 3.2 * columns), 3.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, sharey=True)[0]


def _fields(sweep: Sweep, trials: Sequence[Trial], path: Path) -> Path:
    """The metric against each swept field, one panel a field."""
    figure, panels = _figure(len(sweep.fields))
    for name, panel in zip(sweep.fields, panels, strict=True):
        chosen = [trial for trial in trials if name in trial.point]
        places, ticks, log = _places([trial.point[name] for trial in chosen])
        panel.scatter(places, [trial.metrics[sweep.metric] for trial in chosen], s=18)
        panel.set_xlabel(name.rpartition(".")[2] if len(name) > 24 else name)
        if ticks:
            panel.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
        if log:
            panel.set_xscale("log")
    panels[0].set_ylabel(sweep.metric)
    figure.savefig(path, dpi=140)
    return path


def _parallel(sweep: Sweep, trials: Sequence[Trial], path: Path) -> Path:
    """Parallel coordinates: a line for each trial through its fields to its metric, which colours it."""
    import numpy as np
    from matplotlib import colormaps

    figure, (panel,) = _figure()
    figure.set_size_inches(1.6 * (len(sweep.fields) + 2), 3.6)
    columns, labels = [], [*sweep.fields, sweep.metric]
    for label in labels:
        values = [t.metrics[label] if label == sweep.metric else t.point.get(label) for t in trials]
        places, ticks, log = _places(values)
        scaled = np.log(places) if log else np.array(places)
        low, high = float(scaled.min()), float(scaled.max())
        columns.append((scaled - low) / (high - low) if high > low else np.full(len(scaled), 0.5))
        x = len(columns) - 1
        panel.axvline(x, color="0.8", lw=1, zorder=0)
        ends = dict(zip(columns[-1].tolist(), map(show, values), strict=True))
        for place, text in ends.items() if ticks else [(p, ends[p]) for p in (min(ends), max(ends))]:
            panel.annotate(text, (x, place), fontsize=7, xytext=(3, 0), textcoords="offset points")
    colours = colormaps["viridis"](1 - columns[-1] if not sweep.maximize else columns[-1])
    for line, colour in zip(np.stack(columns, 1), colours, strict=True):
        panel.plot(range(len(labels)), line, color=colour, lw=1.2)
    panel.set_xticks(range(len(labels)), [label.rpartition(".")[2] for label in labels], fontsize=7)
    panel.set_yticks([])
    figure.savefig(path, dpi=140)
    return path


def _pareto(sweep: Sweep, trials: Sequence[Trial], path: Path) -> Path:
    """Two metrics of every trial, and the front."""
    one, other = sweep.pareto
    points = [(trial.metrics[one], trial.metrics[other]) for trial in trials]
    front = pareto_front(points)
    figure, (panel,) = _figure()
    panel.scatter(*zip(*points, strict=True), s=18, color="0.6")
    best = [points[i] for i in front]
    panel.step(*zip(*best, strict=True), where="post", color="C0")
    panel.scatter(*zip(*best, strict=True), s=22, color="C0", zorder=3)
    for i in front:
        panel.annotate(trials[i].name, points[i], fontsize=7, xytext=(3, 3), textcoords="offset points")
    panel.set_xlabel(one)
    panel.set_ylabel(other)
    figure.savefig(path, dpi=140)
    return path
