"""Dynamic-LLaVA: image and generated tokens dropped by learned predictors (arXiv 2412.00876).

    python -m experiments.train --config=configs/dynamic_llava.py --workdir=runs/dynamic_llava

`tiny` (the default): generated pictures of 8 x 8 patch tokens, questions and long answers; a decoder of 4 layers that
drops in the second, trained from scratch with its predictors; minutes on two CPU cores.
`paper`: LLaVA-1.5-7B's language model: 576 image tokens of which a fifth stays, half of the generated tokens; for
accelerators, and begun with `--config.task.start_from=` a trained decoder. Its data, 665k conversations, is not here:
the rows are generated ones with as many image tokens.
"""

from ml_collections import ConfigDict

from research.config import of
from research.data.glyphs import GlyphAnswers
from research.multimodal.dynamic_llava import DynamicLM, DynamicTraining, Sparsity
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    return paper() if preset == "paper" else tiny()


def decoder(width: int, layers: int, heads: int, hidden_dim: int, vocab_size: int, length: int) -> dict:
    """Fields of a DecoderLM, and so of a DynamicLM."""

    def block() -> ConfigDict:
        attention = of(Attention, num_heads=heads, head_dim=width // heads, rotary=of(Rotary))
        return of(Block, attention=attention, mlp=of(GatedMLP, hidden_dim=hidden_dim))

    sizes = dict(vocab_size=vocab_size, width=width, max_length=length, num_layers=layers)
    blocks = tuple(block() for _ in range(3))  # all alike; the fewest of which one can decide
    return dict(blocks=blocks, embedding_multiplier=50.0, tied_head=False, **sizes)


def toy_decoder(data: GlyphAnswers) -> dict:
    return decoder(64, 4, 4, 128, data.vocab_size, data.length)


def training(model: dict, sparsity: ConfigDict, steps: int, **fields) -> ConfigDict:
    return of(DynamicTraining, model=of(DynamicLM, sparsity=sparsity, **model), updates=steps, **fields)


def experiment(task: ConfigDict, stage: ConfigDict, data: dict, seed: int = 0) -> ConfigDict:
    held_out = of(GlyphAnswers, split="test", size=128, **data)
    return of(
        Trainer,
        task=task,
        data=of(GlyphAnswers, seed=seed, **data),
        stages=(stage,),
        evaluators=(of(Evaluate, name="answers", data=held_out, batch_size=32),),
        seed=seed,
    )


def stage(steps: int, batch_size: int = 16, peak: float = 3e-3) -> ConfigDict:
    optimizer = of(adamw, schedule=of(cosine, peak=peak, warmup=20, floor=0.1), weight_decay=0.01)
    return of(Stage, name="sparse", steps=steps, batch_size=batch_size, optimizer=optimizer)


SPARSITY = dict(image_rate=0.2, width=64, heads=4, depth=1)


def tiny(seed: int = 0, steps: int = 400) -> ConfigDict:
    data = GlyphAnswers()
    task = training(toy_decoder(data), of(Sparsity, image=data.image, **SPARSITY), steps)
    return experiment(task, stage(steps), {}, seed)


def paper() -> ConfigDict:
    data = GlyphAnswers(side=24)
    steps = 10_400  # one pass over 665k rows in batches of 64
    sparsity = of(Sparsity, image=data.image, epsilon=1e-6)
    model = decoder(4096, 32, 32, 11008, 32_000, 2048)
    task = training(model | dict(embedding_multiplier=1.0), sparsity, steps, compute_dtype="bfloat16")
    # The predictors learn at 2e-4, the language model at 5e-6.
    optimizer = of(
        adamw,
        schedule=of(cosine, peak=5e-6, warmup=312),
        rates=(("predictor", 40.0),),
    )
    only = of(Stage, name="sparse", steps=steps, batch_size=64, optimizer=optimizer)
    return experiment(task, only, dict(side=24))
