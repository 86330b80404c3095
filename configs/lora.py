"""Low-rank adapters on a frozen model: LoRA (arXiv 2106.09685), QLoRA, PiSSA and LoftQ.

    python -m experiments.train --config=configs/lora.py --workdir=runs/lora
    python -m experiments.train --config=configs/lora.py:loftq --workdir=runs/loftq --config.task.base=runs/mine
    python -m experiments.adapter --adapter=runs/lora --merge=merged

`tiny` (the default): rank 8 on the base model that ships, which learns to add and subtract in sentences; a few
minutes on two CPU cores. What is saved are the factors.
`qlora`, `pissa`, `loftq`: the same with kernels of 2 bits, with the largest components as the adapter, with both.
`paper`: GPT-2 medium's in the paper: rank 4, alpha 32, queries and values alone, AdamW, linear decay.

`task.base` is any run, model directory or adapter directory. One whose kernels are quantized stays so.
"""

from ml_collections import ConfigDict

from research.adapters.lora import LoftQ, LoRA, NormalQuantizer, PiSSA
from research.adapters.tuning import AdapterTuning
from research.config import of
from research.data.text import TokenDataset
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine, linear
from research.training.stages import Stage

PRESETS = ("tiny", "qlora", "pissa", "loftq", "paper")
BASE = "package:language/base"
TRAINED = ("^adapter/",)


def text(
    sources: str | tuple[tuple[str, float], ...] = "arithmetic",
    split: str = "train",
    length: int = 128,
    **fields,
) -> ConfigDict:
    return of(TokenDataset, sources=sources, split=split, length=length, **fields)


def tuning(
    adapter: ConfigDict,
    stages: tuple[ConfigDict, ...],
    sources: str = "arithmetic",
    length: int = 128,
    mixed: tuple[tuple[str, float], ...] | None = None,
    **trainer,
) -> ConfigDict:
    """The training of an adapter on `sources`, or on those `mixed` with weights, evaluated on `sources` and on what the
    base model was trained on."""
    evaluators = tuple(
        of(
            Evaluate,
            name=name,
            data=text(source, "validation", length, shuffle=False),
            batch_size=16,
            batches=4,
        )
        for name, source in (("task", sources), ("before", "builtin"))
        if (name, source) != ("before", sources)
    )
    return of(
        Trainer,
        task=of(AdapterTuning, adapter=adapter, base=BASE),
        data=text(mixed or sources, "train", length),
        stages=stages,
        evaluators=evaluators,
        **trainer,
    )


def stage(steps: int, peak: float, batch_size: int = 8, warmup: int = 5, **fields) -> ConfigDict:
    """Without decay: factors that begin small would shrink to nothing."""
    optimizer = of(adamw, schedule=of(cosine, peak=peak, warmup=warmup), weight_decay=0.0)
    fields = {"name": "adapter", "optimizer": optimizer, "trainable": TRAINED} | fields
    return of(Stage, steps=steps, batch_size=batch_size, **fields)


def get_config(preset: str = "tiny") -> ConfigDict:
    two_bits = of(NormalQuantizer, bits=2)
    if preset == "paper":
        adapter = of(LoRA, rank=4, alpha=32.0, targets=(r"attention/(query|value)/kernel$",), dropout=0.1)
        optimizer = of(adamw, schedule=of(linear, peak=2e-4, warmup=500), weight_decay=0.01)
        return tuning(adapter, (stage(26_000, 2e-4, optimizer=optimizer),), length=512)
    adapter = {
        "tiny": of(LoRA, rank=8, alpha=16.0),
        "qlora": of(LoRA, rank=8, alpha=16.0, quantizer=two_bits),
        "pissa": of(PiSSA, rank=8),
        "loftq": of(LoftQ, rank=8, quantizer=two_bits),
    }[preset]
    return tuning(adapter, (stage(200, 2e-3),))
