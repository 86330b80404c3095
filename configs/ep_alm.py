"""eP-ALM: one token in the middle of a frozen decoder (arXiv 2303.11403).

    python -m experiments.train --config=configs/ep_alm.py --workdir=runs/ep_alm

`tiny` (the default): generated pictures of 3 x 3 cells and what shape they show; the decoder learns too, as there is no
trained one to freeze (`--config.stages.0.frozen=^decoder/` and `--config.task.parts` are the paper's setting); a minute
on two CPU cores.
`paper`: ViT-B/16 at 224 pixels and a decoder of OPT-2.7B's size, six levels in layers 19 to 30; for accelerators. OPT's
learned positions are rotary ones here.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Scenes
from research.multimodal.ep_alm import EPALM, LateToken, SoftPrompt
from research.multimodal.media import Square

PRESETS = ("tiny", "paper")
OWN = ("^connector/", "^hooks_0/")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        hook = of(LateToken, start=19, stop=31, levels=6, num_layers=32)
        vit = llava.tower(768, 12, 12, 14, class_token=True, norm_all=True)
        llm = llava.decoder(2560, 32, 32, 10240, 50_272, 2048)
        planner = of(Square, patch=16, side=224, count=10)
        connector = of(SoftPrompt, count=10, width=2560)
        model_ = of(EPALM, planner=planner, decoder=llm, tower=vit, connector=connector, hooks=(hook,))
        # 8 epochs of VQAv2's 444k questions; the prompt learns at half the rate.
        rates = (("^connector/", 0.5), (".*", 1.0))
        only = llava.stage("maps", 111_000, OWN, 32, 2e-5, weight_decay=0.02, rates=rates)
        return llava.paper_experiment(model_, stages=(only,), length=64)
    stages = (("maps", 300, (*OWN, "^decoder/", "^tower/")),)
    return llava.toy_experiment(model(), of(Scenes, asks=("shape",), objects=(1, 1)), stages)


def model() -> ConfigDict:
    """Two levels, in the last two of three layers."""
    planner = of(Square, patch=8, side=24, count=2)
    parts = llava.toy_parts(planner, class_token=True, norm_all=True)
    parts["decoder"] = llava.toy_decoder(3)
    hook = of(LateToken, start=1, stop=3, levels=2, num_layers=3)
    return of(EPALM, **parts, connector=of(SoftPrompt, count=2, width=llava.WIDTH), hooks=(hook,))
