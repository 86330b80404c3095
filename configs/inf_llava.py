"""INF-LLaVA: blocks and strided samplings of a large picture that read each other (arXiv 2407.16198).

    python -m experiments.train --config=configs/inf_llava.py --workdir=runs/inf_llava

`tiny` (the default): generated pages of 64 x 64 pixels in 2 x 2 parts of 32 x 32; minutes on two CPU cores.
`paper`: Llama-3-8B and CLIP ViT-L/14 at 336 pixels, pictures of 1008 x 1008 in 3 x 3 parts; for accelerators.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Pages
from research.multimodal.inf_llava import BlocksAndStrides, DualPerspective
from research.multimodal.model import VLM

PRESETS = ("tiny", "paper")
WORLD = dict(shapes=((8, 8),), asks=("digit", "number"))


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        planner = of(BlocksAndStrides, side=336, parts=3, **llava.CLIP)
        connector = of(DualPerspective, width=4096, parts=3)
        parts = llava.paper_parts(planner, llava.llama3_8b())
        return llava.paper_experiment(of(VLM, **parts, connector=connector))
    return llava.toy_experiment(model(), of(Pages, **WORLD))


def model(perspectives: str = "both") -> ConfigDict:
    planner = of(BlocksAndStrides, patch=8, side=32, parts=2)
    connector = of(DualPerspective, width=llava.WIDTH, parts=2, num_heads=4, perspectives=perspectives)
    return of(VLM, **llava.toy_parts(planner, side=4), connector=connector)
