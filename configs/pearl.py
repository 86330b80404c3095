"""PEARL: the draft model writes while the target verifies (arXiv 2408.11850). It is free of training; this trains
the draft that it runs.

    python -m experiments.train --config=configs/pearl.py:tiny --workdir=runs/pearl

`tiny` (the default): the draft of configs/draft_model.py, for the base model that ships. The virtual clock of two
devices is in the claim, `python -m experiments.claims pearl`; `research.decoding.speculative.pearl.concurrent` runs
both models at once where there are two devices.
`paper`: a 7B draft (Llama 2) and gamma = 5, the pair 7B and 70B of the paper.
"""

from ml_collections import ConfigDict

from configs.draft_model import distilling, drafting, small_draft
from configs.matlm import decoder
from research.config import of
from research.decoding.speculative.pearl import Pearl
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return drafting(of(Pearl, model=small_draft(), gamma=4), (distilling(300),))
    draft = decoder(4096, 32, 32, 11_008, 4096)
    optimizer = of(adamw, schedule=of(cosine, peak=3e-4, warmup=2000, floor=0.1))
    stage = of(
        Stage, name="draft", steps=500_000, batch_size=1024, optimizer=optimizer, trainable=("^drafter/",)
    )
    return drafting(of(Pearl, model=draft, gamma=5), (stage,), length=4096, checkpoint_every=1000)
