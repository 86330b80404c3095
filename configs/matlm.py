"""MatLM: a nested decoder language model (MatFormer, arXiv 2310.07707).

    python -m experiments.train --config=configs/matlm.py:tiny --workdir=runs/matlm

`tiny` (the default): 1.6M parameters on Python's standard library, about two minutes on two CPU cores.
`base`: the 7.3M-parameter model that ships in research/language/base.
`paper`: the model that the authors' released code calls 180M, for accelerators; 57M parameters with our 4096 tokens.
"""

from collections.abc import Callable
from functools import partial

from ml_collections import ConfigDict

from research.config import of
from research.data.text import TokenDataset
from research.elastic.matformer import MatFormer
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine, muon, wsd
from research.training.stages import Stage
from research.training.sweeps import Sweep, grid, log_uniform
from research.training.task import LanguageModelling

PRESETS = ("tiny", "base", "paper")


gated_mlp = partial(of, GatedMLP)


def decoder(
    width: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    length: int,
    vocab_size: int = 4096,
    mlp: Callable[..., ConfigDict] = gated_mlp,
    **attention,
) -> ConfigDict:
    """A decoder; `mlp(hidden_dim=...)` makes the config of its FFNs, `attention` are more fields of its attention."""
    fields = dict(num_heads=num_heads, head_dim=width // num_heads, rotary=of(Rotary)) | attention
    return of(
        DecoderLM,
        vocab_size=vocab_size,
        width=width,
        max_length=length,
        num_layers=num_layers,
        blocks=(of(Block, attention=of(Attention, **fields), mlp=mlp(hidden_dim=hidden_dim)),),
    )


def experiment(
    task: ConfigDict, stage: ConfigDict, evaluator: dict, sources: str = "builtin", **trainer
) -> ConfigDict:
    """A language-model experiment on `sources`, evaluated on its validation split."""
    length = find_model(task).max_length
    held_out = of(TokenDataset, sources=sources, split="validation", length=length, shuffle=False)
    return of(
        Trainer,
        task=task,
        data=of(TokenDataset, sources=sources, split="train", length=length),
        stages=(stage,),
        evaluators=(of(Evaluate, name="validation", data=held_out, **evaluator),),
        **trainer,
    )


def find_model(task: ConfigDict) -> ConfigDict:
    return task.model if "model" in task else find_model(task.task)


def matlm(model: ConfigDict, training: str, compute_dtype: str = "float32") -> ConfigDict:
    return of(
        MatFormer, task=of(LanguageModelling, model=model, compute_dtype=compute_dtype), training=training
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    # The small presets use Muon: in 180 steps of `tiny` it reached 4.9 nats, AdamW (best of two rates) 5.4.
    if preset == "tiny":
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02))
        return experiment(
            matlm(decoder(width=128, num_layers=4, num_heads=4, hidden_dim=512, length=256), "sampled"),
            of(Stage, name="pretrain", steps=600, batch_size=16, optimizer=optimizer),
            dict(every=200, batches=8),
            checkpoint_every=200,
        )
    if preset == "base":
        optimizer = of(muon, schedule=of(wsd, peak=8e-3, warmup=100, decay=0.3, floor=0.02))
        return experiment(
            matlm(decoder(width=256, num_layers=6, num_heads=4, hidden_dim=1024, length=512), "sampled"),
            of(Stage, name="pretrain", steps=2600, batch_size=16, optimizer=optimizer),
            dict(every=200, batches=8),
            checkpoint_every=100,
        )
    # Width 512, 8 layers, 16 heads over one key-value head, batch 128 x 2048, 75k steps; FFN of 8 x width.
    optimizer = of(adamw, schedule=of(cosine, peak=1e-3, warmup=4000, floor=0.1), weight_decay=0.01)
    return experiment(
        matlm(decoder(512, 8, 16, 4096, 2048, num_kv_heads=1), "joint", "bfloat16"),
        of(Stage, name="pretrain", steps=75_000, batch_size=128, optimizer=optimizer),
        dict(every=1000),
        checkpoint_every=1000,
    )


def get_sweep(preset: str = "tiny") -> Sweep:
    """How the smallest and the largest granularity trade: sampled or joint training, and what each weighs.

    A searcher draws the rate and the clipping instead.
    """
    weights = {"task.loss_weights": ((1.0, 1.0, 1.0, 1.0), (4.0, 2.0, 1.0, 1.0), (1.0, 1.0, 2.0, 4.0))}
    return Sweep(
        points=grid({"task.training": ("sampled",)}) + grid({"task.training": ("joint",), **weights}),
        space={"stages.0.optimizer.schedule.peak": log_uniform(1e-3, 3e-2), "clip": log_uniform(0.1, 10.0)},
        trials=16,
        metric="validation/XL/loss",
        pareto=("validation/S/loss", "validation/XL/loss"),
    )
