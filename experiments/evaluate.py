"""Evaluates a trained run: every variant of its model, on the data of its evaluators.

    python -m experiments.evaluate --workdir=runs/matlm
    python -m experiments.evaluate --workdir=runs/matlm --step=400 --batches=50
    python -m experiments.evaluate --workdir=runs/matlm --split=test --json
    python -m experiments.evaluate --workdir=runs/matlm --widths=S,S,M,M --widths=M,M,L,L

One row for each variant (the granularities of a nested model, for instance): loss in nats, accuracy, bits per
byte for text, parameters. `--widths` measures submodels of a nested model instead (Mix'n'Match). `--split`
reads another split of the evaluators' data than the config names. The moving average is measured where the run
keeps one, as in training.
"""

import json
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PROGRAM = cli.Program(__doc__)
WORKDIR = PROGRAM.workdir_flag("The run to evaluate.", required=True)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint; the newest by default.", lower_bound=0
)
SPLIT = PROGRAM.define(
    flags.DEFINE_string, "split", None, "Another split of the data: train, validation, test."
)
BATCHES = PROGRAM.define(
    flags.DEFINE_integer,
    "batches",
    None,
    "At most so many batches; all of the split by default.",
    lower_bound=1,
)
WIDTHS = PROGRAM.define(
    flags.DEFINE_multi_string,
    "widths",
    [],
    "A submodel instead: one word a layer, as in extract. Repeatable.",
)
JSON = PROGRAM.define(
    flags.DEFINE_boolean, "json", False, "Print JSON: {evaluator: {variant: {metric: value}}}."
)


def main(arguments: list[str]) -> None:
    from pathlib import Path

    from research.config import build
    from research.errors import UserError
    from research.training.evaluators import Evaluation
    from research.training.workdir import read_config

    path = Path(WORKDIR.value).expanduser()
    if not (path / "config.json").exists():
        raise UserError(f"{path} is not a workdir: it has no config.json")
    config = read_config(path / "config.json")
    if not config.get("evaluators"):
        raise UserError(f"{path / 'config.json'}: the run has no evaluators, so nothing says what to measure")
    trainer = build(replaced(config, SPLIT.value, BATCHES.value))
    state, mesh = trainer.restore(path, STEP.value)
    params = state.params if state.ema is None else state.ema
    evaluation = Evaluation(submodels(trainer.task, WIDTHS.value) if WIDTHS.value else trainer.task, mesh)
    results = {evaluator.name: evaluation.run(evaluator, params) for evaluator in trainer.evaluators}
    if JSON.value:
        print(json.dumps({"step": int(state.step), "results": results}, indent=2))
        return
    rows = {
        f"{name}/{variant}" if variant else name: values
        for name, variants in results.items()
        for variant, values in variants.items()
    }
    print(f"{path} after step {int(state.step)}")
    print_table(rows)


def submodels(task: Any, widths: list[str]) -> Any:
    """A task that evaluates the submodels that `widths` describe. Raises UserError if the task is not nested."""
    from research.elastic.matformer import MatFormer, Submodels, parse_widths
    from research.errors import UserError

    if not isinstance(task, MatFormer):
        raise UserError(f"--widths={widths[0]}: the run trains one width only, there is nothing to cut")
    return Submodels(task, {text: parse_widths(text, task) for text in widths})


def replaced(config: "ConfigDict", split: str | None, batches: int | None) -> "ConfigDict":
    """The config with the evaluators' data at another split, and with `batches` batches (`None`: all)."""
    from research.errors import UserError

    config = config.copy_and_resolve_references()
    for evaluator in config.evaluators:
        evaluator.batches = batches
        if split is not None:
            if "split" not in evaluator.data:
                raise UserError(f"--split={split}: the data of evaluator {evaluator.name!r} has no splits")
            evaluator.data.split = split
            evaluator.name = split if len(config.evaluators) == 1 else f"{evaluator.name} on {split}"
    return config


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Prints {model: {metric: value}} with a column for each metric of the whole model but the time it took."""
    from rich.console import Console
    from rich.table import Table

    # What was measured in a layer, such as layer_0/mlp/load, is left to --json.
    names = [name for values in rows.values() for name in values if name != "seconds" and "/" not in name]
    leading = [name for name in ("loss", "bits_per_byte", "accuracy", "parameters") if name in names]
    columns = list(dict.fromkeys(leading + names))
    table = Table("", *(column.replace("_", " ") for column in columns))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in rows.items():
        table.add_row(name, *(cell(values.get(column)) for column in columns))
    Console().print(table)


def cell(value: float | None) -> str:
    """A number as a person reads it: counts with separators, the rest to five digits."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


if __name__ == "__main__":
    PROGRAM.run(main)
