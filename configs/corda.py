"""CorDA: adapters of the components that a context's inputs choose (arXiv 2406.05223).

    python -m experiments.train --config=configs/corda.py --workdir=runs/kpa
    python -m experiments.train --config=configs/corda.py:instruction --workdir=runs/ipa

`tiny` (the default): knowledge-preserved, rank 8: the components that matter least to the base model's own text
learn to add and subtract in sentences; `before` in the log is what is kept.
`instruction`: instruction-previewed: those that matter most to the sums.
`paper`: rank 128, 256 samples, its optimizer; `task.base` and the contexts are yours.
"""

from ml_collections import ConfigDict

from configs.lora import stage, text, tuning
from research.adapters.corda import CorDA
from research.config import of

PRESETS = ("tiny", "instruction", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        adapter = of(CorDA, rank=128, context=text("builtin", length=512), samples=256)
        return tuning(adapter, (stage(800, 2e-5, batch_size=128, warmup=24),), length=512)
    if preset == "instruction":
        return tuning(of(CorDA, rank=8, mode="instruction", context=text(), samples=32), (stage(200, 1e-3),))
    return tuning(of(CorDA, rank=8, context=text("builtin"), samples=32), (stage(200, 1e-3),))
