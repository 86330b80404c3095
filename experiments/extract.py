"""Cuts one submodel out of a nested model and saves it as a model of its own.

    python -m experiments.extract --workdir=runs/matlm --widths=M --to=runs/matlm_M
    python -m experiments.extract --workdir=runs/matlm --widths=S,S,L,XL --to=runs/mixed
    python -m experiments.extract --workdir=runs/matlm --widths=64,64,-,512 --to=runs/shallow

One word is a granularity for every layer; with commas there is one word a layer: a granularity, its width in units, or
- to leave the layer out. The arrays are really smaller, and every program takes the new directory like any other
(`generate --workdir`, `convert --from`); evaluate also needs --like=RUN, as it does not say what it was trained on.
Without --workdir the model that ships is cut.
"""

from absl import flags

from experiments import cli

PROGRAM = cli.Program(__doc__)
WORKDIR = PROGRAM.workdir_flag("A run or a model directory; the model that ships by default.")
WIDTHS = PROGRAM.define(
    flags.DEFINE_string, "widths", None, "The submodel: M, or one word a layer.", required=True
)
TO = PROGRAM.define(
    cli.new_directory, "to", None, "The model directory to write, new or empty.", required=True
)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(flags.DEFINE_boolean, "ema", False, "The moving average of the parameters.")
DTYPE = PROGRAM.define(
    flags.DEFINE_enum, "dtype", "float32", "Precision of the saved parameters.", ["float32", "bfloat16"]
)


def main(arguments: list[str]) -> None:

    from research.elastic.loading import load_submodel
    from research.language import BASE
    from research.nn.accounting import count_parameters
    from research.training.model_directory import save_model

    path = WORKDIR.value or BASE
    loaded, spec = load_submodel(path, WIDTHS.value, STEP.value, EMA.value)
    card = (
        f"# A submodel\n\nCut out of a nested model with\n\n"
        f"    python -m experiments.extract --widths={WIDTHS.value} --to=...\n\n"
        f"Layers kept: {list(spec.keep_layers)}; FFN widths: {list(spec.widths)}.\n"
    )
    save_model(TO.value, loaded.config, loaded.params, loaded.tokenizer, DTYPE.value, card, loaded.inputs)
    count = count_parameters(loaded.params)
    layers = ", ".join(f"{old}: {width}" for old, width in zip(spec.keep_layers, spec.widths, strict=True))
    print(f"{TO.value}: {count:,} parameters; FFN widths by layer {layers}")


if __name__ == "__main__":
    PROGRAM.run(main)
