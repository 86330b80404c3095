"""Clover: a recurrent speculator with an augmenting block and a small dynamic tree (arXiv 2405.00263).

    python -m experiments.train --config=configs/clover.py:tiny --workdir=runs/clover

`tiny` (the default): a drafter of three guesses and 4 candidates for the base model that ships. Its training has not
been timed in full; what a shorter one gave is in docs/results/clover.
`paper`: the training of the authors' code: five guesses, two layers, 20 epochs of 68k conversations, and 20
candidates; the paper's setting of large batches is `budget=4`. The target, `task.target`, is a run or a model
directory of yours, `num_heads` that of its attention. Gradients are clipped by their norm, the code's by value.
"""

from ml_collections import ConfigDict

from configs.draft_model import drafting
from research.config import of
from research.decoding.speculative.clover import Clover
from research.training.optimizers import adamw, linear
from research.training.stages import Stage

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        drafter, steps, batch_size, length = of(Clover, depth=3, budget=4, layers=1), 300, 16, 128
        schedule = of(linear, peak=1e-3, warmup=20)
    else:
        drafter, steps, batch_size, length = of(Clover, budget=20, num_heads=32), 340_000, 4, 2048
        schedule = of(linear, peak=1e-3, warmup=8000)
    stage = of(
        Stage,
        name="drafter",
        steps=steps,
        batch_size=batch_size,
        optimizer=of(adamw, schedule=schedule, weight_decay=0.01),
        trainable=("^drafter/",),
    )
    return drafting(drafter, (stage,), length=length, checkpoint_every=1000)
