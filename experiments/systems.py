"""Prints the catalogue of published systems.

    python -m experiments.systems                  a table: what is here and whether its claim held
    python -m experiments.systems --family=moe     one family
    python -m experiments.systems --json           every entry, for scripts
    python -m experiments.systems --markdown > docs/results/README.md

Each entry names the file that holds what the paper adds, the config that trains it and the claim that checks
it (`python -m experiments.claims NAME`). `holds` is what the recorded claim found: yes, partly, no, or -
where no result is recorded yet.
"""

import dataclasses
import json
import tomllib
from importlib import resources
from pathlib import Path

from absl import flags

from experiments import cli
from research.errors import UserError, nearest

PROGRAM = cli.Program(__doc__)
JSON = PROGRAM.define(flags.DEFINE_boolean, "json", False, "Print a JSON list instead of a table.")
MARKDOWN = PROGRAM.define(flags.DEFINE_boolean, "markdown", False, "Print the page docs/results/README.md.")
FAMILY = PROGRAM.define(flags.DEFINE_string, "family", None, "Only the systems of this family.")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


@dataclasses.dataclass(frozen=True)
class System:
    """One entry of `research/systems.toml`; paths are relative to the repository.

    `holds` is `"yes"`, `"partly"` or `"no"` as docs/results/<name>/result.json says, `None` without one.
    """

    name: str
    title: str
    arxiv: str
    family: str
    module: str
    config: str
    claim: str
    holds: str | None = None


def read_catalogue(text: str | None = None, results: Path = RESULTS) -> list[System]:
    """The entries of the catalogue, in its order.

    Args:
      text: TOML; `research/systems.toml` without it.
      results: the folder with the recorded results.

    Raises:
      UserError: an entry with a missing, unknown or repeated key or name, or an unreadable result.
    """
    if text is None:
        text = resources.files("research").joinpath("systems.toml").read_text(encoding="utf-8")
    keys = [field.name for field in dataclasses.fields(System) if field.name != "holds"]
    systems: dict[str, System] = {}
    for number, entry in enumerate(tomllib.loads(text).get("system", []), start=1):
        where = f"systems.toml: {entry.get('name', f'entry {number}')}"
        for key in entry:
            if key not in keys:
                found = nearest(key, keys)
                raise UserError(f"{where}: unknown key {key}{f'; did you mean {found}?' if found else ''}")
        if missing := [key for key in keys if key not in entry]:
            raise UserError(f"{where}: missing {', '.join(missing)}")
        if entry["name"] in systems:
            raise UserError(f"{where}: named twice")
        systems[entry["name"]] = System(**entry, holds=_recorded_verdict(results, entry["name"]))
    return list(systems.values())


def in_family(systems: list[System], family: str) -> list[System]:
    """The systems of one family; an unknown family is a UserError."""
    families = sorted({system.family for system in systems})
    if family not in families:
        found = nearest(family, families)
        known = f"did you mean {found}?" if found else f"families: {', '.join(families)}"
        raise UserError(f"no family {family!r}; {known}")
    return [system for system in systems if system.family == family]


def _recorded_verdict(results: Path, name: str) -> str | None:
    path = results / name / "result.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["holds"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a recorded result ({type(error).__name__}: {error})") from error


def main(arguments: list[str]) -> None:
    """Prints the table, the JSON list or the page."""
    if JSON.value and MARKDOWN.value:
        raise UserError("--json and --markdown: one at a time")
    systems = read_catalogue()
    if FAMILY.value is not None:
        systems = in_family(systems, FAMILY.value)
    if JSON.value:
        print(json.dumps([dataclasses.asdict(system) for system in systems], indent=2))
        return
    if MARKDOWN.value:
        print(results_page(systems), end="")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(systems)} systems" if len(systems) != 1 else "1 system")
    for column in ("name", "title", "arxiv", "family", "config", "holds"):
        table.add_column(column, overflow="fold")
    for system in systems:
        verdict = system.holds or "-"
        row = (system.name, system.title, system.arxiv, system.family, system.config, verdict)
        table.add_row(*row)
    Console().print(table)


def results_page(systems: list[System], results: Path = RESULTS) -> str:
    """docs/results/README.md: every system with the verdict of its claim and the sentence that says why."""
    lines = [
        "# Results of the claims",
        "",
        "`python -m experiments.claims NAME --record` measures one again; `python -m experiments.systems --markdown`",
        "writes this page. A claim that did not hold says so. [All drafters on one target](drafters/README.md)",
        "are compared apart. Times are of the day each claim was recorded, most before the CPU kernels; current ones",
        "are in [speed](../speed.md).",
        "",
        "| system | family | paper | holds | why |",
        "|---|---|---|---|---|",
    ]
    for system in systems:
        paper = f"[{system.arxiv}](https://arxiv.org/abs/{system.arxiv})"
        name, why = system.name, "not recorded yet"
        if system.holds is not None:
            name = f"[{system.title}]({system.name}/README.md)"
            why = json.loads((results / system.name / "result.json").read_text(encoding="utf-8"))["why"]
        lines.append(
            f"| {name} | {system.family} | {paper} | {system.holds or '-'} | {why.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PROGRAM.run(main)
