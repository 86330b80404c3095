"""LUD: a model tuned to say whole lexical units at once (arXiv 2405.15208). Lossy by design.

    python -m experiments.train --config=configs/lud.py --workdir=runs/lud

`tiny` (the default): the base model that ships, tuned to say units of up to 4 tokens. Its training has not been timed
in full; what a shorter one gave is in docs/results/lud.
`paper`: units of up to 8 tokens; lengths and rates are guesses, for the paper's code was never released. The
target, `task.target`, is a run or a model directory of yours, already tuned to the data.

Decoding checks what was said, and so is exact; with the verifier `lud.Unchecked` it is faster and is not.
"""

from ml_collections import ConfigDict

from configs.draft_model import drafting
from research.config import of
from research.decoding.speculative.lud import LUD
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")


def training(steps: int, batch_size: int, peak: float, **fields) -> ConfigDict:
    optimizer = of(adamw, schedule=of(cosine, peak=peak, warmup=steps // 10), weight_decay=0.0)
    return of(
        Stage,
        name="units",
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trainable=("^drafter/",),
        **fields,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return drafting(of(LUD, checked=True, anchors=32), (training(200, 16, 3e-4),))
    drafter = of(LUD, length=8, checked=True, anchors=128)
    return drafting(drafter, (training(2100, 32, 2e-5, accumulate=8),), length=2048, checkpoint_every=300)
