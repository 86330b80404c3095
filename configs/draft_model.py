"""Speculative decoding with a draft model (arXiv 2211.17192), distilled from the target.

    python -m experiments.train --config=configs/draft_model.py:tiny --workdir=runs/draft_model

`tiny` (the default): a draft of 0.4M parameters for the base model that ships, a few minutes on two CPU cores. The log
shows `acceptance`, the chance that a drawn token is kept, and `agreement`, that of a greedy one.
`paper`: a draft of T5-small's size and gamma = 7, the paper's choice for translation at temperature 0. The target,
`task.target`, is a run or a model directory of yours, with the vocabulary of the draft.
"""

from ml_collections import ConfigDict

from configs.matlm import decoder
from research.config import of
from research.data.text import TokenDataset
from research.decoding.speculative.draft_model import DraftModel
from research.decoding.speculative.training import DrafterTraining
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine, muon, wsd
from research.training.stages import Stage

PRESETS = ("tiny", "paper")
TARGET = "package:language/base"


def small_draft() -> ConfigDict:
    """One seventeenth of the base model's parameters, with its vocabulary and context."""
    return decoder(width=64, num_layers=2, num_heads=2, hidden_dim=192, length=512)


def drafting(drafter: ConfigDict, stages: tuple[ConfigDict, ...], length: int = 128, **trainer) -> ConfigDict:
    """The training of a drafter for the base model on its corpus."""
    held_out = of(TokenDataset, split="validation", length=length, shuffle=False)
    return of(
        Trainer,
        task=of(DrafterTraining, drafter=drafter, target=TARGET),
        data=of(TokenDataset, split="train", length=length),
        stages=stages,
        evaluators=(of(Evaluate, name="validation", data=held_out, batch_size=16, batches=8),),
        **trainer,
    )


def distilling(steps: int, **stage) -> ConfigDict:
    """A stage of a small draft from scratch; Muon, as for the base model."""
    optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=20, decay=0.4, floor=0.02))
    stage = {"name": "draft", "trainable": ("^drafter/",)} | stage
    return of(Stage, steps=steps, batch_size=16, optimizer=optimizer, **stage)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return drafting(of(DraftModel, model=small_draft(), gamma=4), (distilling(300),))
    # T5-small: width 512, 6 layers of 8 heads, FFN 2048.
    draft = decoder(512, 6, 8, 2048, 512)
    optimizer = of(adamw, schedule=of(cosine, peak=1e-3, warmup=1000, floor=0.1))
    stage = of(
        Stage, name="draft", steps=100_000, batch_size=128, optimizer=optimizer, trainable=("^drafter/",)
    )
    return drafting(of(DraftModel, model=draft, gamma=7), (stage,), length=512, checkpoint_every=1000)
