"""LLaVA-UHD: slices of a picture's own aspect, each compressed, with their layout spelled (arXiv 2403.11703).

    python -m experiments.train --config=configs/llava_uhd.py --workdir=runs/llava_uhd

`tiny` (the default): generated pages of three shapes with digits of 8 pixels, a tower of 32 x 32 pixels; minutes on two
CPU cores.
`paper`: CLIP ViT-L/14 at 336 pixels, at most 7 slices of 144 tokens, LLaVA's dialogues; for accelerators.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Pages
from research.multimodal.llava_uhd import Slices, WindowResampler
from research.multimodal.model import VLM

PRESETS = ("tiny", "paper")
PAGES = ((8, 12), (12, 8), (8, 8))  # cells: 64 x 96, 96 x 64 and 64 x 64 pixels
LENGTH = 48


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        planner = of(Slices, side=336, **llava.CLIP)
        connector = of(WindowResampler, queries=12, width=4096, num_heads=32)
        return llava.paper_experiment(
            of(VLM, **llava.paper_parts(planner, flexible=True), connector=connector)
        )
    return llava.toy_experiment(model(), of(Pages, shapes=PAGES), length=LENGTH)


def model(separators: bool = True) -> ConfigDict:
    planner = of(Slices, patch=8, side=32, most=6, queries=2, separators=separators)
    connector = of(WindowResampler, queries=2, width=llava.WIDTH, num_heads=4)
    return of(VLM, **llava.toy_parts(planner, side=4, flexible=True), connector=connector)
