"""LQ-LoRA: rounded and low-rank parts of every kernel, bits by an integer program (arXiv 2311.12023).

    python -m experiments.train --config=configs/lq_lora.py --workdir=runs/lq_lora

`tiny` (the default): the base model that ships in 2.75 bits a weight on average, Fisher of its own training text, then
rank-8 factors learn to add and subtract in sentences. The decomposition comes first, a minute or so.
`paper`: rank 64, all 432 configurations, the C4 setting's optimizer; `task.base` is a run or model directory of yours.
"""

from ml_collections import ConfigDict

from configs.lora import stage, text, tuning
from research.adapters.lq_lora import LQLoRA
from research.config import of
from research.nn.normal_float import BlockNormal
from research.training.optimizers import adamw, cosine

PRESETS = ("tiny", "paper")

FEW = tuple(of(BlockNormal, bits=bits, group=32, block=32) for bits in (2, 3, 4))


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        fisher = text("builtin", length=128)
        adapter = of(LQLoRA, rank=8, budget=2.75, candidates=FEW, steps=3, fisher=fisher, samples=32)
        return tuning(adapter, (stage(200, 1e-3),))
    fisher = text("builtin", length=1024)
    adapter = of(LQLoRA, rank=64, alpha=16.0, budget=2.75, fisher=fisher, samples=10_000)
    optimizer = of(adamw, schedule=of(cosine, peak=2e-5, warmup=30), weight_decay=0.0)
    return tuning(
        adapter, (stage(1000, 2e-5, batch_size=128, optimizer=optimizer),), sources="builtin", length=1024
    )
