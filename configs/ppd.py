"""PPD: trained prompt embeddings guess ahead, in trees that follow the state of decoding (arXiv 2405.18628).

    python -m experiments.train --config=configs/ppd.py --workdir=runs/ppd

`tiny` (the default): three prompts, 768 numbers in all, for the base model that ships, and trees of up to 24 rows.
Its training has not been timed in full; what a shorter one gave is in docs/results/ppd.
`paper`: three prompts, each text cut off at one random place. The target, `task.target`, is a run or a model
directory of yours; measure its accuracies with `trees.calibrate` and step times, and let `ppd.choose_size` find
the trees.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs.draft_model import drafting
from configs.medusa import published_accuracy
from research.config import of
from research.decoding.speculative.ppd import PPD, search_trees
from research.decoding.speculative.virtual import Chains
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")

# How often the guess of each rank is right: assumed, not measured, and only the shape of the trees depends on it.
# `trees.calibrate` measures it for trained prompts.
TINY = (
    (0.16, 0.06, 0.04, 0.03, 0.03, 0.02),
    (0.12, 0.05, 0.04, 0.03, 0.02, 0.02),
    (0.10, 0.05, 0.03, 0.03, 0.02, 0.02),
)


def ppd(accuracy: Sequence[Sequence[float]], size: int, **fields) -> ConfigDict:
    """The drafter with the best trees of up to `size` rows for these accuracies."""
    trees = search_trees(accuracy, size).trees
    return of(PPD, trees=tuple(of(Chains, paths=tree.paths, counts=tree.counts) for tree in trees), **fields)


def training(steps: int, batch_size: int, **fields) -> ConfigDict:
    """The paper's optimizer: from 1e-2 down to nothing, no warm-up, no weight decay."""
    optimizer = of(adamw, schedule=of(cosine, peak=1e-2), weight_decay=0.0)
    return of(
        Stage,
        name="prompts",
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trainable=("^drafter/",),
        **fields,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return drafting(ppd(TINY, 24, anchors=32), (training(200, 16),))
    # One epoch of 68k conversations. The trees, of 60 rows, are for the accuracies of Medusa's heads.
    stage = training(2100, 32, accumulate=4)
    return drafting(ppd(published_accuracy()[:3], 60, anchors=1), (stage,), length=2048, checkpoint_every=300)
