"""A corrector of code, the model that input-guided aggressive decoding (IAD, arXiv 2205.10350) is made for.

    python -m experiments.train --config=configs/iad.py --workdir=runs/corrector
    python -m experiments.generate --workdir=runs/corrector --prompt='retrun self.valeu' --drafter=iad

IAD itself has nothing to train: these are encoder-decoders with a short decoder, as the paper has them ("shallow"),
that write a corrupted line of code as it was.

`tiny` (the default): 0.4M parameters that read bytes, the corrector that ships in research/language/corrector; two to
three minutes on two CPU cores; validation loss 0.20 nats a byte, and a line with 5 % of its characters wrong comes out
with half as many errors, 6 bytes a call.
`paper`: nine encoder and three decoder layers of Transformer-big, with rotary positions, for accelerators; the data
is ours, its rates and its optimizer those that the paper gives for GAD.
"""

from ml_collections import ConfigDict

from research.config import of
from research.data.corrections import Corrections
from research.language.encoder_decoder import Encoder, EncoderDecoder, SequenceToSequence
from research.nn.attention import Attention
from research.nn.cross_attention import CrossAttention, CrossBlock
from research.nn.masks import Full
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, linear, muon, wsd
from research.training.stages import Stage

PRESETS = ("tiny", "paper")
BYTES = "research/language/corrector/tokenizer.json"


def encoder_decoder(
    width: int,
    layers: tuple[int, int],
    num_heads: int,
    hidden_dim: int,
    length: int,
    vocab_size: int,
    dropout: float = 0.0,
) -> ConfigDict:
    """layers: of the encoder and of the decoder; length: tokens of a source, and of a target."""
    heads = dict(num_heads=num_heads, head_dim=width // num_heads, rotary=of(Rotary))
    mlp = of(GatedMLP, hidden_dim=hidden_dim)
    block = of(Block, attention=of(Attention, rule=of(Full), **heads), mlp=mlp, dropout=dropout)
    cross = of(
        CrossBlock,
        attention=of(Attention, **heads),
        cross_attention=of(CrossAttention, **heads),
        mlp=mlp,
        dropout=dropout,
    )
    return of(
        EncoderDecoder,
        encoder=of(Encoder, blocks=(block,), num_layers=layers[0]),
        blocks=(cross,),
        num_layers=layers[1],
        vocab_size=vocab_size,
        width=width,
        source_length=length,
        max_length=length,
    )


def correcting(
    task: ConfigDict, stage: ConfigDict, length: int, tokenizer: str | None, **trainer
) -> ConfigDict:
    """A task on corrupted lines of the built-in corpus, evaluated on lines of the validation files."""
    held_out = of(Corrections, split="validation", length=length, tokenizer=tokenizer, shuffle=False)
    return of(
        Trainer,
        task=task,
        data=of(Corrections, length=length, tokenizer=tokenizer),
        stages=(stage,),
        evaluators=(of(Evaluate, name="validation", data=held_out, batches=16),),
        **trainer,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        model = encoder_decoder(96, (2, 1), 4, 256, 64, vocab_size=259)
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.4, floor=0.02))
        stage = of(Stage, name="train", steps=1500, batch_size=32, optimizer=optimizer)
        return correcting(of(SequenceToSequence, model=model), stage, 64, BYTES, checkpoint_every=500)
    model = encoder_decoder(1024, (9, 3), 16, 4096, 200, vocab_size=4096, dropout=0.1)
    # 128k tokens a batch.
    optimizer = of(adamw, schedule=of(linear, peak=5e-4, warmup=10_000), b2=0.999, weight_decay=0.01)
    stage = of(Stage, name="train", steps=300_000, batch_size=640, optimizer=optimizer)
    task = of(SequenceToSequence, model=model, compute_dtype="bfloat16", label_smoothing=0.1)
    return correcting(task, stage, 200, None, clip=5.0)
