"""Finds the layer in which TidalDecode selects again: tries every one, token by token, and takes the best.

    python -m experiments.reselect --workdir=runs/tidal_decode --k=4 --select=1 --output=selector.json
    python -m experiments.generate --sparse=selector.json --prompt='def '

A model without a tokenizer is asked for needles: rows of `research.data.recall`, one of whose pairs is asked for at the
end. One that reads text continues held-out text, the second half of every row token by token, and the measure is the
share of tokens it would have said itself. Prints the table; --output keeps it with the selector, for generate.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from research.training.feed import Dataset
    from research.training.model_directory import Loaded

PROGRAM = cli.Program(__doc__)
WORKDIR = PROGRAM.workdir_flag("A run or a model directory; the model that ships by default.")
K = PROGRAM.define(
    flags.DEFINE_integer, "k", None, "Tokens that a head reads in layers that reuse.", required=True
)
SELECT = PROGRAM.define(flags.DEFINE_integer, "select", 2, "The first selection layer.", lower_bound=0)
PER = PROGRAM.define(flags.DEFINE_enum, "per", "head", "Who has a choice of its own.", ["head", "group"])
LENGTH = PROGRAM.define(
    flags.DEFINE_integer, "length", None, "Tokens of a row; the model's context by default.", lower_bound=16
)
BATCH = PROGRAM.define(flags.DEFINE_integer, "batch_size", 8, "Rows decoded together.", lower_bound=1)
BATCHES = PROGRAM.define(flags.DEFINE_integer, "batches", 4, "How many such.", lower_bound=1)
OUTPUT = PROGRAM.define(cli.path, "output", None, "Where to write the JSON.")


def main(arguments: list[str]) -> None:
    from research.language import BASE
    from research.sparse.tidal import Tidal, profile
    from research.training.workdir import load_model

    selector = Tidal(K.value, SELECT.value, per=PER.value)
    loaded = load_model(WORKDIR.value or BASE)
    data, prompt = rows(loaded, LENGTH.value or loaded.model.max_length)
    found = profile(loaded.model, loaded.params, selector, data, prompt, BATCH.value, BATCHES.value)
    print(f"dense     {found.dense:.3f}")
    for layer, accuracy in found.accuracy.items():
        print(f"layer {layer:<3} {accuracy:.3f}{'  best' if layer == found.best.reselect else ''}")
    if OUTPUT.value is not None:
        found.save(OUTPUT.value)
        print(f"selector: {OUTPUT.value}")


def rows(loaded: "Loaded", length: int) -> tuple["Dataset", int]:
    """The data, and how many tokens of a row are given."""
    if loaded.tokenizer is None:
        from research.data.recall import needle
        from research.errors import UserError

        data = needle(length, split="test", size=BATCH.value * BATCHES.value)
        if data.vocab_size > loaded.model.vocab_size:
            raise UserError(
                f"needles have {data.vocab_size} tokens, and the model, without a tokenizer, {loaded.model.vocab_size}"
            )
        return data, data.prompt - 1
    from research.data.text import TokenDataset

    text = TokenDataset("builtin", "validation", length, loaded.tokenizer, shuffle=False)
    return text, length // 2


if __name__ == "__main__":
    PROGRAM.run(main)
