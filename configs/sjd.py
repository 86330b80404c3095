"""SJD: speculative Jacobi decoding of images (arXiv 2410.01699). It trains nothing; this trains what it decodes.

    python -m experiments.train --config=configs/sjd.py:tiny --workdir=runs/sjd

`tiny` (the default): a class-conditional decoder of 0.7M parameters over 16 x 16 codes, on crops of scikit-image's
photographs; its training has not been timed alone. Then, in Python,

    loaded = load_model("runs/sjd")
    artist = Artist(loaded.model, loaded.params, Codebook.load(), rows=16, columns=16, proposer=build(proposer()))
    drawing = artist.draw(range(8), sampling=Sampling(temperature=1.0))

draws an image of each class in 2 to 3 times fewer calls than there are tokens (docs/results/sjd). `paper`: LlamaGen-
XL (arXiv 2406.06525), one of the paper's targets, on ImageNet. Its learned tokenizer is not part of the project: a
codebook of 16384 patches stands for it, which `Codebook.fit(...).save("imagenet_codebook.json")` has to make first.
"""

from ml_collections import ConfigDict

from configs.matlm import decoder
from research.config import of
from research.data.codes import CodeDataset
from research.data.images import ImageDataset
from research.data.photographs import PhotographDataset
from research.decoding.speculative.sjd import SJD
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant, muon, wsd
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")
CODES, CLASSES, SIDE = 256, 8, 16


def proposer(preset: str = "tiny", **fields) -> ConfigDict:
    """The drafter of a preset. The released code decodes LlamaGen with guidance 7.5, top-k 1000 and a window of 16."""
    if preset == "tiny":
        return of(SJD, codes=CODES, rows=SIDE, columns=SIDE, **fields)
    return of(SJD, codes=16_384, rows=16, columns=16, window=16, init_rule="repeat_horizontal", **fields)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        held_out = of(CodeDataset, images=of(PhotographDataset, split="test", shuffle=False))
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=20, decay=0.4, floor=0.02))
        model = decoder(128, 3, 4, 384, SIDE * SIDE + 1, vocab_size=CODES + CLASSES + 1)
        return of(
            Trainer,
            task=of(LanguageModelling, model=model),
            data=of(CodeDataset, images=of(PhotographDataset), drop=0.1),
            stages=(of(Stage, name="train", steps=400, batch_size=8, optimizer=optimizer),),
            evaluators=(of(Evaluate, name="test", data=held_out, batch_size=11, every=200),),
        )
    # 754M parameters (the head is tied here); AdamW 1e-4, betas (0.9, 0.95), decay 0.05, batch 256, 300 epochs, one
    # class in ten dropped.
    images = dict(source="tfds:imagenet2012", size=256)
    codes = dict(codebook="imagenet_codebook.json")
    model = decoder(1280, 36, 20, 3584, 257, vocab_size=16_384 + 1001)
    held_out = of(CodeDataset, images=of(ImageDataset, split="validation", shuffle=False, **images), **codes)
    return of(
        Trainer,
        task=of(LanguageModelling, model=model, compute_dtype="bfloat16"),
        data=of(CodeDataset, images=of(ImageDataset, split="train", **images), drop=0.1, **codes),
        stages=(
            of(
                Stage,
                name="train",
                steps=1_500_000,
                batch_size=256,
                optimizer=of(adamw, schedule=of(constant, peak=1e-4), b2=0.95, weight_decay=0.05),
            ),
        ),
        evaluators=(of(Evaluate, name="validation", data=held_out, every=5000),),
        checkpoint_every=5000,
    )
