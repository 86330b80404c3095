"""MomentumSMoE: momentum from MoE layer to MoE layer (arXiv 2410.14574).

    python -m experiments.train --config=configs/momentum_smoe.py --workdir=runs/momentum_smoe
    python -m experiments.train --config=configs/momentum_smoe.py:robust --workdir=runs/robust

`tiny` (the default): heavy-ball momentum through 6 layers of top-2 of 8 experts, 1.1M parameters, on Python's standard
library, evaluated on clean text and on text with 5 % of its words replaced; about two minutes on two CPU cores.
`robust`, `adam`: the same with robust momentum, and with an Adam step in the first layer.
`glam`: MoE layers and dense ones in turn, as in GLaM; dense layers pass the momentum on.
`vision`: V-MoE, a vision transformer with experts in every other layer, on scikit-learn's digits, evaluated on clean
images and under each corruption; half a minute.
`paper`: SMoE-medium on WikiText-103 with the post-norm layers of the released code, for accelerators. Its released
script asks for a balance loss that the code never switches on, so there is none here either. Rotary embedding stands in
for its relative positions and our tokenizer for its 267 735 words: perplexities are not comparable.
"""

from ml_collections import ConfigDict

from configs.matlm import experiment
from configs.matvit import experiment as image_experiment
from research.config import of
from research.data.corruptions import CORRUPTIONS, CorruptedImages
from research.data.token_swap import TokenSwap
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.moe.momentum import Adam, HeavyBall, MomentumBlock, robust_momentum
from research.nn.attention import Attention
from research.nn.masks import Full, Window
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.optimizers import adamw, constant, muon, wsd
from research.training.stages import Stage
from research.training.task import Classification, LanguageModelling
from research.vision.vit import ViT

PRESETS = ("tiny", "robust", "adam", "glam", "vision", "paper")

HEAVY_BALL = of(HeavyBall, mu=0.7)
# At the fast end rho = 1 - 1 / sqrt(kappa); these give mu 0.70, gamma 0.99 and a look-ahead alpha of 0.37.
ROBUST = of(robust_momentum, kappa=75.0, smoothness=1.9)
# The first of these cells stands in layer 0. With a step size of 1 it would add 3.16 sign(u) to states of size 0.02.
ADAM = (of(Adam, gamma=0.1, epsilon=1e-4, mu=0.7), HEAVY_BALL)


def blocks(cells: tuple[ConfigDict, ...], num_layers: int, **block) -> tuple[ConfigDict, ...]:
    """The pattern of a stack whose layers have the given cells; the last cell is that of all further layers."""
    if len(cells) > 1:
        cells = (*cells, *(cells[-1],) * (num_layers - len(cells)))
    return tuple(of(MomentumBlock, momentum=cell, **block) for cell in cells)


def decoder(
    cells: tuple[ConfigDict, ...],
    width: int,
    num_layers: int,
    num_heads: int,
    experts: ConfigDict,
    length: int,
    vocab_size: int = 4096,
    dense: ConfigDict | None = None,
    attention: dict | None = None,
    tied_head: bool = True,
    **block,
) -> ConfigDict:
    """A decoder with the given cells around its experts; with a `dense` FFN in every other layer where there is one."""
    heads = of(
        Attention, num_heads=num_heads, head_dim=width // num_heads, rotary=of(Rotary), **(attention or {})
    )
    pattern = blocks(cells, num_layers, attention=heads, mlp=experts, **block)
    if dense is not None:
        pattern = (*pattern, of(Block, attention=heads, mlp=dense, **block))
    sizes = dict(vocab_size=vocab_size, width=width, max_length=length, num_layers=num_layers)
    return of(DecoderLM, tied_head=tied_head, blocks=pattern, **sizes)


