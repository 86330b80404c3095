"""Evaluates a trained run or a model directory: every variant of its model, on the data of its evaluators.

    python -m experiments.evaluate --workdir=runs/matlm
    python -m experiments.evaluate --workdir=runs/matlm --step=400 --batches=50
    python -m experiments.evaluate --workdir=runs/matlm --split=test --json
    python -m experiments.evaluate --workdir=runs/matlm --widths=S,S,M,M --widths=M,M,L,L
    python -m experiments.evaluate --workdir=runs/compressed
    python -m experiments.evaluate --workdir=runs/slice --like=runs/lora

One row for each variant (the granularities of a nested model, for instance): loss in nats, accuracy, bits per
byte for text, parameters. `--widths` measures submodels of a nested model instead (Mix'n'Match). `--split`
reads another split of the evaluators' data than the config names. The moving average is measured where the run
keeps one, as in training. A model directory is measured whole, on the data of the run it was trained by, or of the run
or directory at `--like`.
"""

import json
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from pathlib import Path

    from ml_collections import ConfigDict

PROGRAM = cli.Program(__doc__)
WORKDIR = PROGRAM.workdir_flag("The run or model directory to evaluate.", required=True)
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
LIKE = PROGRAM.define(
    cli.path,
    "like",
    None,
    "Of a model directory: the run, model or adapter directory whose evaluators' data to measure on.",
)
JSON = PROGRAM.define(
    flags.DEFINE_boolean, "json", False, "Print JSON: {evaluator: {variant: {metric: value}}}."
)


def main(arguments: list[str]) -> None:
    from research.config import build
    from research.errors import UserError
    from research.training.evaluators import Evaluation
    from research.training.model_directory import WEIGHTS
    from research.training.partial import ADAPTER
    from research.training.workdir import directory_of

    path = directory_of(WORKDIR.value)
    if LIKE.value is not None and not (path / WEIGHTS).exists():
        raise UserError(f"{path} is no model directory, and says itself what to measure on: no --like")
    if (path / WEIGHTS).exists() or (path / ADAPTER).exists():
        evaluators, task, params, mesh, step = saved_model(path)
    else:
        trainer = build(replaced(read(path, "config.json"), SPLIT.value, BATCHES.value))
        state, mesh = trainer.restore(path, STEP.value)
        params, step = state.params if state.ema is None else state.ema, int(state.step)
        task = submodels(trainer.task, WIDTHS.value) if WIDTHS.value else trainer.task
        evaluators = trainer.evaluators
    evaluation = Evaluation(task, mesh)
    results = {evaluator.name: evaluation.run(evaluator, params) for evaluator in evaluators}
    if JSON.value:
        print(json.dumps({"step": step, "results": results}, indent=2))
        return
    rows = {
        f"{name}/{variant}" if variant else name: values
        for name, variants in results.items()
        for variant, values in variants.items()
    }
    print(path if step is None else f"{path} after step {step}")
    print_table(rows)


def read(path: "Path", name: str) -> "ConfigDict":
    """The config of the run, which has evaluators."""
    from research.errors import UserError
    from research.training.workdir import read_config

    if not (path / name).exists():
        what = "is not a workdir" if name == "config.json" else "does not say what it was trained on (--like)"
        raise UserError(f"{path} {what}: it has no {name}")
    config = read_config(path / name)
    if not config.get("evaluators"):
        raise UserError(f"{path / name}: the run has no evaluators, so nothing says what to measure")
    return config


def saved_model(path: "Path") -> tuple[Any, Any, Any, Any, None]:
    """Evaluators, task, parameters, mesh and no step of a model directory, whose model may be another than that of the
    run it came from: sliced, unrolled, compressed; or of an adapter directory, with its base."""
    import jax

    from research.config import build
    from research.errors import UserError
    from research.training.model_directory import EXPERIMENT, WEIGHTS
    from research.training.partial import ADAPTER, read_adapter_config
    from research.training.partitioning import make_mesh
    from research.training.task import LanguageModelling
    from research.training.workdir import directory_of, load_model

    if STEP.value is not None or WIDTHS.value:
        flag = "--step" if STEP.value is not None else "--widths"
        raise UserError(f"{path} is no run, and has one set of parameters: no {flag}")
    adapter = (path / ADAPTER).exists()
    source = path if LIKE.value is None else directory_of(LIKE.value)
    if (source / ADAPTER).exists():
        config = read_adapter_config(source)
    else:
        model_directory = LIKE.value is None or (source / WEIGHTS).exists()
        config = read(source, EXPERIMENT if model_directory else "config.json")
    if not config.get("evaluators"):
        raise UserError(f"{source}: the run has no evaluators, so nothing says what to measure")
    config = replaced(config, SPLIT.value, BATCHES.value)
    loaded = load_model(path)
    if loaded.inputs[0].dtype != "int32":
        raise UserError(f"{path} holds a model of images; evaluate the run it came from")
    for evaluator in config.evaluators:
        if not adapter and ("tokenizer" in evaluator.data or loaded.tokenizer is not None):
            evaluator.data.tokenizer = str(path)
    evaluators = tuple(build(evaluator) for evaluator in config.evaluators)
    return evaluators, LanguageModelling(loaded.model), loaded.params, make_mesh({}, jax.devices()[:1]), None


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
