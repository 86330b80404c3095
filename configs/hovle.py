"""HoVLE: causal layers embed patches and words for an unchanged decoder (arXiv 2412.16158).

    python -m experiments.train --config=configs/hovle.py --workdir=runs/hovle

`tiny` (the default): generated pictures of 3 x 3 cells in one tile, patches of 4 pixels; decoder and teacher are as
they were drawn, of which little can be learned: `--config.task.parts` names trained ones; minutes on two CPU cores.
`paper`: InternLM2-1.8B, 8 layers before it, tiles of 448 pixels, at most 12; the teacher has the shape of
InternViT-300M, without the scales of its residual branches. 2.6 B parameters without the teacher. Steps and rates are
ours. Pictures with any text are read from `data/pairs.json` in LLaVA's format, captions from `data/captions.json`.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.dialogues import LlavaFiles
from research.data.shapes import Scenes
from research.multimodal.connectors import ShuffledProjection
from research.multimodal.hovle import (
    HolisticEmbedding,
    HolisticTraining,
    HoVLE,
    PatchEmbedding,
    Tiles,
    Unpaired,
)
from research.training.loop import Trainer

PRESETS = ("tiny", "paper")
MODULE = ("^holistic/", "^tower/", "^connector/")
ALL = (*MODULE, "^decoder/")
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        return paper_experiment(paper_model(), llava.tower(1024, 24, 16, 32, class_token=True))
    return experiment(model(), toy_teacher(), of(Scenes), (100, 150, 150))


def assemble(decoder: ConfigDict, planner: ConfigDict, layers: int, side: int, **fields) -> ConfigDict:
    """The module's layers are those of the decoder, with weights of their own."""
    width = decoder.width
    return of(
        HoVLE,
        decoder=decoder,
        planner=planner,
        tower=of(PatchEmbedding, width=width, side=side),
        connector=of(ShuffledProjection, width=width),
        holistic=of(HolisticEmbedding, blocks=decoder.blocks, num_layers=layers),
        **fields,
    )


def model(**fields) -> ConfigDict:
    """Pictures of 24 x 24 pixels in one tile: 6 x 6 patches of 4 pixels, 3 x 3 rows of the decoder's."""
    return assemble(llava.toy_decoder(), toy_planner(), layers=2, side=6, **fields)


def toy_planner() -> ConfigDict:
    return of(Tiles, patch=4, side=24, most=1)


def paper_model() -> ConfigDict:
    decoder = llava.decoder(2048, 24, 16, 8192, 92_544, 32_768, kv_heads=8, base=1e6)
    return assemble(decoder, paper_planner(), layers=8, side=32)


def paper_planner() -> ConfigDict:
    return of(Tiles, patch=14, side=448, **IMAGENET)


def toy_teacher() -> ConfigDict:
    return llava.toy_tower(side=6)


def task(model: ConfigDict, teacher: ConfigDict, **fields) -> ConfigDict:
    return of(HolisticTraining, model=model, teacher=teacher, **fields)


def unpaired(source: ConfigDict, planner: ConfigDict, length: int, **fields) -> ConfigDict:
    return of(Unpaired, source=source, planner=planner, length=length, **fields)


def experiment(
    model: ConfigDict, teacher: ConfigDict, source: ConfigDict, steps: tuple[int, int, int], length: int = 40
) -> ConfigDict:
    """The three stages on a generated world."""
    first = dict(data=unpaired(source, model.planner, length))
    stages = (
        llava.stage("distil", steps[0], (*MODULE, "^head/"), 32, 3e-3, floor=0.1, **first),
        llava.stage("align", steps[1], MODULE, 32, 3e-3, floor=0.1),
        llava.stage("instruct", steps[2], ALL, 32, 1e-3, floor=0.1),
    )
    data = llava.conversations(source, model.planner, length)
    return of(Trainer, task=task(model, teacher), data=data, stages=stages)


def paper_experiment(model: ConfigDict, teacher: ConfigDict) -> ConfigDict:
    pairs, captions = unpaired(**paper_files("pairs")), llava.conversations(**paper_files("captions"))
    stages = (
        llava.stage("distil", 100_000, (*MODULE, "^head/"), 1024, 3e-4, data=pairs),
        llava.stage("align", 50_000, MODULE, 1024, 1e-4, data=captions),
        llava.stage("instruct", 40_000, ALL, 128, 2e-5),
    )
    data = llava.conversations(**paper_files("dialogues"))
    return of(Trainer, task=task(model, teacher, compute_dtype="bfloat16"), data=data, stages=stages)


def paper_files(name: str, length: int = 4096) -> dict:
    """Fields of `Conversations`."""
    source = of(LlavaFiles, path=f"data/{name}.json", images="data")
    return dict(source=source, planner=paper_planner(), length=length, tokenizer="data/tokenizer.json")
