"""EMMA: the instruction is mixed into the image's tokens before the projector (arXiv 2410.02080).

    python -m experiments.train --config=configs/emma.py --workdir=runs/emma

`tiny` (the default): generated pictures of 3 x 3 cells; both towers stay as they were drawn, or with
`--config.task.parts` a pair that `pair` below has trained, which is the paper's setting; a minute on two CPU cores.
`pair`: the toy towers, trained by contrast on pictures and captions; a minute on two CPU cores.
`paper`: Vicuna-7B and both towers of CLIP ViT-L/14 at 336 pixels, LLaVA-1.5's data and rates (the paper's own are not
released); for accelerators. CLIP's tokenizer is a file of `data`.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Scenes, vocabulary
from research.multimodal.contrastive import Contrast, DualEncoder, Pairs, TextTower, TowerPair, WithText
from research.multimodal.emma import EarlyFusion
from research.multimodal.model import VLM
from research.nn.attention import Attention
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.transformer import Block
from research.training.loop import Trainer

PRESETS = ("tiny", "pair", "paper")
CONTEXT = 18  # tokens of the longest caption of a scene, with both ends


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        chat = dict(before="USER: ", between=" ASSISTANT: ", tokenizer="data/clip/tokenizer.json")
        planner = of(WithText, side=336, padded=True, context=77, **chat, **llava.CLIP)
        text = text_tower(768, 12, 12, 49_408, 77, 49_407, activation="gelu_quick")
        parts = llava.paper_parts(planner)
        towers = of(TowerPair, image=parts.pop("tower"), text=text)
        return llava.paper_experiment(of(VLM, **parts, tower=towers, connector=of(EarlyFusion, width=4096)))
    if preset == "pair":
        stage = llava.stage("contrast", 600, (".*",), 64, 3e-3, floor=0.1)
        return of(Trainer, task=contrast(), data=pairs(0), stages=(stage,))
    stages = (("align", 100, ("^connector/",)), ("instruct", 300, ("^connector/", "^decoder/")))
    return llava.toy_experiment(model(), of(Scenes), stages)


def text_tower(
    width: int, layers: int, heads: int, vocab_size: int, context: int, end: int, activation: str = "gelu"
) -> ConfigDict:
    attention = of(Attention, num_heads=heads, head_dim=width // heads, use_bias=True, output_bias=True)
    norm = of(LayerNorm, epsilon=1e-5)
    block = of(
        Block, attention=attention, mlp=of(MLP, hidden_dim=4 * width, activation=activation), norm=norm
    )
    size = dict(num_layers=layers, vocab_size=vocab_size, width=width, context=context, end=end)
    return of(TextTower, blocks=(block,), final_norm=norm, **size)


def planner() -> ConfigDict:
    return of(WithText, patch=8, side=24, context=CONTEXT)


def towers() -> ConfigDict:
    """The toy towers: patches are those before the last layer, as of CLIP."""
    words = vocabulary()
    text = text_tower(llava.TOWER, 2, 2, words.vocab_size, CONTEXT, words.eos_id)
    return of(TowerPair, image=llava.toy_tower(class_token=True, feature=-2), text=text)


def contrast() -> ConfigDict:
    return of(Contrast, model=of(DualEncoder, tower=towers(), width=llava.TOWER), planner=planner())


def pairs(seed: int, split: str = "train") -> ConfigDict:
    return of(Pairs, source=of(Scenes, asks=("caption",), split=split), planner=planner(), seed=seed)


def model() -> ConfigDict:
    parts = llava.toy_parts(planner()) | {"tower": towers()}
    return of(VLM, **parts, connector=of(EarlyFusion, width=llava.WIDTH))
