"""Runs the executable claims of the catalogue: the paper's statement, measured at our size, judged.

    python -m experiments.claims matformer                    run it, print the table and the verdict
    python -m experiments.claims matformer --seeds=0          one seed, for a first look
    python -m experiments.claims --family=elastic --record    a whole family, results into docs/results/
    python -m experiments.claims --family=multimodal --recorded
                                                              what docs/results/ has of it; nothing is run

Prints one table (arm, each measure with its spread over seeds, budget, bytes, seconds) and one sentence, and
leaves result.json, figure.png and README.md in <workdir>/<system>/. Every finished arm is saved, so the same
command goes on where an interrupted one stopped. A claim that does not hold is a result like any other: the
exit code is 0.
"""

import collections
import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from experiments.systems import RESULTS, ROOT, System, in_family, read_catalogue
from research.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.claims.harness import Claim, Progress

PROGRAM = cli.Program(__doc__, arguments="SYSTEM...")
WORKDIR = PROGRAM.workdir_flag("Where arms and results are kept.", default="runs/claims")
FAMILY = PROGRAM.define(flags.DEFINE_string, "family", None, "Also every system of this family.")
SEEDS = PROGRAM.define(flags.DEFINE_list, "seeds", None, "Seeds instead of the claim's own: 0,1,2.")
RECORD = PROGRAM.define(flags.DEFINE_boolean, "record", False, "Copy the result to docs/results/<system>/.")
RECORDED = PROGRAM.define(flags.DEFINE_boolean, "recorded", False, "Print what is recorded; run nothing.")


def main(arguments: list[str]) -> None:
    """Runs the claims named, one after the other."""
    systems = select(arguments, FAMILY.value, read_catalogue())
    if RECORDED.value:
        if RECORD.value or SEEDS.value is not None:
            raise UserError("--recorded runs nothing: it goes without --record and --seeds")
        if WORKDIR.present:
            raise UserError(f"--workdir={WORKDIR.value}: --recorded reads docs/results alone")
        show_recorded(systems, RESULTS, make_console())
        return
    seeds = None if SEEDS.value is None else parse_seeds(SEEDS.value)
    claims = [load_claim(system) for system in systems]  # a mistake in the last is told before the first runs
    for system, claim in zip(systems, claims, strict=True):
        if RECORD.value and seeds is not None and not set(claim.seeds) <= set(seeds):
            own = ",".join(map(str, claim.seeds))
            raise UserError(f"--record needs at least the claim's own seeds, --seeds={own} ({system.name})")
    console = make_console()
    for system, claim in zip(systems, claims, strict=True):
        run_claim(system, claim, claim.seeds if seeds is None else seeds, Path(WORKDIR.value), console)


def make_console() -> "Console":
    """Where tables go."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 240  # a log file has no width, and a table folded to 80 columns can't be read
    return console


def show_recorded(systems: list[System], results: Path, console: "Console") -> None:
    """The recorded tables and verdicts of the systems, then how many hold; raises UserError where none is recorded."""
    from experiments.claims import report

    records = {system.name: report.read_recorded(results / system.name) for system in systems}
    if not any(records.values()):
        raise UserError(f"nothing is recorded of {', '.join(records)}: run the claims with --record")
    for record in filter(None, records.values()):
        print_plainly(console, f"{record['system']}: {record['statement']} ({record['paper']})")
        print_table(console, *report.recorded_rows(record))
        print_plainly(console, report.sentence(record))
    counts = collections.Counter(record["holds"] for record in records.values() if record is not None)
    held = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items()))
    missing = [name for name, record in records.items() if record is None]
    print_plainly(console, f"holds: {held}" + (f"; not recorded: {', '.join(missing)}" if missing else ""))


def print_plainly(console: "Console", text: str) -> None:
    """A line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(console: "Console", header: list[str], rows: list[list[str]]) -> None:
    """Arms to the left, numbers to the right."""
    from rich.table import Table

    table = Table()
    for column in header:
        table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def select(names: list[str], family: str | None, catalogue: list[System]) -> list[System]:
    """The systems named and those of the family, each once, in the order given."""
    by_name = {system.name: system for system in catalogue}
    for name in names:
        if name not in by_name:
            found = nearest(name, by_name)
            hint = f"did you mean {found}?" if found else "`python -m experiments.systems` lists them"
            raise UserError(f"no system {name!r}; {hint}")
    if not names and family is None:
        raise UserError("name a system or a --family; `python -m experiments.systems` lists them")
    members = in_family(catalogue, family) if family is not None else []
    return list(dict.fromkeys([*(by_name[name] for name in names), *members]))


def parse_seeds(words: list[str]) -> tuple[int, ...]:
    """`["0", "2"]` to (0, 2)."""
    if not words or not all(word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise UserError(f"--seeds={','.join(words)}: expected different whole numbers, such as 0,1,2")
    return tuple(map(int, words))


def load_claim(system: System) -> "Claim":
    """The `CLAIM` of a system's claim file."""
    from experiments.claims.harness import Claim

    module_name = system.claim.removesuffix(".py").replace("/", ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise UserError(f"{system.claim}: no such claim file (named by research/systems.toml)") from error
    claim = getattr(module, "CLAIM", None)
    if not isinstance(claim, Claim) or claim.system != system.name:
        raise UserError(f"{system.claim}: defines no CLAIM = Claim(system={system.name!r}, ...)")
    return claim


def run_claim(
    system: System, claim: "Claim", seeds: tuple[int, ...], workdir: Path, console: "Console"
) -> None:
    """Runs, judges, prints and saves one claim."""
    from experiments.claims import harness, report

    folder = workdir / system.name
    # The result depends on the claim, on what the paper adds, and on the config.
    sources = harness.fingerprint(ROOT / file for file in (system.claim, system.module, system.config))

    def progress(label: str, number: int, total: int) -> contextlib.AbstractContextManager["Progress"]:
        return _bar(console, f"[{number}/{total}] {label}")

    def tell(text: str) -> None:
        print_plainly(console, text)

    tell(f"{claim.system}: {claim.statement} ({claim.paper})")
    results = harness.run_arms(claim, seeds, folder, sources, tell, progress)
    record = report.report(claim, seeds, results, folder)
    print_table(console, *report.rows(claim, results))
    tell(report.sentence(record))
    if RECORD.value:
        report.record_to(folder, RESULTS / system.name)
        tell(f"recorded in {RESULTS / system.name}")


@contextlib.contextmanager
def _bar(console: "Console", label: str) -> Iterator["Progress"]:
    """A live bar for one arm; without a terminal, a line when it starts."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    if not console.is_terminal:
        console.print(label, markup=False, highlight=False)
        yield lambda fraction, text="": None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, TextColumn("{task.fields[text]}", markup=False), console=console) as bar:
        task = bar.add_task(label, total=1.0, text="")
        yield lambda fraction, text="": bar.update(task, completed=fraction, text=text)


if __name__ == "__main__":
    PROGRAM.run(main)
