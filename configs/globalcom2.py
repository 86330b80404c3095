"""GlobalCom2: image tokens dropped under the guidance of the thumbnail (arXiv 2501.05179).

    python -m experiments.train --config=configs/globalcom2.py --workdir=runs/globalcom2

The method trains nothing. What is trained here is a small model to try it on, which is evaluated with a quarter of its
image tokens.

`tiny` (the default): generated pictures of 96 x 96 with one to three glyphs, a thumbnail and 2 x 2 crops of 64 tokens;
minutes on two CPU cores.
`paper`: LLaVA-NeXT-7B's sizes: CLIP ViT-L/14 at 336 pixels, 2 x 2 crops of 576 tokens, R = 0.25; for accelerators.
"""

from ml_collections import ConfigDict

from configs.matlm import decoder
from research.config import of
from research.data.glyphs import GlyphCanvases
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.transformer import Block
from research.sparse.crop_reading import CropReading
from research.sparse.globalcom2 import GlobalCom2
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.vision.vit import ViT

PRESETS = ("tiny", "paper")
SHAPES, COLOURS = 6, 4


def get_config(preset: str = "tiny") -> ConfigDict:
    return paper() if preset == "paper" else tiny()


def encoder(width: int, layers: int, heads: int, patch: int) -> ConfigDict:
    attention = of(
        Attention, num_heads=heads, head_dim=width // heads, rule=of(Full), use_bias=True, output_bias=True
    )
    block = of(Block, attention=attention, mlp=of(MLP, hidden_dim=4 * width), norm=of(LayerNorm))
    return of(
        ViT,
        num_classes=SHAPES,
        width=width,
        patch=patch,
        pool="class",
        num_layers=layers,
        blocks=(block,),
    )


def experiment(
    task: ConfigDict, data: dict, steps: tuple[int, int], batch_size: int, peak: float, seed: int = 0
) -> ConfigDict:
    """The encoder first, by what its class token names; then the rest above it."""

    def stage(name: str, count: int, **fields) -> ConfigDict:
        optimizer = of(adamw, schedule=of(cosine, peak=peak, warmup=20, floor=0.1), weight_decay=0.01)
        return of(Stage, name=name, steps=count, batch_size=batch_size, optimizer=optimizer, **fields)

    held_out = of(GlyphCanvases, split="test", size=256, **data)
    return of(
        Trainer,
        task=task,
        data=of(GlyphCanvases, seed=seed, **data),
        stages=(
            stage("encoder", steps[0], trainable=("encoder",), loss_weights={"naming": 1.0}),
            stage("decoder", steps[1], frozen=("encoder",)),
        ),
        evaluators=(of(Evaluate, name="compressed", data=held_out, batch_size=32),),
        seed=seed,
    )


def tiny(seed: int = 0, steps: tuple[int, int] = (200, 200)) -> ConfigDict:
    task = of(
        CropReading,
        encoder=encoder(width=32, layers=2, heads=2, patch=6),
        decoder=decoder(32, 2, 2, 64, length=512, vocab_size=SHAPES + COLOURS),
        rule=of(GlobalCom2, ratio=0.25),
    )
    return experiment(task, {}, steps, batch_size=16, peak=3e-3, seed=seed)


def paper() -> ConfigDict:
    data = dict(side=672, glyph=84)
    task = of(
        CropReading,
        encoder=encoder(width=1024, layers=24, heads=16, patch=14),
        decoder=decoder(4096, 32, 32, 14336, length=4096, vocab_size=32_000, num_kv_heads=8),
        side=672,
        rule=of(GlobalCom2, ratio=0.25),
    )
    return experiment(task, data, (10_000, 10_000), batch_size=64, peak=1e-4)
