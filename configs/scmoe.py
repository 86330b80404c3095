"""SCMoE: a mixture of experts that decodes by contrasting its routing with a worse one (arXiv 2405.14507).

    python -m experiments.train --config=configs/scmoe.py --workdir=runs/scmoe
    python -m experiments.generate --workdir=runs/scmoe --contrast=2 --prompt='If we add 17 and 25 we get '

The method needs no training of its own; this trains the mixture that it decodes.

`tiny` (the default): top-2 of 8 experts, 2.2M parameters, on generated arithmetic in sentences and Python's standard
library, three to one.
`paper`: the architecture of Mixtral 8x7B, which the paper decodes with a rank-2 weak pass, for accelerators.
"""

from ml_collections import ConfigDict

from configs.matlm import experiment
from research.config import of
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.optimizers import adamw, cosine, muon, wsd
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")

SOURCES = (("arithmetic", 3.0), ("builtin", 1.0))


def mixture(
    width: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    length: int,
    *,
    vocab_size: int,
    attention: dict,
) -> ConfigDict:
    heads = of(Attention, num_heads=num_heads, head_dim=width // num_heads, **attention)
    experts = of(MoE, num_experts=8, k=2, hidden_dim=hidden_dim)
    return of(
        DecoderLM,
        vocab_size=vocab_size,
        width=width,
        max_length=length,
        num_layers=num_layers,
        blocks=(of(Block, attention=heads, mlp=experts),),
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        model = mixture(128, 4, 4, 128, 128, vocab_size=4096, attention=dict(rotary=of(Rotary)))
        schedule = of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02)
        return experiment(
            of(LanguageModelling, model=model),
            of(Stage, name="pretrain", steps=1200, batch_size=16, optimizer=of(muon, schedule=schedule)),
            dict(every=300, batches=8),
            sources=SOURCES,
            checkpoint_every=300,
        )
    attention = dict(num_kv_heads=8, rotary=of(Rotary, base=1e6))
    model = mixture(4096, 32, 32, 14336, 32768, vocab_size=32000, attention=attention)
    return experiment(
        of(LanguageModelling, model=model, compute_dtype="bfloat16"),
        of(
            Stage,
            name="pretrain",
            steps=100_000,
            batch_size=128,
            optimizer=of(adamw, schedule=of(cosine, peak=3e-4, warmup=2000, floor=0.1), weight_decay=0.1),
        ),
        dict(every=1000),
        checkpoint_every=1000,
    )