def vmoe(
    cell: ConfigDict, width: int, num_layers: int, num_heads: int, experts: ConfigDict, hidden_dim: int, **vit
) -> ConfigDict:
    """A vision transformer with dense FFNs of `hidden_dim` units and experts in turn, the last layer with experts."""
    attention = of(
        Attention,
        num_heads=num_heads,
        head_dim=width // num_heads,
        rule=of(Full),
        use_bias=True,
        output_bias=True,
    )
    shared = dict(attention=attention, norm=of(LayerNorm))
    dense = of(Block, mlp=of(MLP, hidden_dim=hidden_dim), **shared)
    sparse = of(MomentumBlock, mlp=experts, momentum=cell, **shared)
    return of(ViT, width=width, num_layers=num_layers, blocks=(dense, sparse), **vit)


def with_attack(config: ConfigDict, rate: float) -> ConfigDict:
    """The experiment, evaluated on attacked text too."""
    clean = config.evaluators[0]
    attacked = of(TokenSwap, data=clean.data.copy_and_resolve_references(), rate=rate)
    config.evaluators = (clean, of(Evaluate, name="attacked", data=attacked, batches=clean.get("batches")))
    return config


def language(preset: str) -> ConfigDict:
    experts = of(MoE, num_experts=8, k=2, hidden_dim=128, activation="relu", gated=False, router_bias=True)
    cells = {"robust": (ROBUST,), "adam": ADAM}.get(preset, (HEAVY_BALL,))
    dense = of(MLP, hidden_dim=256, activation="relu") if preset == "glam" else None
    model = decoder(cells, 64, 6, 4, experts, length=128, dense=dense)
    optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02))
    config = experiment(
        of(LanguageModelling, model=model),
        of(Stage, name="pretrain", steps=600, batch_size=16, optimizer=optimizer),
        dict(every=200, batches=8),
        checkpoint_every=200,
    )
    return with_attack(config, 0.05)


def vision() -> ConfigDict:
    experts = of(MoE, num_experts=8, k=2, hidden_dim=64, activation="gelu", gated=False, norm="softmax_topk")
    model = vmoe(HEAVY_BALL, 64, 6, 4, experts, 128, num_classes=10, patch=2)
    optimizer = of(muon, schedule=of(wsd, peak=2e-2, warmup=30, decay=0.5, floor=0.02))
    config = image_experiment(
        of(Classification, model=model, image_shape=(8, 8, 1)),
        of(Stage, name="train", steps=200, batch_size=64, optimizer=optimizer),
        dict(batch_size=61),
        source="digits",
        held_out="test",
    )
    clean = config.evaluators[0]

    def corrupted(kind: str) -> ConfigDict:
        data = of(
            CorruptedImages, data=clean.data.copy_and_resolve_references(), kind=kind, strengths="cifar_c"
        )
        return of(Evaluate, name=kind, data=data, batch_size=61)

    config.evaluators = (clean, *map(corrupted, CORRUPTIONS))
    return config


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "vision":
        return vision()
    if preset != "paper":
        return language(preset)
    # 6 layers of width 352, 8 heads, top-2 of 16 experts of 352 units; Adam, 7e-4 after 4000 steps.
    experts = of(
        MoE,
        num_experts=16,
        k=2,
        hidden_dim=352,
        activation="relu",
        gated=False,
        use_bias=True,
        router_bias=True,
        balance_weight=0.0,
    )
    layer = dict(
        norm=of(LayerNorm), dropout=0.1, post_norm_double=True, attention=dict(rule=of(Window, size=1024))
    )
    config = experiment(
        of(
            LanguageModelling,
            model=decoder((HEAVY_BALL,), 352, 6, 8, experts, 1536, tied_head=False, **layer),
        ),
        of(
            Stage,
            name="train",
            steps=60_000,
            batch_size=48,
            optimizer=of(adamw, schedule=of(constant, peak=7e-4, warmup=4000), weight_decay=0.0, b2=0.999),
        ),
        dict(every=1000),
        sources="hf:Salesforce/wikitext@wikitext-103-raw-v1",
        checkpoint_every=1000,
    )
    return with_attack(config, 0.025)
