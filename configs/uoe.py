"""Union of Experts: slices of MLPs and heads of attention that are routed to (arXiv 2503.02495).

    python -m experiments.train --config=configs/uoe.py:tiny --workdir=runs/uoe
    python -m experiments.train --config=configs/uoe.py:vision --workdir=runs/uoe_vision

`tiny` (the default): 1.3M parameters, 4 of 8 heads and 2 of 4 MLP slices for every token, on Python's standard
library; about two minutes on two CPU cores. Slots for 1.25 times the tokens that even routing needs, taken without
looking ahead.
`vision`: the same in a vision transformer on scikit-learn's digits, slots taken by the largest gates; half a minute.
`paper`: the WikiText-103 model of the released code, for accelerators, with its router that nothing trains. Its
MLP ranks tokens over the sequence, which in a language model shows them what is ahead; here every token chooses and
none is left out. A context of 300 stands in for segments of 150 behind a memory of 150, pre-norm blocks for post-norm
ones, our tokenizer for its 267 735 words: perplexities are not comparable.
"""

from ml_collections import ConfigDict

from configs.matlm import experiment
from configs.matvit import experiment as image_experiment
from research.config import of
from research.language.decoder import DecoderLM
from research.moe.selective_attention import SMHA
from research.moe.union import UoME
from research.nn.masks import Full
from research.nn.norm import LayerNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.optimizers import adamw, constant, cosine, muon, wsd
from research.training.stages import Stage
from research.training.task import Classification, LanguageModelling
from research.vision.vit import ViT

PRESETS = ("tiny", "vision", "paper")


def decoder(
    width: int,
    num_layers: int,
    num_heads: int,
    k_heads: int,
    slices: dict,
    length: int,
    vocab_size: int = 4096,
    tied_head: bool = True,
    block: dict | None = None,
    **both,
) -> ConfigDict:
    """A decoder with k_heads of num_heads and the MLP slices for every token; `both` are fields of SMHA and UoME."""
    heads = of(SMHA, num_heads=num_heads, head_dim=width // num_heads, k=k_heads, rotary=of(Rotary), **both)
    layer = of(Block, attention=heads, mlp=of(UoME, **slices, **both), **(block or {}))
    sizes = dict(vocab_size=vocab_size, width=width, max_length=length, num_layers=num_layers)
    return of(DecoderLM, tied_head=tied_head, blocks=(layer,), **sizes)


def vit(
    width: int, num_layers: int, num_heads: int, k_heads: int, slices: dict, attention: dict, **vit
) -> ConfigDict:
    """A vision transformer with k_heads of num_heads and the MLP slices; `attention` are further fields of SMHA."""
    heads = of(
        SMHA,
        num_heads=num_heads,
        head_dim=width // num_heads,
        k=k_heads,
        rule=of(Full),
        use_bias=True,
        output_bias=True,
        **attention,
    )
    block = of(Block, attention=heads, mlp=of(UoME, **slices), norm=of(LayerNorm))
    return of(ViT, width=width, num_layers=num_layers, blocks=(block,), **vit)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        slices = dict(num_experts=4, k=2, hidden_dim=128)
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02))
        return experiment(
            of(LanguageModelling, model=decoder(128, 4, 8, 4, slices, 256, capacity_factor=1.25)),
            of(Stage, name="pretrain", steps=600, batch_size=16, optimizer=optimizer),
            dict(every=200, batches=8),
            checkpoint_every=200,
        )
    if preset == "vision":
        slots = dict(capacity_factor=1.0)
        slices = dict(num_experts=4, k=2, hidden_dim=64, selection="ranked", **slots)
        model = vit(64, 4, 8, 4, slices, slots, num_classes=10, patch=2)
        optimizer = of(adamw, schedule=of(cosine, peak=2e-3, warmup=30))
        return image_experiment(
            of(Classification, model=model, image_shape=(8, 8, 1)),
            of(Stage, name="train", steps=300, batch_size=128, optimizer=optimizer),
            dict(batch_size=61, every=100),
            source="digits",
            held_out="test",
        )
    # 16 layers of width 400, 5 of 10 heads, 2 of 4 slices of an MLP of 2100 units; Adam 2.5e-4, 60 segments a batch.
    slices = dict(num_experts=4, k=2, hidden_dim=525)
    model = decoder(
        400,
        16,
        10,
        5,
        slices,
        300,
        tied_head=False,
        block=dict(norm=of(LayerNorm), dropout=0.1),
        norm="unit",
    )
    return experiment(
        of(LanguageModelling, model=model),
        of(
            Stage,
            name="train",
            steps=200_000,
            batch_size=60,
            optimizer=of(adamw, schedule=of(constant, peak=2.5e-4), weight_decay=0.0, b2=0.999),
        ),
        dict(every=4000),
        sources="hf:Salesforce/wikitext@wikitext-103-raw-v1",
        checkpoint_every=4000,
    )
