"""MouSi: several vision experts, fused, and positions that their tokens share (arXiv 2401.17221).

    python -m experiments.train --config=configs/mousi.py --workdir=runs/mousi

`tiny` (the default): generated pictures of 3 x 3 cells and two towers; a minute on two CPU cores.
`paper`: Vicuna-7B with three ViT-L/14 at 336 pixels, 576 + 288 + 144 tokens, a position a row; for accelerators. SAM,
one of the paper's experts, has patches of 16, and here all experts read patches of 14.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Scenes
from research.multimodal.model import VLM
from research.multimodal.mousi import ExpertFusion, Experts, Panel

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        planner = of(Experts, side=336, counts=(576, 288, 144), share="row", **llava.CLIP)
        panel = of(Panel, experts=tuple(llava.clip() for _ in range(3)))
        parts = llava.paper_parts(planner) | {"tower": panel}
        fusion = of(ExpertFusion, width=4096, groups=(1, 2, 4))
        return llava.paper_experiment(of(VLM, **parts, connector=fusion))
    return llava.toy_experiment(model(2), of(Scenes))


def model(experts: int) -> ConfigDict:
    """So many toy towers, nine tokens each."""
    planner = of(Experts, patch=8, side=24, counts=(9,) * experts)
    panel = of(Panel, experts=tuple(llava.toy_tower() for _ in range(experts)))
    fusion = of(ExpertFusion, width=llava.WIDTH, groups=(1,) * experts)
    return of(VLM, **(llava.toy_parts(planner) | {"tower": panel}), connector=fusion)
