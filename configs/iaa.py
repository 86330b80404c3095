"""Inner-Adaptor: layers inserted between those of a frozen decoder (arXiv 2408.12902).

    python -m experiments.train --config=configs/iaa.py --workdir=runs/iaa

`tiny` (the default): generated pictures of 3 x 3 cells. The decoder stays as it is: drawn, or with
`--config.task.parts` a trained one, which is the paper's setting; a minute on two CPU cores.
`paper`: Llama-3-8B with 14 inserted layers and CLIP ViT-L/14, IAA-14; for accelerators.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.shapes import Scenes
from research.multimodal.connectors import PatchProjection
from research.multimodal.iaa import IAA, InsertedLayers
from research.multimodal.media import Square

PRESETS = ("tiny", "paper")
OWN = ("^connector/", "^hooks_0/", "^embedding/", "^final_norm/", "^head/")
BEHIND = (0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        llm = llava.llama3_8b()
        inserted = of(InsertedLayers, block=llm.blocks[0], behind=BEHIND)
        connector = of(PatchProjection, width=4096)
        parts = llava.paper_parts(of(Square, side=336, padded=True, **llava.CLIP), llm)
        return llava.paper_experiment(of(IAA, **parts, connector=connector, hooks=(inserted,)), instruct=OWN)
    stages = (("align", 100, ("^connector/",)), ("instruct", 300, OWN))
    return llava.toy_experiment(model(), of(Scenes), stages)


def model() -> ConfigDict:
    """A layer behind each of the toy decoder's two."""
    parts = llava.toy_parts(of(Square, patch=8, side=24))
    inserted = of(InsertedLayers, block=parts["decoder"].blocks[0], behind=(0, 1))
    return of(IAA, **parts, connector=of(PatchProjection, width=llava.WIDTH), hooks=(inserted,))
