"""Generalized aggressive decoding: a drafter that fills a block of masks at once (arXiv 2205.10350).

    python -m experiments.train --config=configs/gad.py --workdir=runs/gad
    python -m experiments.generate --drafter=runs/gad --prompt='retrun self.valeu'

The drafter has the target's encoder, from which it starts, and a decoder that sees in both directions. It learns
from what the target itself writes.

`tiny` (the default): blocks of 8 for the corrector that ships, a few minutes on two CPU cores. A quarter of its
updates, and half the lines in each, gave 2.7 bytes a call on lines with 5 % errors and 1.7 at 25 %.
`paper`: six decoder layers and blocks of 25 tokens, and the paper's 300k updates of 128k tokens, in which every batch
is written by the target first. The target, `task.target`, is a run or a model directory of yours; give the
drafter, `task.drafter.model`, its encoder's sizes.
"""

from ml_collections import ConfigDict

from configs.iad import BYTES, correcting
from research.config import of
from research.decoding.speculative.gad import GAD
from research.decoding.speculative.training import DrafterTraining
from research.nn.masks import Full
from research.training.model_directory import read_config
from research.training.optimizers import adamw, linear, muon, wsd
from research.training.stages import Stage
from research.training.workdir import PACKAGE

PRESETS = ("tiny", "paper")
TARGET = "package:language/corrector"


def network(num_layers: int, dropout: float = 0.0) -> ConfigDict:
    """The target's encoder, a decoder of `num_layers` that is not causal, and one token more, the mask."""
    model = read_config(PACKAGE / "language/corrector/config.json")
    model.vocab_size, model.num_layers = model.vocab_size + 1, num_layers
    for block in (*model.blocks, *model.encoder.blocks):
        block.dropout = dropout
    for block in model.blocks:
        block.attention.rule = of(Full)
    return model


def drafting(
    drafter: ConfigDict, optimizer: ConfigDict, steps: int, batch_size: int, **trainer
) -> ConfigDict:
    stage = of(
        Stage,
        name="drafter",
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trainable=("^drafter/",),
    )
    task = of(DrafterTraining, drafter=drafter, target=TARGET)
    return correcting(task, stage, 64, BYTES, **trainer)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        steps, batch_size = 400, 32
        drafter = of(GAD, model=network(2), block=8, records=steps * batch_size)
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=20, decay=0.4, floor=0.02))
        return drafting(drafter, optimizer, steps, batch_size)
    steps, batch_size = 300_000, 2048
    drafter = of(GAD, model=network(6, dropout=0.1), block=25, records=steps * batch_size)
    optimizer = of(adamw, schedule=of(linear, peak=5e-4, warmup=10_000), b2=0.999, weight_decay=0.01)
    return drafting(drafter, optimizer, steps, batch_size, clip=5.0)
