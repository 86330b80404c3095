"""PAT: tuning that prunes a quarter of the residual stream's channels while it learns (arXiv 2408.14721).

    python -m experiments.train --config=configs/pat.py --workdir=runs/pat
    python -m experiments.adapter --adapter=runs/pat --merge=pruned

`tiny` (the default): the base model that ships, 192 of its 256 channels, on its own text; the mask hardens in the first
120 of 200 updates. `--merge` writes the smaller model.
`paper`: 25 % of the channels, rank 20 and mixing rank 200, 10,000 steps until the mask is 0 or 1; `task.base` is a
run or model directory of yours.
"""

from ml_collections import ConfigDict

from configs.lora import TRAINED, stage, tuning
from research.adapters.pat import PAT
from research.config import of
from research.training.optimizers import adamw, cosine

PRESETS = ("tiny", "paper")


def stages(
    prune: int, recover: int, peak: float, rate: float, batch_size: int, warmup: int
) -> tuple[ConfigDict, ...]:
    """The mask, then its consequences; the proxy learns `rate` times as fast as the rest."""
    optimizer = of(
        adamw,
        schedule=of(cosine, peak=peak, warmup=warmup, floor=0.3),
        weight_decay=0.0,
        rates=(("^adapter/proxy", rate),),
    )
    return (
        stage(prune, peak, batch_size, name="prune", optimizer=optimizer),
        stage(
            recover, peak, batch_size, warmup, name="recover", frozen=("^adapter/proxy",), trainable=TRAINED
        ),
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        adapter = of(PAT, rank=8, alpha=16.0, dropout=0.0, mixing_rank=16, steps=120)
        return tuning(adapter, stages(120, 80, 2e-3, 10.0, 8, 5), sources="builtin")
    return tuning(of(PAT), stages(10_000, 13_000, 5e-5, 1.0, 128, 100), sources="builtin", length=256)
