"""mmMamba: a trained decoder distilled into state-space layers, in three stages (arXiv 2502.13145).

    python -m experiments.train --config=configs/mmmamba.py --workdir=runs/mmmamba
    python -m experiments.train --config=configs/mmmamba.py --config.task.teacher=runs/matlm --workdir=runs/mmmamba
    python -m experiments.generate --workdir=runs/mmmamba --prompt='def '

`tiny` (the default): all six layers of the base model that ships, on its corpus; minutes on two CPU cores. The log
shows `mimicry` fall in the first two stages, and `loss`, the KL divergence from the teacher, in the third.
`hybrid`: the same with one layer in three left as attention, the first of every three.
`paper`: the paper's steps, batches and rates. The teacher, `task.teacher`, is a run or a model directory of yours with
a context of 8192 tokens, the data what it was tuned on.
The paper's own teacher reads images, and is in configs/mmmamba_vlm.py.
"""

from ml_collections import ConfigDict

from research.config import of
from research.data.text import TokenDataset
from research.ssm.distillation import NEW, PROJECTIONS, MambaDistillation
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, wsd
from research.training.stages import Stage

PRESETS = ("tiny", "hybrid", "paper")
TEACHER = "package:language/base"


def stages(
    steps: tuple[int, int, int],
    rates: tuple[float, float, float],
    batch_sizes: tuple[int, int, int],
    **fields,
) -> tuple[ConfigDict, ...]:
    """The three stages. What stage 3 trains is what stage 2 does: the mixers without W_O."""
    mimicry = {"mimicry": 1000.0}
    trained = (NEW, PROJECTIONS)
    terms = (("new", (NEW,), mimicry), ("projections", trained, mimicry), ("end_to_end", trained, {}))
    return tuple(
        of(
            Stage,
            name=name,
            steps=count,
            batch_size=batch_size,
            trainable=patterns,
            loss_weights=weights,
            optimizer=of(
                adamw,
                schedule=of(wsd, peak=rate, warmup=count // 10, decay=0.1),
                weight_decay=0.05,
                b2=0.999,
            ),
            **fields,
        )
        for (name, patterns, weights), count, rate, batch_size in zip(
            terms, steps, rates, batch_sizes, strict=True
        )
    )


def distilling(task: dict, stages: tuple[ConfigDict, ...], length: int, **trainer) -> ConfigDict:
    held_out = of(TokenDataset, split="validation", length=length, shuffle=False)
    return of(
        Trainer,
        task=of(MambaDistillation, **{"teacher": TEACHER} | task),
        data=of(TokenDataset, split="train", length=length),
        stages=stages,
        evaluators=(of(Evaluate, name="validation", data=held_out, batch_size=8, batches=8),),
        clip=5.0,
        **trainer,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset in ("tiny", "hybrid"):
        task = dict(hybrid="head", period=3) if preset == "hybrid" else {}
        short = stages((60, 60, 180), (1e-2, 2e-3, 2e-3), (8, 8, 8))
        return distilling(task, short, length=128, checkpoint_every=100)
    return distilling(
        dict(compute_dtype="bfloat16"),
        stages((20_000, 20_000, 20_000), (1e-3, 5e-4, 5e-5), (128, 128, 64)),
        length=8192,
        checkpoint_every=1000,
    )
