"""mmMamba's own setting: a HoVLE, which reads images without an encoder, in state-space layers (arXiv 2502.13145).

    python -m experiments.train --config=configs/hovle.py --workdir=runs/hovle
    python -m experiments.train --config=configs/mmmamba_vlm.py --config.task.teacher=runs/hovle --workdir=runs/vlm

`tiny` (the default): all four layers of the tiny HoVLE, the module's and the decoder's; drawn, unless a trained one is
named as above; minutes on two CPU cores. `hybrid`: the first of the four stays attention.
`paper`: HoVLE's 8 + 24 layers, of which the first of every four stay attention (`--config.task.hybrid=none`: none), the
paper's steps, batches and rates on `data/dialogues.json`, in LLaVA's format; for accelerators.
"""

from ml_collections import ConfigDict

from configs import hovle, llava
from configs.mmmamba import stages
from research.config import of
from research.data.shapes import Scenes
from research.multimodal.distillation import VisionMambaDistillation
from research.training.loop import Trainer

PRESETS = ("tiny", "hybrid", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        task = of(
            VisionMambaDistillation, teacher=hovle.paper_model(), hybrid="head", compute_dtype="bfloat16"
        )
        data = llava.conversations(**hovle.paper_files("dialogues", length=8192))
        long = stages((20_000, 20_000, 20_000), (1e-3, 5e-4, 5e-5), (128, 128, 64))
        return of(Trainer, task=task, data=data, stages=long, clip=5.0)
    hybrid = "head" if preset == "hybrid" else None
    task = of(VisionMambaDistillation, teacher=hovle.model(), hybrid=hybrid, chunk=32)
    data = llava.conversations(of(Scenes), hovle.toy_planner(), 40)
    short = stages((60, 60, 120), (1e-2, 2e-3, 2e-3), (32, 32, 32))
    return of(Trainer, task=task, data=data, stages=short, clip=5.0)
