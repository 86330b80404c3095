"""JetMoE: a decoder with experts in its attention and in its FFNs (arXiv 2404.07413).

    python -m experiments.train --config=configs/jetmoe.py --workdir=runs/jetmoe

`tiny` (the default): 4 layers of top-2 of 8 experts, 2.7M parameters of which 1.1M work on a token, on Python's
standard library.
`paper`: JetMoE-8B, 8.5 billion parameters of which 2.3 work on a token, for accelerators: a trillion tokens at a
constant rate after a warm-up, then a quarter as many while it decays. Rate and batch size are ours, and so are the
scale of initial weights and the text: set `data.sources` and `evaluators[0].data.sources`, with a tokenizer of 32 000.
"""

from ml_collections import ConfigDict

from configs.matlm import experiment
from research.config import of
from research.language.decoder import DecoderLM
from research.moe.attention import MixtureOfAttention
from research.moe.layer import MoE
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.optimizers import adamw, muon, wsd
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")


def decoder(
    width: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_dim: int,
    length: int,
    vocab_size: int = 4096,
    num_experts: int = 8,
    k: int = 2,
    **model,
) -> ConfigDict:
    """A decoder of JetMoE layers; both routers of a layer have the same number of experts and the same losses."""
    routing = dict(num_experts=num_experts, k=k, balance="jetmoe", balance_weight=0.01, z_weight=0.001)
    attention = of(
        MixtureOfAttention, num_kv_heads=num_kv_heads, head_dim=head_dim, rotary=of(Rotary), **routing
    )
    mlp = of(MoE, hidden_dim=hidden_dim, output_bias=True, **routing)
    sizes = dict(vocab_size=vocab_size, width=width, max_length=length, num_layers=num_layers)
    return of(DecoderLM, blocks=(of(Block, attention=attention, mlp=mlp),), **sizes, **model)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return experiment(
            of(LanguageModelling, model=decoder(128, 4, 2, 32, 128, length=256)),
            of(
                Stage,
                name="pretrain",
                steps=600,
                batch_size=16,
                optimizer=of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02)),
            ),
            dict(every=200, batches=8),
            checkpoint_every=200,
        )
    # 1.25T tokens in batches of 4M, a fifth of them in the second phase.
    model = decoder(2048, 24, 16, 128, 5632, 4096, vocab_size=32_000, scan_layers=True, remat="full")
    return experiment(
        of(LanguageModelling, model=model, compute_dtype="bfloat16"),
        of(
            Stage,
            name="pretrain",
            steps=298_000,
            batch_size=1024,
            optimizer=of(adamw, schedule=of(wsd, peak=5e-4, warmup=2500, decay=0.2)),
        ),
        dict(every=5000),
        checkpoint_every=5000,
    )
