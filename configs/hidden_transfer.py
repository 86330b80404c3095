"""Hidden Transfer: linear maps in the middle of the model make states of future tokens (arXiv 2404.12022).

    python -m experiments.train --config=configs/hidden_transfer.py --workdir=runs/hidden_transfer

`tiny` (the default): three maps after layer 4 of the 6 of the base model that ships. Its training has not been
timed in full; what a shorter one gave is in docs/results/hidden_transfer.
`paper`: three maps, trained everywhere at once; the paper's layers and rates are not published in detail. The
target, `task.target`, is a run or a model directory of yours: set `task.drafter.layers` to about two thirds of its.
"""

from ml_collections import ConfigDict

from configs.draft_model import drafting
from research.config import of
from research.decoding.speculative.hidden_transfer import HiddenTransfer
from research.decoding.speculative.trees import build_static_tree
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")

# How often the guess of each rank is right: assumed, not measured, and only the shape of the tree depends on it.
# `trees.calibrate` measures it for trained maps.
TINY = (
    (0.30, 0.09, 0.05, 0.03),
    (0.18, 0.06, 0.04, 0.03),
    (0.13, 0.05, 0.03, 0.03),
)
LAYERS = (4, 4, 4)


def training(steps: int, batch_size: int, **fields) -> ConfigDict:
    optimizer = of(adamw, schedule=of(cosine, peak=1e-3, warmup=steps // 10), weight_decay=0.0)
    return of(
        Stage,
        name="maps",
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trainable=("^drafter/",),
        **fields,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        drafter = of(HiddenTransfer, layers=LAYERS, paths=build_static_tree(TINY, 7), anchors=32)
        return drafting(drafter, (training(200, 16),))
    drafter = of(HiddenTransfer, layers=LAYERS, paths=build_static_tree(TINY, 30))
    return drafting(drafter, (training(2100, 32, accumulate=32),), length=2048, checkpoint_every=300)
