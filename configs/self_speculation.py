"""Self-speculation: MatFormer's S drafts for the XL that it is a part of (arXiv 2310.07707, section 4.1.1).

    python -m experiments.train --config=configs/self_speculation.py:tiny --workdir=runs/self_speculation

S needs no training of its own: `Submodel(divisor=8).create(key, Target(params, model))` cuts it out of a nested
target, with whose arrays it shares all but the FFN slices. This fine-tunes a copy of S to have XL's distributions.
`tiny` (the default): S of the base model that ships, a few minutes on two CPU cores. The log shows `acceptance`, the
chance that a drawn token is kept, and `agreement`, that of a greedy one.
`paper`: the batch of the MatLM experiment (configs/matlm.py:paper) and a tenth of its rate, which are our choice.
"""

from ml_collections import ConfigDict

from configs.draft_model import drafting
from research.config import of
from research.decoding.speculative.draft_model import Submodel
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")


def tuning(steps: int, peak: float, batch_size: int, warmup: int) -> ConfigDict:
    optimizer = of(adamw, schedule=of(cosine, peak=peak, warmup=warmup, floor=0.1), weight_decay=0.01)
    trainable = ("^drafter/",)
    return of(
        Stage, name="tune", steps=steps, batch_size=batch_size, optimizer=optimizer, trainable=trainable
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    drafter = of(Submodel, divisor=8, gamma=4)
    if preset == "tiny":
        return drafting(drafter, (tuning(100, 3e-4, 16, 10),))
    return drafting(drafter, (tuning(5000, 1e-4, 128, 500),), length=512, checkpoint_every=1000)
