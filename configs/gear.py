"""GEAR: a compressed cache of keys and values (arXiv 2403.05527).

    python -m experiments.train --config=configs/gear.py --workdir=runs/gear
    python -m experiments.generate --cache=gear:bits=2 --prompt='def main('
    python -m experiments.generate --workdir=runs/gear --cache=kivi:bits=4,group=32 --prompt='def main('

The method needs no training and compresses the cache of any trained decoder, as in the second line that of the one
that ships; this trains a small one and evaluates it token by token through the compressed cache.

`tiny` (the default): 2 layers of width 64; a minute on two CPU cores.
`paper`: Llama 2 7B with 2 bits, g = 64, s = 2 %, a buffer of 64, rank 4 for prompts of up to 2048 tokens and 2 behind
them; for accelerators.
"""

from ml_collections import ConfigDict

from configs.matlm import decoder, experiment
from research.compression.gear import Gear
from research.config import of
from research.nn.rotary import Rotary
from research.training.optimizers import adamw, cosine, muon, wsd
from research.training.stages import Stage
from research.training.stepwise import Stepwise
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        small = of(Gear, group=32, buffer=32)
        model = decoder(64, 2, 2, 256, 128, cache_kind=small)
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02))
        stage = of(Stage, name="pretrain", steps=300, batch_size=16, optimizer=optimizer)
        return experiment(of(Stepwise, model=model, prompt=64), stage, dict(batches=2))
    cache = of(Gear, rank=2, prompt=2048, prompt_rank=4)
    rotary = of(Rotary, base=1e4)
    model = decoder(4096, 32, 32, 11008, 4096, vocab_size=32_000, rotary=rotary, cache_kind=cache)
    model.tied_head = False
    optimizer = of(adamw, schedule=of(cosine, peak=3e-4, warmup=2000, floor=0.1), weight_decay=0.1)
    stage = of(Stage, name="pretrain", steps=500_000, batch_size=1024, optimizer=optimizer)
    task = of(LanguageModelling, model=model, compute_dtype="bfloat16")
    return experiment(task, stage, dict(every=1000), mesh=dict(data=-1, fsdp=8), checkpoint_every=1000)
