"""SCMoE: a mixture of experts that decodes by contrasting its routing with a worse one (arXiv 2405.14507).

    python -m experiments.train --config=configs/scmoe.py --workdir=runs/scmoe
    python -m experiments.generate --workdir=runs/scmoe --contrast=2 --prompt='If we add 17 and 25 we get '

The method needs no training of its own; this trains the mixture that it decodes.

`tiny` (the default): top-2 of 8 experts, 2.4M parameters, on generated arithmetic in sentences and Python's standard
library, three to one.
`paper`: Mixtral 8x7B, which the paper decodes with a rank-2 weak pass; for accelerators.
"""

from functools import partial

from ml_collections import ConfigDict

from configs import smoe
from configs.matlm import decoder, experiment
from research.config import of
from research.moe.layer import MoE
from research.training.optimizers import muon, wsd
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")

SOURCES = (("arithmetic", 3.0), ("builtin", 1.0))


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        return smoe.get_config("paper")
    experts = partial(of, MoE, num_experts=8, k=2)
    optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02))
    return experiment(
        of(LanguageModelling, model=decoder(128, 4, 4, 128, 128, mlp=experts)),
        of(Stage, name="pretrain", steps=1200, batch_size=16, optimizer=optimizer),
        dict(every=300, batches=8),
        sources=SOURCES,
        checkpoint_every=300,
    )
