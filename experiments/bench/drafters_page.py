"""docs/results/drafters: the table of all drafters on one target, as a page, numbers and a figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench.drafters import BATCH, Report, Row, draw
from experiments.systems import RESULTS

FOLDER = RESULTS / "drafters"


def write(report: Report, settings: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Writes README.md, result.json and figure.png, and returns the path of the page.

    settings: machine, versions, and whatever else the numbers depend on, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = settings | report.as_dict()
    (folder / "result.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    draw(report.rows, folder / "figure.png")
    path = folder / "README.md"
    path.write_text(page(report, settings), encoding="utf-8")
    return path


def page(report: Report, settings: dict[str, Any]) -> str:
    """The page: tokens a call and speed by drafter and kind, the best of a kind in bold, and what was equal."""
    rows = {(row.drafter, row.kind): row for row in report.rows}
    kinds = list(dict.fromkeys(row.kind for row in report.rows))
    names = sorted(
        dict.fromkeys(row.drafter for row in report.rows), key=lambda name: -_mean(report.rows, name)
    )
    told = "; ".join(f"{key}: {value}" for key, value in settings.items() if not isinstance(value, dict))
    machine = "; ".join(f"{key}: {value}" for key, value in settings["machine"].items())
    lines = ["# All drafters on one target", "", f"{told}.", "", f"Measured on: {machine}.", ""]
    lines += ["Tokens a call after prefill, the target's own included (plain decoding: 1):", ""]
    lines += _table(names, kinds, rows, lambda row: row.tokens_per_call)
    loops = " | ".join(f"{rows[names[0], kind].loopiness:.2f}" for kind in kinds)
    lines += [f"| *loopiness of the text* | {loops} |", ""]
    lines += ["Times as fast as plain decoding, in turns, by best turns:", ""]
    lines += [*_table(names, kinds, rows, lambda row: row.best_speed), ""]
    lines += [
        f"Against plain decoding: alone, and {report.held_out} held-out prompts of code in batches of {BATCH} with "
        "unequal lengths; the gap is the target's preference, in nats, for the plain token where they part:",
        "",
        "| drafter | drafts wasted | outputs equal, alone | held-out outputs that differ | widest gap |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in names:
        own = [rows[name, kind] for kind in kinds]
        wasted = sum(row.wasted for row in own) / max(1, sum(row.drafted for row in own))
        equal, found = sum(row.equal for row in own) / len(own), report.differences[name]
        gap = f"{max(each.gap for each in found):.2g}" if found else "-"
        lines.append(f"| {name} | {wasted:.0%} | {equal:.1%} | {len(found)} | {gap} |")
    return "\n".join([*lines, "", "![speed against tokens a call](figure.png)", ""])


def _mean(rows: Sequence[Row], name: str) -> float:
    own = [row.tokens_per_call for row in rows if row.drafter == name]
    return sum(own) / len(own)


def _table(names: Sequence[str], kinds: Sequence[str], rows: dict, number: Any) -> list[str]:
    best = {kind: max(number(rows[name, kind]) for name in names) for kind in kinds}

    def cell(name: str, kind: str) -> str:
        value = number(rows[name, kind])
        return f"**{value:.2f}**" if value == best[kind] else f"{value:.2f}"

    lines = [f"| drafter | {' | '.join(kinds)} |", f"|---|{'---:|' * len(kinds)}"]
    return lines + [f"| {name} | {' | '.join(cell(name, kind) for kind in kinds)} |" for name in names]
