"""Arcana: modality LoRA on a frozen decoder and a ladder of queries (arXiv 2410.13733).

    python -m experiments.train --config=configs/arcana.py --workdir=runs/arcana

`tiny` (the default): generated pictures of 3 x 3 cells, ranks 4 and 12, four queries. The decoder stays as it is:
drawn, or with `--config.task.parts` a trained one, which is the paper's setting; a minute on two CPU cores.
`paper`: Vicuna-7B with ranks 64 and 192, CLIP ViT-L/14 with 64 queries, LLaVA-1.5's data and rates; for accelerators.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Scenes
from research.multimodal.arcana import Arcana, ArcanaTuning, LadderProjection, MMLoRA, QLadder, Rung
from research.multimodal.media import Square

PRESETS = ("tiny", "paper")
OWN = ("^connector/", "/kernel/(vision|language)/")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        planner = of(Square, side=336, padded=True, count=576 + 64, **llava.CLIP)
        parts = llava.paper_parts(planner)
        model_ = of(Arcana, **parts, connector=ladder(parts["tower"], 23, 64, 4096))
        experiment = llava.paper_experiment(model_, instruct=OWN)
        experiment.task = tuning(model_, of(MMLoRA), compute_dtype="bfloat16")
        return experiment
    model_ = model()
    stages = (("align", 100, ("^connector/",)), ("instruct", 300, OWN))
    experiment = llava.toy_experiment(model_, of(Scenes), stages)
    experiment.task = tuning(model_, of(MMLoRA, vision_rank=4, language_rank=12))
    return experiment


def tuning(model_: ConfigDict, adapter: ConfigDict, **fields) -> ConfigDict:
    return of(ArcanaTuning, model=model_, adapter=adapter, **fields)


def ladder(tower: ConfigDict, rungs: int, queries: int, width: int) -> ConfigDict:
    """The connector whose rungs are shaped as a tower's blocks."""
    block = tower.blocks[0]
    rung = of(Rung, num_heads=block.attention.num_heads, mlp=block.mlp, norm=block.norm)
    class_token = tower.get("class_token", False)
    return of(
        LadderProjection,
        ladder=of(QLadder, rung=rung, rungs=rungs, queries=queries, class_token=class_token),
        width=width,
    )


def model(queries: int = 4) -> ConfigDict:
    """The toy parts, with a rung for each of the tower's two layers."""
    parts = llava.toy_parts(of(Square, patch=8, side=24, count=9 + queries))
    return of(Arcana, **parts, connector=ladder(parts["tower"], 2, queries, llava.WIDTH), dropout=0.0)
