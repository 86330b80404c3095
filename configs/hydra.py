"""Hydra: draft heads that read the tokens chosen before theirs (arXiv 2402.05109).

    python -m experiments.train --config=configs/hydra.py --workdir=runs/hydra

`tiny` (the default): Hydra, three heads for the base model that ships and a tree of 31 nodes. Its training has not
been timed in full; what a shorter one gave is in docs/results/hydra.
`plus`: Hydra++ in the same steps, with two layers a head, the prefix layer, and the target as teacher.
`paper`: Hydra++ as published, four heads of four layers and 63 nodes. The target, `task.target`, is a run or a model
directory of yours.
"""

from ml_collections import ConfigDict

from configs.draft_model import drafting
from research.config import of
from research.decoding.speculative.hydra import Hydra
from research.decoding.speculative.trees import RankTree, build_static_tree
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "plus", "paper")

# How often the guess of each rank may be right: an assumption, as in configs/medusa.py.
TINY = (
    (0.42, 0.10, 0.05, 0.03, 0.02, 0.02),
    (0.40, 0.10, 0.05, 0.03, 0.02, 0.02),
    (0.38, 0.10, 0.05, 0.03, 0.02, 0.02),
)
# Such heads gain 3.7 tokens a call with 63 nodes, as Hydra++ does for Vicuna 7B: every head is right 61 times in a
# hundred, its guess of each further rank three tenths as often.
PAPER = (tuple(0.61 * 0.3**rank for rank in range(10)),) * 4


def hydra(accuracy: tuple[tuple[float, ...], ...], budget: int, **fields) -> ConfigDict:
    return of(Hydra, tree=of(RankTree, paths=build_static_tree(accuracy, budget)), **fields)


def stage(steps: int, batch_size: int, weight_decay: float = 0.0, **schedule) -> ConfigDict:
    optimizer = of(adamw, schedule=of(cosine, **schedule), weight_decay=weight_decay)
    return of(
        Stage,
        name="heads",
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trainable=("^drafter/",),
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    tiny = stage(200, 16, peak=1e-3, warmup=20, floor=0.33)
    if preset == "tiny":
        return drafting(hydra(TINY, 31, num_heads=3), (tiny,))
    plus = dict(prefix_layer=True, teacher="target")
    if preset == "plus":
        return drafting(hydra(TINY, 31, num_heads=3, num_layers=2, **plus), (tiny,))
    # Ten epochs of ShareGPT, 68k conversations less the held-out 5 %.
    published = stage(20_000, 32, 0.1, peak=5e-4, warmup=100, floor=0.33)
    drafter = hydra(PAPER, 63, num_layers=4, dropout=0.2, **plus)
    return drafting(drafter, (published,), length=2048, checkpoint_every=1000)
