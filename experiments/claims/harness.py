"""What a claim is, and how its arms are run, saved, resumed and judged.

A claim file, `experiments/claims/<system>.py`, defines `CLAIM`:

    def train(seed, workdir, progress, needs):
        ...                          # `workdir` is the folder of this arm and seed, kept over interruptions
        progress(0.5, "half way")
        return {"loss": 1.25, "curve": [2.0, 1.5, 1.25], "budget": 4096, "bytes": 1000}

    CLAIM = Claim(
        system="matformer", paper="arXiv 2310.07707, section 4.1", statement="...", setting="...",
        measures={"loss": "nats/token", "curve": "nats/token at each evaluation"},
        budget="training tokens",
        arms={"nested": Arm(train, "one nested model"), "cut": Arm(cut, "its slice", needs=("nested",))},
        judge=judge, figure=figure,
    )

Every finished (arm, seed) is saved at once, so an interrupted claim goes on where it stopped. What is saved
belongs to a fingerprint of the claim's sources: when they change, the arms are run again.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from research.errors import UserError, nearest

VERDICTS = ("yes", "partly", "no")
COSTS = ("budget", "bytes", "seconds")

Number = float | int
Results = dict[str, dict[str, list[Any]]]
"""results[arm][measure] lists one entry per seed: a number, or a list of numbers for a curve. The costs
`budget`, `bytes` and `seconds` are there too."""


class Progress(Protocol):
    """Tells how far an arm is: `progress(fraction, text="")`, fraction from 0 to 1."""

    def __call__(self, fraction: float, text: str = "") -> None: ...


@dataclass(frozen=True)
class Needed:
    """What an arm sees of an arm it needs, of the same seed: its numbers and its folder."""

    measured: dict[str, Any]
    workdir: Path


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    run(seed, workdir, progress, needs) returns a dict: some of the claim's measures (a number, or a list of
      numbers for a curve), `budget` (in the claim's unit) and `bytes` (of the model it ends with); the
      harness adds `seconds` (wall clock, summed over interrupted attempts). The same seed must give the same
      numbers. `needs` maps each arm of `Arm.needs` to a `Needed`. The harness shows its own progress: an arm
      that trains calls `Trainer.run(..., progress=False)`.
    description: what it is, for the table of the report.
    needs: arms, declared earlier, whose output it reads.
    """

    run: Callable[[int, Path, Progress, dict[str, Needed]], Mapping[str, Any]]
    description: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A paper's statement and how it is measured here.

    system: its name in the catalogue. paper: where the statement is made. statement: the paper's own.
    setting: our reduced one, in words. measures: name -> unit. budget: the unit of `budget`.
    arms: name -> Arm, in the order they run. seeds: the default ones.
    judge(results) -> (verdict, why): verdict is "yes", "partly" or "no"; why is one sentence with numbers.
    figure(results, path): draws the PNG.
    """

    system: str
    paper: str
    statement: str
    setting: str
    measures: Mapping[str, str]
    budget: str
    arms: Mapping[str, Arm]
    judge: Callable[[Results], tuple[str, str]]
    figure: Callable[[Results, Path], None]
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self):
        earlier: list[str] = []
        for name, arm in self.arms.items():
            if not name or "/" in name or name.startswith("."):
                raise UserError(f"{self.system}: arm {name!r}: a name is used as a folder")
            for needed in arm.needs:
                if needed not in earlier:
                    raise UserError(
                        f"{self.system}: arm {name} needs {needed!r}, which is not declared before it"
                    )
            earlier.append(name)
        if not self.arms or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"{self.system}: a claim has arms and different seeds")
        if reserved := set(COSTS) & set(self.measures):
            raise UserError(
                f"{self.system}: {', '.join(sorted(reserved))} can't be a measure: a cost is called so"
            )


def fingerprint(files: Iterable[Path]) -> str:
    """12 hex digits that change when any of the files does."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def run_arms(
    claim: Claim,
    seeds: Iterable[int],
    folder: Path,
    sources: str,
    tell: Callable[[str], None],
    progress: Callable[[str, int, int], contextlib.AbstractContextManager[Progress]],
) -> Results:
    """Runs every (arm, seed) that is not saved yet, and returns all results.

    Args:
      seeds: whose results are wanted.
      folder: where arms are kept, below `arms/<sources>/<arm>/<seed>/`.
      sources: fingerprint of what the results depend on.
      tell: prints a line.
      progress: (label, number of this run, of how many) -> a context that gives the arm its callback.

    Raises:
      UserError: `folder` can't be made, or an arm returned something that is not a result. Errors of an arm pass
        through; what was finished before stays saved.
    """
    seeds = tuple(seeds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: no folder can be made there: {error.strerror}") from error
    base = folder / "arms" / sources
    if not base.is_dir() and (folder / "arms").is_dir() and any((folder / "arms").iterdir()):
        tell(f"{claim.system}: its sources changed, so the arms saved before are not used and all run again")
    runs = [(name, arm, seed) for seed in seeds for name, arm in claim.arms.items()]
    saved: dict[tuple[str, int], dict[str, Any]] = {}
    for name, _, seed in runs:
        path = base / name / str(seed) / "result.json"
        if path.is_file():
            saved[name, seed] = _read(path)
    if saved:
        tell(f"{claim.system}: {len(saved)} of {len(runs)} runs were saved before")
    for number, (name, arm, seed) in enumerate(runs, start=1):
        if (name, seed) in saved:
            continue
        place = base / name / str(seed)
        needs = {other: Needed(saved[other, seed], base / other / str(seed) / "work") for other in arm.needs}
        with progress(f"{name}, seed {seed}", number, len(runs)) as report, _clock(place) as seconds:
            work = place / "work"
            work.mkdir(parents=True, exist_ok=True)
            measured = _checked(claim, name, seed, arm.run(seed, work, report, needs))
        measured["seconds"] = seconds()
        write(place / "result.json", json.dumps(measured, indent=2, allow_nan=False) + "\n")
        saved[name, seed] = _read(place / "result.json")  # as a resumed run will see it
    results: Results = {}
    for name in claim.arms:
        keys = [key for key in (*claim.measures, *COSTS) if key in saved[name, seeds[0]]]
        for seed in seeds:
            if set(saved[name, seed]) != set(keys):
                raise UserError(
                    f"{claim.system}: arm {name} measured different things with seeds {seeds[0]} and {seed}"
                )
        results[name] = {key: [saved[name, seed][key] for seed in seeds] for key in keys}
    return results


def judge(claim: Claim, results: Results) -> tuple[str, str]:
    """The claim's verdict and sentence, checked."""
    verdict, why = claim.judge(results)
    if verdict not in VERDICTS:
        raise UserError(f"{claim.system}: the verdict is {verdict!r}, expected one of {', '.join(VERDICTS)}")
    return verdict, " ".join(why.split())


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not a saved result ({error}); delete it and run again") from error


def _checked(claim: Claim, arm: str, seed: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an arm as plain floats, ints and lists."""
    where = f"{claim.system}: arm {arm}, seed {seed}"
    accepted = (*claim.measures, "budget", "bytes")
    result = {}
    for key, value in measured.items():
        if key not in accepted:
            found = nearest(key, accepted)
            hint = (
                f"did you mean {found}?" if found else f"the claim's measures are {', '.join(claim.measures)}"
            )
            raise UserError(f"{where}: measured {key!r}, which the claim does not name; {hint}")
        result[key] = (
            [_number(item, f"{where}: {key}") for item in value]
            if _is_curve(value)
            else (_number(value, f"{where}: {key}"))
        )
    if missing := [key for key in ("budget", "bytes") if key not in result]:
        raise UserError(f"{where}: returned no {' and no '.join(missing)}")
    if len(result) == 2:
        raise UserError(f"{where}: measured nothing; the claim's measures are {', '.join(claim.measures)}")
    return {key: result[key] for key in accepted if key in result}


def _is_curve(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 1 or isinstance(value, list | tuple)


def _number(value: Any, where: str) -> Number:
    """A finite Python number; arrays of one element are taken too."""
    try:
        number = value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} has shape {value.shape}, expected a number or a curve") from error
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise UserError(
            f"{where} is {number!r} ({type(number).__name__}), expected a number or a list of numbers"
        )
    if not math.isfinite(number):
        raise UserError(f"{where} is {number}")
    return number


@contextlib.contextmanager
def _clock(place: Path) -> Iterator[Callable[[], float]]:
    """Wall seconds of this attempt and of those that were interrupted before it."""
    path = place / "seconds.json"
    earlier = json.loads(path.read_text()) if path.is_file() else 0.0
    begun = time.monotonic()

    def total() -> float:
        return round(earlier + time.monotonic() - begun, 2)

    try:
        yield total
    finally:
        write(path, json.dumps(total()))
