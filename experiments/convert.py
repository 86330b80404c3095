"""Converts a trained model, from a Hugging Face directory, a workdir or a model directory, to either format; and LoRA
adapters to and from that of the peft library.

    python -m experiments.convert --from=runs/matlm --to=exported --format=huggingface --dtype=bfloat16
    python -m experiments.convert --from=Qwen3-0.6B --to=qwen3 --format=lathe
    python -m experiments.convert --from=runs/mixed --to=exported --format=huggingface --unequal=refuse
    python -m experiments.convert --from=runs/lora --to=exported --format=peft
    python -m experiments.convert --from=theirs --base=qwen3 --to=adapters/theirs --format=lathe

`huggingface` is what transformers and the tools around it load: config.json, safetensors, the tokenizer. The family
(Llama, Mistral, Mixtral, Qwen 2 or 3, also of experts, Gemma 2 or 3, OLMoE, JetMoE, Mamba-2: docs/interop.md) follows
from the model; what none of them computes is refused with the reason. 4-bit kernels of GPTQ and AWQ are read packed;
LLaVA-1.5, which reads images, is read too, and of CLIP the blocks of the image tower; none of them is written. `lathe`
is the model directory that every program here takes as a workdir (evaluate with --like=RUN). `peft` takes a run or
directory of an adapter and writes `adapter_config.json` and safetensors; a directory of that kind becomes an adapter
directory for the model at `--base`. No pickle is read, and no torch needed.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from research.training.workdir import Loaded

PROGRAM = cli.Program(__doc__)
FROM = PROGRAM.define(cli.path, "from", None, "The directory to read.", required=True)
TO = PROGRAM.define(cli.new_directory, "to", None, "The directory to write, new or empty.", required=True)
FORMAT = PROGRAM.define(
    flags.DEFINE_enum, "format", None, "What to write.", ["huggingface", "lathe", "peft"], required=True
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
BASE = PROGRAM.define(
    cli.path,
    "base",
    None,
    "For an adapter of the peft library: the model that it is for, unrolled.",
)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "Of a workdir: the checkpoint; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(
    flags.DEFINE_boolean, "ema", False, "Of a workdir: the moving average of the parameters."
)


def main(arguments: list[str]) -> None:
    from research.errors import UserError
    from research.interop import huggingface, peft
    from research.multimodal.meta_transformer import Encoder
    from research.training.workdir import save_model

    if FORMAT.value == "lathe" and UNEQUAL.value is not None:
        raise UserError("--unequal is for --format=huggingface: a model directory holds any widths")
    if FORMAT.value == "peft" or peft.is_peft(FROM.value):
        convert_adapter()
        return
    if BASE.value is not None:
        raise UserError("--base is for adapters of the peft library; --from is none")
    loaded = read()
    reads_images = hasattr(loaded.model, "planner") or isinstance(loaded.model, Encoder)
    if FORMAT.value == "huggingface" and reads_images:
        raise UserError(
            f"{FROM.value}: {type(loaded.model).__name__} reads images, which --format=lathe alone holds"
        )
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


def convert_adapter() -> None:
    """An adapter of ours to peft's format, or one of theirs to an adapter directory."""
    from research.errors import UserError
    from research.interop import peft
    from research.training.partial import save_adapter
    from research.training.workdir import read_adapter

    if not peft.is_peft(FROM.value):
        _, task, saved = read_adapter(FROM.value, STEP.value, EMA.value)
        print(peft.save(task, saved, TO.value, dtype=DTYPE.value))
        return
    if FORMAT.value != "lathe" or BASE.value is None:
        raise UserError(
            f"{FROM.value} is an adapter of the peft library: give --format=lathe and --base=MODEL"
        )
    config, saved = peft.load(FROM.value, BASE.value)
    save_adapter(TO.value, config, saved)
    print(f"{TO.value}: an adapter directory for {BASE.value}")


def read() -> "Loaded":
    """The model of `--from`, whichever kind of directory it is."""
    from pathlib import Path

    import jax

    from research.config_capture import capture
    from research.errors import UserError
    from research.interop import huggingface
    from research.interop.clip import is_clip, load_clip
    from research.interop.fields import read_json
    from research.interop.llava import load_llava
    from research.training.model_directory import TOKENS
    from research.training.workdir import Loaded, load_model

    if not huggingface.is_huggingface(FROM.value):
        return load_model(FROM.value, STEP.value, EMA.value)
    if STEP.value is not None or EMA.value:
        raise UserError(f"{FROM.value} is a Hugging Face directory: --step and --ema are for workdirs")
    if is_clip(FROM.value):
        encoder, variables = load_clip(FROM.value)
        width = encoder.blocks[0].attention.num_heads * encoder.blocks[0].attention.head_dim
        inputs = (jax.ShapeDtypeStruct((1, 2, width), "float32"),)
        return Loaded(encoder, variables["params"], None, capture(encoder), None, inputs)
    images = read_json(Path(FROM.value) / "config.json")["model_type"] == "llava"
    model, variables, tokenizer = (load_llava if images else huggingface.load)(FROM.value)
    return Loaded(model, variables["params"], tokenizer, capture(model), None, TOKENS)


if __name__ == "__main__":
    PROGRAM.run(main)
