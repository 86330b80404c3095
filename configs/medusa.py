"""Medusa: heads that guess ahead, a tree of their guesses checked in one call (arXiv 2401.10774).

    python -m experiments.train --config=configs/medusa.py --workdir=runs/medusa

`tiny` (the default): Medusa-1, three heads on the frozen base model that ships and a tree of 31 nodes. Its training
has not been timed in full; what a shorter one gave is in docs/results/medusa.
`tuned`: Medusa-2 in the same steps, half of them with low-rank branches in the target, which keeps to what it said
before.
`paper`: Medusa-2 as published, both stages, five heads and 63 nodes. The target, `task.target`, is a run or a model
directory of yours, and the data the target's own answers.
"""

from ml_collections import ConfigDict

from configs.draft_model import drafting
from research.config import of
from research.decoding.speculative.medusa import Medusa, Medusa2
from research.decoding.speculative.trees import RankTree, build_static_tree
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "tuned", "paper")

# How often the guess of each rank of small heads may be right: an assumption to begin with. `experiments.drafter`
# with --nodes measures it for the heads that were trained, and writes them with the tree that fits.
TINY = (
    (0.36, 0.09, 0.05, 0.03, 0.02, 0.02),
    (0.22, 0.06, 0.04, 0.03, 0.02, 0.02),
    (0.16, 0.05, 0.03, 0.03, 0.02, 0.02),
)
# The training log of the authors' heads for Vicuna 7B, by head: first guess right, one of the first five right.
PUBLISHED = ((0.56, 0.78), (0.32, 0.56), (0.20, 0.42), (0.15, 0.34), (0.12, 0.30))


def tree(accuracy: tuple[tuple[float, ...], ...], budget: int) -> ConfigDict:
    return of(RankTree, paths=build_static_tree(accuracy, budget))


def published_accuracy() -> tuple[tuple[float, ...], ...]:
    """Ten ranks a head: each from the second on half as often right as the one before, so that the second to the
    fifth add up to what was published."""
    return tuple((top, *((five - top) * 8 / 15 / 2**rank for rank in range(9))) for top, five in PUBLISHED)


def stage(
    name: str,
    steps: int,
    peak: float,
    warmup: int,
    batch_size: int = 16,
    trainable: tuple[str, ...] = ("^drafter/",),
    rates: tuple[tuple[str, float], ...] = (),
    **fields,
) -> ConfigDict:
    schedule = of(cosine, peak=peak, warmup=warmup)
    optimizer = of(adamw, schedule=schedule, weight_decay=0.0, rates=rates)
    return of(
        Stage,
        name=name,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trainable=trainable,
        **fields,
    )


def both_stages(steps: int, peak: float, tuned_peak: float, warmup: int, **fields) -> tuple[ConfigDict, ...]:
    """Medusa-2's: the heads alone, then all at a lower rate, the heads at four times it."""
    heads = ("^drafter/head_",)
    return (
        stage("heads", steps, peak, warmup, trainable=heads, loss_weights={"heads": 1.0}, **fields),
        stage("tuned", steps, tuned_peak, warmup, rates=((heads[0], 4.0),), **fields),
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return drafting(of(Medusa, tree=tree(TINY, 31), num_heads=3), (stage("heads", 200, 1e-3, 20),))
    if preset == "tuned":
        drafter = of(Medusa2, tree=tree(TINY, 31), num_heads=3, reference="self", rank=8, alpha=8.0)
        return drafting(drafter, both_stages(100, 1e-3, 5e-4, 20))
    # 68k conversations, two epochs a stage in batches of 8 x 4. Rate 1e-4 for self-distillation.
    drafter = of(Medusa2, tree=tree(published_accuracy(), 63), reference="self")
    stages = both_stages(4200, 1e-3, 1e-4, 420, batch_size=32, accumulate=4)
    return drafting(drafter, stages, length=2048, checkpoint_every=500)
