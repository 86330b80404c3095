"""A decoder that hears: a tower of spectrograms shaped as AST (arXiv 2104.01778) in the place of LLaVA's of images.

    python -m experiments.train --config=configs/hearing.py --workdir=runs/hearing
    python -m experiments.generate --workdir=runs/hearing --audio=a.wav --prompt='<audio> which digits were said'

`tiny` (the default): one to three generated spoken digits, and which they were; tower, connector and decoder are drawn
and learn together; 99.5 % of held-out utterances are told right, after three and a half CPU minutes. `silent`: the same
without the sounds, 3.0 %.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.hearing import SpokenQuestions, vocabulary
from research.data.spoken import SpokenDigits
from research.multimodal.connectors import StepProjection
from research.multimodal.model import VLM
from research.multimodal.sound import Spectrogram
from research.multimodal.task import VisionLanguage
from research.multimodal.tower import SpectrogramTower
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer

PRESETS = ("tiny", "silent")
TOWER, MERGE, DIGITS = 64, 2, (1, 3)
FRAMES = 176  # three slow digits with their pauses last 1.69 s


def get_config(preset: str = "tiny") -> ConfigDict:
    silent = preset == "silent"
    model = toy()
    trained = ("^decoder/",) if silent else ("^tower/", "^connector/", "^decoder/")
    stage = llava.stage("listen", 800, trained, 32, 3e-3, floor=0.05)
    heard = of(SpokenDigits, digits=DIGITS, size=4096)
    held_out = of(SpokenDigits, digits=DIGITS, size=1024, split="test")

    def questions(source: ConfigDict, **fields) -> ConfigDict:
        return llava.conversations(
            of(SpokenQuestions, source=source, silent=silent), model.planner, 32, **fields
        )

    evaluator = of(Evaluate, name="test", data=questions(held_out, shuffle=False), batch_size=64)
    task = of(VisionLanguage, model=model)
    return of(Trainer, task=task, data=questions(heard), stages=(stage,), evaluators=(evaluator,))


def toy() -> ConfigDict:
    """Windows of 80 ms and half the frequencies; a row for every two steps of 40 ms."""
    planner = of(Spectrogram, frames=FRAMES, size=(8, 32), stride=(4, 32), merge=MERGE)
    steps, bands = 1 + (FRAMES - 8) // 4, 2
    words = vocabulary().vocab_size
    decoder = llava.decoder(llava.WIDTH, 2, 4, 2 * llava.WIDTH, words, 512, embedding_multiplier=50.0)
    connector = of(StepProjection, width=llava.WIDTH, bands=bands, merge=MERGE)
    return of(
        VLM, planner=planner, decoder=decoder, tower=tower(TOWER, 2, 4, steps, bands), connector=connector
    )


def tower(width: int, layers: int, heads: int, steps: int, bands: int) -> ConfigDict:
    sizes = dict(num_heads=heads, head_dim=width // heads, use_bias=True, output_bias=True)
    block = of(
        Block,
        attention=of(Attention, rule=of(Full), **sizes),
        mlp=of(MLP, hidden_dim=4 * width, activation="gelu"),
        norm=of(LayerNorm),
    )
    return of(SpectrogramTower, blocks=(block,), num_layers=layers, width=width, steps=steps, bands=bands)
