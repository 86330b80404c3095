"""The figures of a run, drawn from its `metrics.jsonl`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from research.errors import UserError
from research.training.metrics import Row, read_rows
from research.training.model_directory import read_config

SMOOTHING = 50  # a training curve's points are means over about a fiftieth of the run


def draw_figures(
    workdir: str | os.PathLike, baselines: Mapping[str, tuple[int, float]] | None = None
) -> list[Path]:
    """Draws `figures/loss.png`; `loss_against_parameters.png` for several variants or baselines; and a heat map
    over training of every vector that layers measure, such as `load.png` of the load of their experts.

    baselines: {label: (parameters, loss)} of independently trained models, drawn beside the variants.
    Returns the paths written. Raises `UserError` if the run has logged nothing.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir / "metrics.jsonl")
    if not rows:
        raise UserError(f"{workdir / 'metrics.jsonl'}: nothing was logged, so there is nothing to draw")
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    drawn = [_loss(rows, folder / "loss.png")]
    measured = last_evaluation(rows)
    if baselines or any(len(variants) > 1 for variants in measured.values()):
        drawn.append(_trade_off(measured, baselines or {}, folder / "loss_against_parameters.png"))
    train = [row for row in rows if row["kind"] == "train"]
    vectors = dict.fromkeys(key for row in train for key, value in row.items() if isinstance(value, list))
    for name in dict.fromkeys(key.rpartition("/")[2] for key in vectors):
        own = sorted((key for key in vectors if key.rpartition("/")[2] == name), key=_numbers)
        drawn.append(_heat_map(train, own, folder / f"{name}.png"))
    return drawn


def last_evaluation(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """{evaluator: {variant: its last row}}."""
    measured: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "eval":
            measured.setdefault(row["name"], {})[row["variant"]] = row
    return measured


def read_baseline(workdir: str | os.PathLike, evaluator: str) -> tuple[int, float]:
    """(parameters, loss) of a model trained alone, as `evaluator` measured it after the last step of its run.

    Raises `UserError` if that is no finished run of one model with such an evaluator.
    """
    workdir = Path(workdir)
    steps = sum(stage.steps for stage in read_config(workdir / "config.json").get("stages", ()))
    measured = last_evaluation(read_rows(workdir / "metrics.jsonl"))
    if evaluator not in measured:
        known = f"; it has {', '.join(measured)}" if measured else ""
        raise UserError(f"baseline {workdir}: nothing was measured by an evaluator {evaluator!r}{known}")
    if len(measured[evaluator]) > 1:
        raise UserError(
            f"baseline {workdir}: {len(measured[evaluator])} models, not one that was trained alone"
        )
    (row,) = measured[evaluator].values()
    if row["step"] < steps:
        raise UserError(
            f"baseline {workdir}: measured last after {row['step']} of {steps} steps; finish its run"
        )
    return row["parameters"], row["loss"]


def smoothed(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """Means over consecutive groups of points, about `SMOOTHING` groups in all."""
    size = max(len(steps) // SMOOTHING, 1)
    starts = range(0, len(steps), size)
    return [fmean(steps[i : i + size]) for i in starts], [fmean(values[i : i + size]) for i in starts]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _figure(width: float, height: float) -> Any:
    # A second of import that only a finished run pays. Figure without pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes() -> tuple[Any, Any]:
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _loss(rows: list[Row], path: Path) -> Path:
    figure, axes = _axes()
    train = [row for row in rows if row["kind"] == "train"]
    for stage in dict.fromkeys(row["stage"] for row in train):
        own = [row for row in train if row["stage"] == stage]
        steps, losses = [row["step"] for row in own], [row["loss"] for row in own]
        (line,) = axes.plot(steps, losses, alpha=0.25, linewidth=0.8)
        axes.plot(*smoothed(steps, losses), color=line.get_color(), label=f"training: {stage}")
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "eval":
            curves.setdefault((row["name"], row["variant"]), []).append(row)
    for (name, variant), own in curves.items():
        label = f"{name}: {variant}" if variant else name
        axes.plot([row["step"] for row in own], [row["loss"] for row in own], marker="o", ms=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.legend(fontsize="small")
    figure.savefig(path)
    return path


def heat(rows: list[Row], key: str) -> tuple[list[int], list[list[float]]]:
    """What a layer measured: the steps, and for each entry of its vector the values at these steps."""
    own = [row for row in rows if key in row]
    return [row["step"] for row in own], [
        list(values) for values in zip(*(row[key] for row in own), strict=True)
    ]


def _heat_map(rows: list[Row], keys: list[str], path: Path) -> Path:
    """A panel for each of `keys`, entries of the vector upwards, training to the right, one scale for all."""
    panels = {key: heat(rows, key) for key in keys}
    high = max(max(map(max, values)) for _, values in panels.values())
    figure = _figure(6.4, 0.6 + 1.1 * len(keys))
    rows_of_axes = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, (steps, values)) in zip(rows_of_axes, panels.items(), strict=True):
        image = axes.pcolormesh(
            _edges(steps),
            [i - 0.5 for i in range(len(values) + 1)],
            values,
            vmin=0.0,
            vmax=high,
            cmap="viridis",
        )
        axes.set_ylabel(key.rpartition("/")[0].removesuffix("/mlp"), fontsize="small")
    rows_of_axes[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(rows_of_axes), label=path.stem.replace("_", " "))
    figure.savefig(path)
    return path


def _edges(steps: list[int]) -> list[float]:
    """The borders of columns around rising steps."""
    middle = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    return [steps[0] - 0.5, *middle, steps[-1] + 0.5]


def _trade_off(
    measured: dict[str, dict[str, Row]], baselines: Mapping[str, tuple[int, float]], path: Path
) -> Path:
    from matplotlib.ticker import EngFormatter

    figure, axes = _axes()
    for evaluator, variants in measured.items():
        own = sorted(variants.values(), key=lambda row: row["parameters"])
        axes.plot(
            [row["parameters"] for row in own],
            [row["loss"] for row in own],
            marker="o",
            ms=4,
            label=evaluator,
        )
        for row in own:
            point = (row["parameters"], row["loss"])
            axes.annotate(row["variant"], point, textcoords="offset points", xytext=(4, 4), fontsize="small")
    for label, point in baselines.items():
        axes.plot(*point, marker="x", color="black", linestyle="")
        axes.annotate(label, point, textcoords="offset points", xytext=(4, -10), fontsize="small")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss (nats)")
    axes.legend(fontsize="small")
    figure.savefig(path)
    return path
