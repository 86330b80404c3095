"""Zipper: a text and a speech decoder joined by gated cross-attention in both directions (arXiv 2405.18669).

    python -m experiments.train --config=configs/zipper.py:text --workdir=runs/text
    python -m experiments.train --config=configs/zipper.py:speech --workdir=runs/speech
    python -m experiments.train --config=configs/zipper.py --workdir=runs/zipper \
        '--config.task.parts=(("text","runs/text",""),("speech","runs/speech",""))'

`tiny` (the default): generated spoken digits as units, recognised and synthesised in turn; the text tower is frozen.
Without `parts` both towers are drawn. `text` and `speech` make them: characters of Python's library, and units alone; a
few minutes each on two CPU cores.
`paper`: towers of about a billion parameters with a fusion behind every third layer, for accelerators. The paper's
towers (PaLM 2 and its own speech decoder) are not published, nor its units: sizes stand for them.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.spoken import SpokenDigits, SpokenFiles
from research.data.text import TokenDataset
from research.data.utterances import CHARACTERS, UNIT_VOCABULARY, UnitRows, Utterances, characters
from research.multimodal.zipper import Interleaved, Zipper
from research.training.loop import Trainer
from research.training.task import LanguageModelling

PRESETS = ("tiny", "text", "speech", "paper")
WIDTHS, LAYERS = {"text": 48, "speech": 32}, 2
NEW = ("^input_", "^fusion_")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        parts = dict(
            text=tower(2048, 18, 16, 256_128, 4096), speech=tower(2048, 18, 16, UNIT_VOCABULARY, 4096)
        )
        large = of(Zipper, **parts, every=(3, 3), num_heads=16, head_dim=128)
        task = of(Interleaved, model=large, compute_dtype="bfloat16")
        data = pairs(
            of(SpokenFiles, path="data/recordings", split="train"), text_length=512, speech_length=2048
        )
        stage = llava.stage("zip", 20_000, (*NEW, "^speech/"), 256, 1e-3, rates=(("^speech/", 0.1),))
        return of(Trainer, task=task, data=data, stages=(stage,))
    if preset in ("text", "speech"):
        text = of(TokenDataset, sources="builtin", length=128, tokenizer=str(CHARACTERS))
        data = text if preset == "text" else of(UnitRows, source=of(SpokenDigits, digits=(2, 4)))
        task = of(LanguageModelling, model=toy_tower(preset))
        stage = llava.stage("pretrain", 1000, (".*",), 32, 3e-3, floor=0.1)
        return of(Trainer, task=task, data=data, stages=(stage,))
    data = pairs(of(SpokenDigits, digits=(2, 4)), orders=(("speech", "text"), ("text", "speech")))
    options = dict(floor=0.1, rates=(("^speech/", 0.3),), weight_decay=0.01)
    stage = llava.stage("zip", 500, (*NEW, "^speech/"), 32, 3e-3, **options)
    return of(Trainer, task=of(Interleaved, model=model()), data=data, stages=(stage,))


def tower(width: int, layers: int, heads: int, vocab_size: int, length: int, **fields) -> ConfigDict:
    return llava.decoder(width, layers, heads, 4 * width, vocab_size, length, **fields)


def toy_tower(modality: str) -> ConfigDict:
    size = characters().vocab_size if modality == "text" else UNIT_VOCABULARY
    width = WIDTHS[modality]
    return llava.decoder(width, LAYERS, 4, 2 * width, size, 512, embedding_multiplier=50.0)


def model() -> ConfigDict:
    parts = dict(text=toy_tower("text"), speech=toy_tower("speech"))
    return of(Zipper, **parts, every=(1, 1), num_heads=4, head_dim=12)


def pairs(source: ConfigDict, **fields) -> ConfigDict:
    return of(Utterances, source=source, **fields)
