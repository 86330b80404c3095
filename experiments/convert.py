"""Converts a trained model, from a Hugging Face directory, a workdir or a model directory, to either format.

    python -m experiments.convert --from=runs/matlm --to=exported --format=huggingface --dtype=bfloat16
    python -m experiments.convert --from=Qwen3-0.6B --to=qwen3 --format=lathe
    python -m experiments.convert --from=runs/mixed --to=exported --format=huggingface --unequal=refuse

`huggingface` is what transformers and the tools around it load: config.json, safetensors, the tokenizer. The
family (Llama, Mistral, Qwen 2 or 3, Gemma 2 or 3) follows from the model; what none of them computes is
refused with the reason. `lathe` is the model directory that every program here takes as a workdir. No pickle
is read and torch is not needed.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from research.training.workdir import Loaded

PROGRAM = cli.Program(__doc__)
FROM = PROGRAM.define(flags.DEFINE_string, "from", None, "The directory to read.", required=True)
TO = PROGRAM.define(flags.DEFINE_string, "to", None, "The directory to write, new or empty.", required=True)
FORMAT = PROGRAM.define(
    flags.DEFINE_enum, "format", None, "What to write.", ["huggingface", "lathe"], required=True
)
DTYPE = PROGRAM.define(
    flags.DEFINE_enum,
    "dtype",
    "float32",
    "Of the written parameters; float16 for huggingface only.",
    ["float32", "bfloat16", "float16"],
)
UNEQUAL = PROGRAM.define(
    flags.DEFINE_enum,
    "unequal",
    None,
    "For huggingface, where FFN widths differ between layers: pad (the default) fills narrower ones with "
    "zeros, which leaves the logits as they are.",
    ["pad", "refuse"],
)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "Of a workdir: the checkpoint; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(
    flags.DEFINE_boolean, "ema", False, "Of a workdir: the moving average of the parameters."
)


def main(arguments: list[str]) -> None:
    from research.errors import UserError
    from research.interop import huggingface
    from research.training.workdir import save_model

    if FORMAT.value == "lathe" and UNEQUAL.value is not None:
        raise UserError("--unequal is for --format=huggingface: a model directory holds any widths")
    loaded = read()
    if FORMAT.value == "huggingface":
        report = huggingface.save(
            loaded.model,
            {"params": loaded.params},
            TO.value,
            tokenizer=loaded.tokenizer,
            dtype=DTYPE.value,
            unequal=UNEQUAL.value or "pad",
        )
        print(report)
    else:
        save_model(
            TO.value, loaded.config, loaded.params, loaded.tokenizer, dtype=DTYPE.value, inputs=loaded.inputs
        )
        print(f"{TO.value}: a model directory in {DTYPE.value}")


def read() -> "Loaded":
    """The model of `--from`, whichever kind of directory it is."""
    from research.config_capture import capture
    from research.errors import UserError
    from research.interop import huggingface
    from research.training.model_directory import TOKENS
    from research.training.workdir import Loaded, load_model

    if not huggingface.is_huggingface(FROM.value):
        return load_model(FROM.value, STEP.value, EMA.value)
    if STEP.value is not None or EMA.value:
        raise UserError(f"{FROM.value} is a Hugging Face directory: --step and --ema are for workdirs")
    model, variables, tokenizer = huggingface.load(FROM.value)
    return Loaded(model, variables["params"], tokenizer, capture(model), None, TOKENS)


if __name__ == "__main__":
    PROGRAM.run(main)
