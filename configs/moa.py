"""MoA: a mixture of attention spans (arXiv 2406.14909).

    python -m experiments.train --config=configs/moa.py:tiny --workdir=runs/moa
    python -m experiments.spans --workdir=runs/moa --config=configs/moa.py:plan --output=runs/moa_plan.json
    python -m experiments.spans --config=configs/moa.py:text --output=runs/text_plan.json
    python -m experiments.generate --plan=runs/text_plan.json --prompt='import '

A plan needs a trained dense model and trains nothing, so two kinds of presets are here: what is trained, and planners.

`tiny` (the default): the dense model, 4 layers of 4 heads that recall 32 values by their keys from 128 tokens; 0.2M
parameters, accuracy 1.00, about a minute on two CPU cores.
`plan`: plans for it at half of the keys and values; half a minute.
`text`: plans for the language model that ships, up to its 512 tokens; two minutes.
`paper`: the search of the paper for Vicuna-7B and Llama-3-8B, for accelerators: profiled at 2k, 4k and 8k tokens,
selected at 12k, used up to 16k. Its calibration text is multi-document news with the model's own continuations.
"""

from ml_collections import ConfigDict

from configs import recall
from research.config import of
from research.data.recall import Answers, Recall
from research.data.text import TokenDataset
from research.sparse.moa.planner import Planner
from research.sparse.moa.rules import Grid

PRESETS = ("tiny", "plan", "text", "paper")


def recall_planner(**fields) -> ConfigDict:
    """For the model of `configs/recall.py`: profiled at 64 and 128 tokens, selected at 96."""

    def rows(length: int, split: str) -> ConfigDict:
        return of(Recall, length=length, split=split, seed=1, size=1024)

    return of(
        Planner,
        calibration=(rows(64, "train"), rows(128, "train")),
        validation=rows(96, "validation"),
        **dict(grid=of(Grid, sinks=4, block=4), step=8, samples=32, batch_size=16) | fields,
    )


def text_planner(
    lengths: tuple[int, ...], unseen: int, answers: int, sources: str = "builtin", **fields
) -> ConfigDict:
    """Of text whose last `answers` tokens the model writes itself."""

    def rows(length: int, split: str) -> ConfigDict:
        return of(Answers, data=of(TokenDataset, sources=sources, split=split, length=length), count=answers)

    return of(
        Planner,
        calibration=tuple(rows(length, "train") for length in lengths),
        validation=rows(unseen, "validation"),
        **fields,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return recall.experiment(recall.decoder())
    if preset == "plan":
        return recall_planner()
    if preset == "text":
        grid = of(Grid, sinks=16, block=16)
        return text_planner((256, 512), 384, 32, grid=grid, step=64, samples=16, batch_size=4)
    grid = of(Grid, sinks=64, block=64)
    return text_planner(
        (2048, 4096, 8192),
        12288,
        1024,
        sources="hf:alexfabbri/multi_news",
        constrained=(16384,),
        grid=grid,
        step=1024,
        samples=50,
        batch_size=1,
        time_limit=600.0,
    )
