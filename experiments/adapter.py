"""Writes a trained adapter as a directory of its own, or merged into its base as a plain model.

    python -m experiments.adapter --adapter=runs/lora --output=adapters/sums
    python -m experiments.adapter --adapter=runs/lora --merge=merged
    python -m experiments.adapter --adapter=adapters/sums --merge=merged --dtype=bfloat16

The run or adapter directory names its base, which must be where it was. `--output` writes what was trained, without
optimizer or history; `--merge` a model directory without any adapter: of PAT the smaller model, of a quantized base
float kernels. Every program takes the adapter's run, its directory and the merged model alike.
"""

from absl import flags

from experiments import cli

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
    from research.training.workdir import read_adapter

    if OUTPUT.value is None and MERGE.value is None:
        raise UserError("nothing to do: give --output=FOLDER, --merge=FOLDER, or both")
    config, task, saved = read_adapter(ADAPTER.value, STEP.value, EMA.value)
    if OUTPUT.value is not None:
        save_adapter(OUTPUT.value, config, saved)
        trained = count_parameters(saved["adapter"])
        print(f"{OUTPUT.value}: {trained:,} trained parameters, {count_bytes(saved) / 1e6:.2f} MB")
    if MERGE.value is not None:
        model, params, told = task.merge(task.recall(saved))
        card = f"# Merged\n\n`python -m experiments.adapter --adapter={ADAPTER.value}` into {task.base}: {told}.\n"
        save_model(MERGE.value, capture(model), params, task.tokenizer, DTYPE.value, card, experiment=config)
        print(f"{MERGE.value}: {told}; {count_parameters(params):,} parameters")


if __name__ == "__main__":
    PROGRAM.run(main)
