"""EAGLE: one decoder layer extrapolates the target's hidden states (arXiv 2401.15077, 2406.16858).

    python -m experiments.train --config=configs/eagle.py:tiny --workdir=runs/eagle

`tiny` (the default): a drafter for the base model that ships, with EAGLE-2's tree of 16 nodes. Its training has not
been timed in full; what a shorter one gave is in docs/results/eagle.
`paper`: the tree of 60 nodes and the training of the authors' code, 20 epochs of 68k conversations. The target,
`task.target`, is a run or a model directory of yours. Gradients are clipped by their norm, the code's by value.
"""

from ml_collections import ConfigDict

from configs.draft_model import drafting
from research.config import of
from research.decoding.speculative.eagle import ConfidenceTree, Eagle
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        optimizer = of(adamw, schedule=of(cosine, peak=2e-3, warmup=20, floor=0.05))
        stage = of(
            Stage,
            name="drafter",
            steps=300,
            batch_size=16,
            optimizer=optimizer,
            trainable=("^drafter/",),
        )
        return drafting(of(Eagle, tree=of(ConfidenceTree, depth=4, width=4, budget=15)), (stage,))
    optimizer = of(adamw, schedule=of(cosine, peak=3e-5, warmup=2000), weight_decay=0.0)
    stage = of(
        Stage, name="drafter", steps=340_000, batch_size=4, optimizer=optimizer, trainable=("^drafter/",)
    )
    tree = of(ConfidenceTree, depth=6, width=10, budget=59)
    return drafting(of(Eagle, tree=tree), (stage,), length=2048, checkpoint_every=1000)
