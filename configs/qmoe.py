"""QMoE: the experts of a switch transformer in less than one bit a weight (arXiv 2310.16795).

    python -m experiments.train --config=configs/qmoe.py --workdir=runs/qmoe
    python -m experiments.compress --workdir=runs/qmoe --method=qmoe --output=runs/qmoe_small

This trains the mixture; the second line compresses it. Less than one bit needs rows of several hundred weights: a row's
largest weights grow with its length, and with them the share of zeros.

`tiny` (the default): 4 experts of 512 units at width 256 in one of two layers; about two minutes on two CPU cores.
`paper`: a decoder with the widths of switch-base-128, for accelerators; the paper compresses encoder-decoders.
"""

from ml_collections import ConfigDict

from configs.matlm import decoder, experiment
from research.config import of
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.mlp import MLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")


def switch(
    width: int,
    hidden: int,
    experts: int,
    heads: dict,
    layers: int,
    length: int,
    vocab_size: int = 4096,
    dense: int | None = None,
) -> ConfigDict:
    """A decoder in which every other layer has `experts` FFNs and takes the best one of a token (top-1, gated by its
    probability); the layers between have an FFN of `dense` units, by default as wide as an expert."""
    attention = of(Attention, rotary=of(Rotary), **heads)
    mixture = of(
        MoE,
        num_experts=experts,
        k=1,
        hidden_dim=hidden,
        activation="relu",
        gated=False,
        norm="softmax_topk",
        balance="switch",
    )
    model = decoder(width, layers, 1, hidden, length, vocab_size)
    plain = of(MLP, hidden_dim=dense or hidden, activation="relu")
    model.blocks = tuple(of(Block, attention=attention, mlp=mlp) for mlp in (plain, mixture))
    return model


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        model = switch(256, 512, 4, dict(num_heads=4, head_dim=32), 2, 128)
        schedule = of(cosine, peak=2e-3, warmup=20, floor=0.1)
        stage = of(Stage, name="pretrain", steps=300, batch_size=16, optimizer=of(adamw, schedule=schedule))
        return experiment(of(LanguageModelling, model=model), stage, dict(batches=8))
    model = switch(768, 3072, 128, dict(num_heads=12, head_dim=64), 12, 512, vocab_size=32_128)
    schedule = of(cosine, peak=1e-3, warmup=10_000, floor=0.1)
    stage = of(Stage, name="pretrain", steps=550_000, batch_size=2048, optimizer=of(adamw, schedule=schedule))
    task = of(LanguageModelling, model=model, compute_dtype="bfloat16")
    return experiment(task, stage, dict(every=1000), mesh=dict(data=-1, expert=8), checkpoint_every=1000)
