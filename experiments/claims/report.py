"""What a claim leaves behind: the table on the terminal, result.json, figure.png and README.md."""

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from experiments.claims.harness import Claim, Results, judge, write
from research.errors import UserError

FILES = ("result.json", "figure.png", "README.md")


def report(claim: Claim, seeds: tuple[int, ...], results: Results, folder: Path) -> dict[str, Any]:
    """Judges the results, writes the three files into `folder`, and returns what result.json holds."""
    verdict, why = judge(claim, results)
    record = {
        "system": claim.system,
        "paper": claim.paper,
        "statement": " ".join(claim.statement.split()),
        "setting": " ".join(claim.setting.split()),
        "arms": {
            name: {"description": arm.description, **_costs(results[name])}
            for name, arm in claim.arms.items()
        },
        "seeds": list(seeds),
        "measured": {
            name: {key: _summary(values[key]) for key in claim.measures if key in values}
            for name, values in results.items()
        },
        "holds": verdict,
        "why": why,
    }
    write(folder / "result.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    figure = folder / "figure.png"
    figure.unlink(missing_ok=True)
    claim.figure(results, figure)
    if not figure.is_file():
        raise UserError(f"{claim.system}: its figure function drew no {figure}")
    write(folder / "README.md", _readme(claim, record, results))
    return record


def rows(claim: Claim, results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: arm, each measure as mean ± spread, budget, bytes, seconds.

    Spread is the sample standard deviation over seeds. Curves are left to the figure; an arm without a
    measure shows `-`.
    """
    scalars = [
        key
        for key in claim.measures
        if any(key in values and not isinstance(values[key][0], list) for values in results.values())
    ]
    header = ["arm", *(f"{key} ({claim.measures[key]})" for key in scalars)]
    header += [f"budget ({claim.budget})", "bytes", "seconds"]
    table = []
    for name, values in results.items():
        cells = [name, *(_mean_and_spread(values[key]) if key in values else "-" for key in scalars)]
        cells += [_budget(_mean(values["budget"])), f"{_mean(values['bytes']):,.0f}"]
        table.append([*cells, f"{_mean(values['seconds']):.1f}"])
    return header, table


def read_recorded(folder: Path) -> dict[str, Any] | None:
    """What `record_to` put into a folder; None where nothing is. Raises UserError for what is no such file."""
    path = folder / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no recorded result: {error}") from error


def recorded_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """As `rows`, of a result.json; measures go without their units."""
    measured = record["measured"]
    keys = list(dict.fromkeys(key for own in measured.values() for key, x in own.items() if "mean" in x))
    table = []
    for name, own in measured.items():
        cells = [_mean_and_spread(own[key]["values"]) if key in own else "-" for key in keys]
        costs = record["arms"][name]
        numbers = [_budget(costs["budget"]), f"{costs['bytes']:,.0f}", f"{costs['seconds']:.1f}"]
        table.append([name, *cells, *numbers])
    return ["arm", *keys, "budget", "bytes", "seconds"], table


def sentence(record: dict[str, Any]) -> str:
    """The verdict in one line."""
    return f"{record['system']} holds: {record['holds']}. {record['why']}"


def record_to(folder: Path, destination: Path) -> None:
    """Copies the three files, each whole or not at all."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        partial = destination / f".{name}.partial"
        shutil.copyfile(folder / name, partial)
        os.replace(partial, destination / name)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _budget(value: float) -> str:
    """Bits of a weight are no whole number."""
    return f"{value:,.0f}" if value >= 1000 or round(value, 2) == round(value) else f"{value:.2f}"


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean_and_spread(values: list[Any]) -> str:
    if isinstance(values[0], list):
        return "-"
    spread = _spread(values)
    return f"{_mean(values):.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def _costs(values: dict[str, list[float]]) -> dict[str, float]:
    return {key: round(_mean(values[key]), 2) for key in ("budget", "bytes", "seconds")}


def _summary(values: list[Any]) -> dict[str, Any]:
    """The value of every seed; of plain numbers, their mean and spread too."""
    if isinstance(values[0], list):
        return {"values": values}
    return {"values": values, "mean": _mean(values), "spread": _spread(values)}


def _readme(claim: Claim, record: dict[str, Any], results: Results) -> str:
    header, table = rows(claim, results)
    lines = [
        f"# {claim.system}: holds {record['holds']}",
        "",
        record["why"],
        "",
        f"**The paper says** ({claim.paper}): {record['statement']}",
        "",
        f"**Measured here:** {record['setting']}",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        f"Mean ± sample standard deviation over the seeds {', '.join(map(str, record['seeds']))}."
        if len(record["seeds"]) > 1
        else f"One seed: {record['seeds'][0]}.",
        "",
        *(f"- `{name}`: {arm.description}" for name, arm in claim.arms.items()),
        "",
        "![figure](figure.png)",
        "",
        f"Run it again: `python -m experiments.claims {claim.system}`",
        "",
    ]
    return "\n".join(lines)
