r"""Hecate: a mixture of experts whose experts are placed anew every step, FSSDP (arXiv 2502.02581).

    python -m experiments.train --config=configs/hecate.py --workdir=runs/hecate
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.train --config=configs/hecate.py \
        --config.mesh.expert=8 --workdir=runs/placed
    python -m experiments.train --config=configs/hecate.py:jetmoe.paper --config.task.placement=expert_parallel \
        --config.mesh.fsdp=4 --config.mesh.expert=8 --workdir=runs/jetmoe

`tiny` (the default): top-2 of 16 experts, 3.9M parameters, on Python's standard library. On one device nothing is
placed; the second command divides the experts over eight simulated devices.
`paper`: the smallest model of the paper, 12 layers of 64 experts, on 4 nodes of 8 devices. It measures steps and says
neither data nor optimizer: those, and the length of training, are ours.
`CONFIG.PRESET`: that preset of any other config whose FFNs are `MoE`, with placed experts.

What it is and what a run reports: docs/moe_placement.md.
"""

import importlib
from functools import partial

from ml_collections import ConfigDict

from configs.matlm import decoder, experiment
from research.config import of
from research.moe.layer import MoE
from research.moe.placement.hecate import FSSDP
from research.moe.placement.task import ExpertPlacement
from research.training.optimizers import adamw, cosine, muon, wsd
from research.training.stages import Stage
from research.training.task import LanguageModelling

MIXTURES = ("smoe", "jetmoe", "momentum_smoe", "scmoe")
PRESETS = ("tiny", "paper", *(f"{name}.{preset}" for name in MIXTURES for preset in ("tiny", "paper")))


def placed(config: ConfigDict, placement: ConfigDict | str = "fssdp", **fields) -> ConfigDict:
    """An experiment with a mixture of experts, its experts placed: `fields` are those of `ExpertPlacement`."""
    copy = ConfigDict({**config})
    copy.task = of(ExpertPlacement, task=config.task, placement=placement, **fields)
    return copy


def get_config(preset: str = "tiny") -> ConfigDict:
    if "." in preset:
        name, inner = preset.split(".")
        return placed(importlib.import_module(f"configs.{name}").get_config(inner))
    if preset == "tiny":
        experts = partial(of, MoE, num_experts=16, k=2, gated=False, activation="gelu", balance_weight=0.01)
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02))
        model = decoder(128, 4, 4, 192, 256, mlp=experts)
        return placed(
            experiment(
                of(LanguageModelling, model=model),
                of(Stage, name="pretrain", steps=600, batch_size=16, optimizer=optimizer),
                dict(every=200, batches=8),
                checkpoint_every=200,
            ),
            of(FSSDP, overlap=8, memory=4, reshard_every=50),
        )
    # GShard's top-2 gate, experts twice as wide as the model; w = 5 steps, new homes every 100.
    experts = partial(
        of,
        MoE,
        num_experts=64,
        k=2,
        gated=False,
        activation="gelu",
        norm="softmax_topk_renorm",
        balance="gshard",
        balance_weight=0.01,
    )
    model = decoder(768, 12, 12, 1536, 1024, vocab_size=32000, mlp=experts)
    optimizer = of(adamw, schedule=of(cosine, peak=6e-4, warmup=2000, floor=0.1), weight_decay=0.1)
    return placed(
        experiment(
            of(LanguageModelling, model=model, compute_dtype="bfloat16"),
            of(Stage, name="pretrain", steps=100_000, batch_size=256, optimizer=optimizer),
            dict(every=1000),
            mesh=dict(fsdp=4, expert=8),
            checkpoint_every=1000,
        ),
        of(FSSDP, overlap=16, memory=8, pair_limit=1, window=5, reshard_every=100, calibration=2),
        capacity=2.0,
    )
