"""LLaVA-MoLE's sparse mixture of LoRA experts on the MLPs of a decoder, language side (arXiv 2401.16160).

    python -m experiments.train --config=configs/mole.py --workdir=runs/mole

`tiny` (the default): three experts of rank 4 on the base model that ships, which learns sums and its own text at once.
`paper`: three experts of rank 32, alpha 64, dropout 0.05 and balance weight 0.01, as released; `task.base` and the
domains are yours.
"""

from ml_collections import ConfigDict

from configs.lora import stage, tuning
from research.adapters.mole import MoLE
from research.config import of

PRESETS = ("tiny", "paper")


BOTH = (("arithmetic", 0.5), ("builtin", 0.5))


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return tuning(of(MoLE, rank=4, alpha=8.0, dropout=0.0), (stage(200, 2e-3),), mixed=BOTH)
    return tuning(of(MoLE), (stage(3000, 2e-4, batch_size=128, warmup=90),), length=512, mixed=BOTH)
