"""Writes a trained adapter as a directory of its own, or merged into its base as a plain model.

    python -m experiments.adapter --adapter=runs/lora --output=adapters/sums
    python -m experiments.adapter --adapter=runs/lora --merge=merged
    python -m experiments.adapter --adapter=adapters/sums --merge=merged --dtype=bfloat16

The run or adapter directory names its base, which must be where it was. `--output` writes what was trained, without
optimizer or history; `--merge` a model directory without any adapter: of PAT the smaller model, of a quantized base
float kernels. Every program takes the adapter's run, its directory and the merged model alike.
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PROGRAM = cli.Program(__doc__)
ADAPTER = PROGRAM.define(
    flags.DEFINE_string, "adapter", None, "A run or directory of an adapter.", required=True
)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(flags.DEFINE_boolean, "ema", False, "The moving average of the parameters.")
OUTPUT = PROGRAM.define(flags.DEFINE_string, "output", None, "The new adapter directory.")
MERGE = PROGRAM.define(flags.DEFINE_string, "merge", None, "The new model directory.")
DTYPE = PROGRAM.define(
    flags.DEFINE_enum, "dtype", "float32", "Precision of the merged parameters.", ["float32", "bfloat16"]
)


def main(arguments: list[str]) -> None:
    from research.config_capture import capture
    from research.errors import UserError
    from research.nn.accounting import count_bytes, count_parameters
    from research.training.model_directory import save_model
    from research.training.partial import save_adapter

    if OUTPUT.value is None and MERGE.value is None:
        raise UserError("nothing to do: give --output=FOLDER, --merge=FOLDER, or both")
    config, task, saved = read(ADAPTER.value)
    if OUTPUT.value is not None:
        save_adapter(OUTPUT.value, config, saved)
        trained = count_parameters(saved["adapter"])
        print(f"{OUTPUT.value}: {trained:,} trained parameters, {count_bytes(saved) / 1e6:.2f} MB")
    if MERGE.value is not None:
        model, params, told = task.merge(task.recall(saved))
        card = f"# Merged\n\n`python -m experiments.adapter --adapter={ADAPTER.value}` into {task.base}: {told}.\n"
        save_model(MERGE.value, capture(model), params, task.tokenizer, DTYPE.value, card, experiment=config)
        print(f"{MERGE.value}: {told}; {count_parameters(params):,} parameters")


def read(path: str) -> "tuple[ConfigDict, Any, Any]":
    """-> the config of the run, its task, and what it saved."""
    from research.adapters.tuning import AdapterTuning
    from research.config import build
    from research.errors import UserError
    from research.training.checkpoint_files import local_directory
    from research.training.model_directory import CONFIG, read_config
    from research.training.partial import ADAPTER, load_adapter
    from research.training.workdir import find_task, read_checkpoint

    folder = local_directory(path)
    if (folder / ADAPTER).exists():
        if STEP.value is not None or EMA.value:
            raise UserError(
                f"{folder} is an adapter directory, with one set of parameters: no --step, no --ema"
            )
        config, saved = load_adapter(folder)
    else:
        config, saved = read_config(folder / CONFIG), None
    if "task" not in config:
        raise UserError(f"{path} holds a model, not an adapter")
    where, node = find_task(config)
    task = build(node, where)
    if not isinstance(task, AdapterTuning):
        raise UserError(f"{path} was not trained as an adapter: its task is {type(task).__name__}")
    if saved is None:
        saved, _ = read_checkpoint(folder, None, STEP.value, "ema" if EMA.value else "params")
    return config, task, saved


if __name__ == "__main__":
    PROGRAM.run(main)
