"""EVE: patches straight into the decoder, aligned with a frozen encoder in training (arXiv 2406.11832).

    python -m experiments.train --config=configs/eve.py --workdir=runs/eve

`tiny` (the default): generated pictures of 3 x 3 cells, patches of 4 pixels; the teacher is a drawn tower, of which
nothing can be learned: `--config.task.parts` names a trained one; two minutes on two CPU cores.
`paper`: Vicuna-7B, a long side of 672 pixels, CLIP ViT-L/14 at 336 as teacher; 16M pairs with the decoder frozen, 33M
with all but the teacher, then dialogues; for accelerators. Pairs are read from `data/pairs.json` in LLaVA's format.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.dialogues import LlavaFiles
from research.data.shapes import Scenes
from research.multimodal.eve import EVE, AnyAspect, PatchEmbeddingLayer, SequenceProjection

PRESETS = ("tiny", "paper")
LIGHT = ("^tower/", "^connector/", "^align/")
ALL = (*LIGHT, "^decoder/")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        planner = of(AnyAspect, side=672, **llava.CLIP)
        parts = dict(
            decoder=llava.vicuna_7b(),
            tower=of(PatchEmbeddingLayer, width=1024),
            connector=of(SequenceProjection, width=4096),
            teacher=llava.clip(flexible=True),
        )
        pairs = llava.conversations(
            of(LlavaFiles, path="data/pairs.json", images="data"),
            planner,
            2048,
            tokenizer="data/tokenizer.json",
        )
        stages = (
            llava.stage("prealign", 31_250, LIGHT, 512, 4e-4, data=pairs),
            llava.stage("pretrain", 64_453, ALL, 512, 4e-5, data=pairs),
            llava.stage("instruct", 5195, ALL, 128, 2e-5),
        )
        return llava.paper_experiment(of(EVE, planner=planner, **parts), stages=stages)
    stages = (("prealign", 100, LIGHT), ("instruct", 300, ALL))
    return llava.toy_experiment(model(), of(Scenes), stages)


def model(aligned: bool = True) -> ConfigDict:
    """Pictures of 24 x 24 pixels: 3 x 3 windows of 2 x 2 patches of 4 pixels. The teacher reads them at half the size,
    so that its patches of 4 pixels are as large as the windows."""
    return of(
        EVE,
        planner=of(AnyAspect, patch=4, side=24),
        decoder=llava.toy_decoder(),
        tower=of(PatchEmbeddingLayer, width=64, num_heads=4),
        connector=of(SequenceProjection, width=llava.WIDTH),
        teacher=llava.toy_tower(flexible=True) if aligned else None,
        every=1,
        align_heads=4,
    )
