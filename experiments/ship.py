"""Turns a trained nested model into the model directory that ships, with its card.

    python -m experiments.train --config=configs/matlm.py:base --workdir=runs/base
    python -m experiments.ship --workdir=runs/base --to=research/language/base

Measures every granularity on the held-out files, compresses the same bytes with `xz -9e` and `zstd -19 --long` for
comparison, and writes config, bfloat16 weights, tokenizer and model card. The measured model is the one that is
written: rounded to bfloat16.
"""

import lzma
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PROGRAM = cli.Program(__doc__)
WORKDIR = PROGRAM.workdir_flag("The run of a MatLM.", required=True)
TO = PROGRAM.define(cli.path, "to", None, "The model directory.", required=True)
SPLIT = PROGRAM.define(flags.DEFINE_string, "split", "test", "The held-out part of the run's corpus.")
COMMAND = PROGRAM.define(
    flags.DEFINE_string,
    "command",
    "python -m experiments.train --config=configs/matlm.py:base --workdir=runs/base",
    "The command of the training, for the card.",
)


def main(arguments: list[str]) -> None:
    from pathlib import Path

    import jax
    import jax.numpy as jnp

    from research.config import build
    from research.elastic.loading import load_nested
    from research.training.evaluators import Evaluate, Evaluation
    from research.training.model_directory import read_config, save_model
    from research.training.partitioning import make_mesh

    path = Path(WORKDIR.value)
    task, loaded = load_nested(path)
    config = read_config(path / "config.json")
    config.data.update(split=SPLIT.value, shuffle=False)
    data = build(config.data)
    shipped = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), loaded.params)
    evaluation = Evaluation(task, make_mesh({}, jax.devices()[:1]))
    print(f"measuring {len(task.names)} granularities on {SPLIT.value}", file=sys.stderr)
    measured = evaluation.run(Evaluate("held out", data, batch_size=16), shipped)
    print("compressing the same bytes", file=sys.stderr)
    rivals = compressors(held_out_bytes(config))
    card = model_card(read_config(path / "config.json"), measured, rivals, loaded.step, len(data))
    save_model(
        TO.value,
        loaded.config,
        loaded.params,
        loaded.tokenizer,
        dtype="bfloat16",
        card=card,
        experiment=read_config(path / "config.json"),
    )
    print(card)


def held_out_bytes(config: "ConfigDict") -> bytes:
    """The text of the split, one file after the other."""
    from research.data.sources import open_source

    source = open_source(config.data.get("sources", "builtin"), SPLIT.value)
    return b"".join(source[i].encode() for i in range(len(source)))


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the text as one stream."""
    from research.errors import UserError

    try:
        import zstandard
    except ImportError:
        raise UserError("the comparison with zstd needs: pip install zstandard") from None
    # `zstd -19 --long`: a window of 2**27 bytes and long-distance matching.
    options = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
    return {
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        "zstd -19 --long": 8
        * len(zstandard.ZstdCompressor(compression_params=options).compress(text))
        / len(text),
        "bytes": len(text),
    }


def model_card(
    config: "ConfigDict",
    measured: dict[str, dict[str, Any]],
    rivals: dict[str, float],
    step: int,
    records: int,
) -> str:
    """README.md of the model directory."""
    stage = config.stages[0]
    length = config.data.length
    tokens = step * stage.batch_size * length
    lines = [
        "# A small MatLM trained on Python's standard library",
        "",
        "A nested decoder language model (MatFormer, arXiv 2310.07707): inside every FFN the first 1/8, 1/4 and 1/2",
        "of the units form smaller FFNs. It ships so that decoding, compression and every claim can start from a",
        "trained model without a download. It knows Python source code, a little of it, and nothing else.",
        "",
        "- **Data**: the `.py` files of CPython 3.11's standard library, its tests included, split by file with",
        "  near-duplicate files kept in the training part.",
        f"- **Recipe**: {step:,} updates of {stage.batch_size} x {length} tokens ({tokens / 1e6:.1f}M in all), one",
        "  granularity drawn per update, Muon with a warm-up, a constant rate and a linear decay, float32, on two",
        "  CPU cores.",
        f"- **Command**: `{COMMAND.value}`, then `python -m experiments.ship --workdir=... --to=...`.",
        "- **Weights**: bfloat16 safetensors; `config.json` builds the model, `experiment.json` is the whole run.",
        "- **Licence**: the weights Apache-2.0, like the project; the corpus is under the PSF licence.",
        "",
        f"Held-out files ({rivals['bytes']:,} bytes, {records:,} rows), never seen in training; weights rounded to",
        "bfloat16:",
        "",
        "| granularity | parameters | nats per token | bits per byte | accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in measured.items():
        lines.append(
            f"| {name} | {found['parameters']:,} | {found['loss']:.4f} | {found['bits_per_byte']:.4f} "
            f"| {found['accuracy']:.4f} |"
        )
    lines += [
        *(f"| {name} | | | {value:.4f} | |" for name, value in rivals.items() if name != "bytes"),
        "",
        f"The model reads each row of {length} tokens on its own; the compressors read all files as one stream. The",
        "size of the model itself is not counted, nor that of the compressors.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PROGRAM.run(main)
