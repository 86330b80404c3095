"""DARE: fine-tuned models that are merged (arXiv 2311.03099).

    python -m experiments.train --config=configs/dare.py --workdir=runs/sums
    python -m experiments.train --config=configs/dare.py --config.data.sources=builtin --workdir=runs/code
    python -m experiments.merge --models=runs/sums,runs/code --method=ties --drop=0.5 --data=arithmetic,builtin \
        --output=runs/both

DARE and merging need no training and no config; what they need is several fine-tuned models of one base.

`tiny` (the default): the model that ships, fine-tuned on sums in sentences; a minute on two CPU cores.
`paper`: Llama 2 13B, fine-tuned with a small rate as WizardMath is, for accelerators; the paper merges released models.
"""

from ml_collections import ConfigDict

from configs.matlm import decoder, experiment
from research.config import of
from research.nn.rotary import Rotary
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")


def finetune(
    sources: str,
    model: ConfigDict,
    start: str | None,
    steps: int,
    batch: int,
    peak: float,
    length: int,
    **task,
) -> ConfigDict:
    """A model that goes on from `start` on another text."""
    stage = of(
        Stage,
        name="finetune",
        steps=steps,
        batch_size=batch,
        optimizer=of(adamw, schedule=of(cosine, peak=peak, warmup=steps // 20, floor=0.1), weight_decay=0.0),
    )
    task = of(LanguageModelling, model=model, start_from=start, **task)
    config = experiment(task, stage, dict(batches=8), sources)
    config.data.length = config.evaluators[0].data.length = length
    return config


def base_model() -> ConfigDict:
    """The config of the model that ships."""
    return decoder(width=256, num_layers=6, num_heads=4, hidden_dim=1024, length=512)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return finetune("arithmetic", base_model(), "package:language/base", 60, 16, 3e-4, 128)
    model = decoder(5120, 40, 40, 13824, 4096, vocab_size=32_000, rotary=of(Rotary, base=1e4))
    model.tied_head = False
    start = "models/llama-2-13b"
    return finetune(
        "hf:openai/gsm8k@main#answer", model, start, 3000, 128, 2e-5, 2048, compute_dtype="bfloat16"
    )
