"""Dragonfly: three zooms, and of the finest crops those like the crop around them (arXiv 2406.00977).

    python -m experiments.train --config=configs/dragonfly.py --workdir=runs/dragonfly

`tiny` (the default): generated pages of 64 x 96 pixels, crops of 16 x 16; minutes on two CPU cores.
`paper`: Llama-3-8B and CLIP ViT-B/32 at 224 pixels, 29 crops of 50 tokens, 12 of 24 high ones kept; for accelerators.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Pages
from research.multimodal.dragonfly import Zooms, ZoomSelection
from research.multimodal.media import CLIP_MEAN, CLIP_STD
from research.multimodal.model import VLM
from research.nn.norm import LayerNorm

PRESETS = ("tiny", "paper")
LENGTH = 120


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        planner = of(Zooms, patch=32, side=224, mean=CLIP_MEAN, std=CLIP_STD)
        norm = of(LayerNorm, epsilon=1e-5)
        vit = llava.tower(
            768, 12, 12, 7, "gelu_quick", class_token=True, patch_bias=False, feature=-2, pre_norm=norm
        )
        parts = dict(planner=planner, decoder=llava.llama3_8b(), tower=vit)
        connector = of(ZoomSelection, width=4096, keep=3, feature=-2)
        tuned = ("^connector/", "^decoder/", "^tower/")
        return llava.paper_experiment(
            of(VLM, **parts, connector=connector), instruct=tuned, rates=(2e-5, 2e-6)
        )
    return llava.toy_experiment(model(), of(Pages, shapes=((8, 12),)), length=LENGTH)


def model(keep: int = 3) -> ConfigDict:
    """17 crops of five tokens for keep=3. A page of 96 x 64 pixels is its high canvas, unscaled."""
    planner = of(Zooms, patch=8, side=16, keep=keep)
    parts = llava.toy_parts(planner, side=2, class_token=True)
    return of(VLM, **parts, connector=of(ZoomSelection, width=llava.WIDTH, keep=keep))
