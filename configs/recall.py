"""Shared by the systems of long context: a small decoder that recalls values by their keys, and its training.

Every system that needs a model for whose answers far context matters starts from this one. The first block looks at
the previous token, the others at what attention finds.
"""

from ml_collections import ConfigDict

from research.config import of
from research.data.recall import Recall
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.previous import PreviousToken
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import LanguageModelling

VOCAB = 160


def decoder(
    width: int = 64, layers: int = 4, heads: int = 4, length: int = 128, mlp_ratio: int = 2, **attention
) -> ConfigDict:
    """`layers` blocks of attention above a `PreviousToken` alone; `attention` are more fields of `Attention`."""
    mlp = of(GatedMLP, hidden_dim=mlp_ratio * width)
    fields = dict(num_heads=heads, head_dim=width // heads, rotary=of(Rotary)) | attention
    blocks = (
        of(Block, attention=of(PreviousToken, width=width), mlp=None),
        *(of(Block, attention=of(Attention, **fields), mlp=mlp) for _ in range(layers)),
    )
    # Tokens enter with a standard deviation of 1, as the previous ones do.
    sizes = dict(vocab_size=VOCAB, width=width, max_length=length, num_layers=layers + 1)
    return of(DecoderLM, blocks=blocks, embedding_multiplier=50.0, tied_head=False, **sizes)


def experiment(
    model: ConfigDict,
    length: int = 128,
    steps: tuple[int, ...] = (150, 50, 100),
    seed: int = 0,
    every: int | None = 100,
    **trainer,
) -> ConfigDict:
    """Training on `Recall` rows, with `accuracy` on held-out rows of `length` as the share of right answers.

    The rows of each stage are twice as long as those of the one before, the last ones of `length`: 8 pairs are learned
    in about 100 updates and then carry over, 32 from the start not in 400.
    """
    lengths = [length >> (len(steps) - 1 - i) for i in range(len(steps))]

    def stage(tokens: int, count: int) -> ConfigDict:
        optimizer = of(adamw, schedule=of(cosine, peak=5e-3, warmup=30, floor=0.2), weight_decay=0.01)
        data = of(Recall, length=tokens, seed=seed)
        return of(Stage, name=f"length {tokens}", steps=count, batch_size=24, optimizer=optimizer, data=data)

    held_out = of(Recall, length=length, split="test", size=64)
    return of(
        Trainer,
        task=of(LanguageModelling, model=model),
        data=of(Recall, length=length, seed=seed),
        stages=tuple(stage(*pair) for pair in zip(lengths, steps, strict=True)),
        evaluators=(of(Evaluate, name="recall", data=held_out, batch_size=32, every=every),),
        seed=seed,
        **trainer,
    )
