"""SpecDec++: a draft model that stops when a rejection has become likely (arXiv 2405.19715).

    python -m experiments.train --config=configs/specdec_pp.py:tiny --workdir=runs/specdec_pp

`tiny` (the default): the draft of configs/draft_model.py for the base model that ships, then its acceptance head; a
few minutes on two CPU cores.
`paper`: a 7B draft, a head of 3 blocks, 2 to 20 tokens, h = 0.7; three epochs of 40 000 rows in batches of 32. In the
paper the draft, Llama 2 chat, is trained already: its stage is ours.
"""

from ml_collections import ConfigDict

from configs.draft_model import distilling, drafting, small_draft
from configs.matlm import decoder
from research.config import of
from research.decoding.speculative.specdec_pp import SpecDecPP
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")
DRAFT = dict(trainable=("^drafter/draft/",), loss_weights={"kl": 1.0})


def heading(steps: int, peak: float, warmup: int, batch_size: int) -> ConfigDict:
    """The stage of the head."""
    optimizer = of(adamw, schedule=of(cosine, peak=peak, warmup=warmup))
    trainable = ("^drafter/head/",)
    return of(
        Stage, name="head", steps=steps, batch_size=batch_size, optimizer=optimizer, trainable=trainable
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        drafter = of(SpecDecPP, model=small_draft(), threshold=0.7, longest=8, blocks=1)
        return drafting(drafter, (distilling(300, **DRAFT), heading(150, 3e-3, 10, 16)))
    draft = decoder(4096, 32, 32, 11_008, 4096)
    optimizer = of(adamw, schedule=of(cosine, peak=3e-4, warmup=2000, floor=0.1))
    first = of(Stage, name="draft", steps=500_000, batch_size=1024, optimizer=optimizer, **DRAFT)
    drafter = of(SpecDecPP, model=draft, threshold=0.7)
    return drafting(drafter, (first, heading(3750, 5e-5, 112, 32)), length=4096, checkpoint_every=1000)
