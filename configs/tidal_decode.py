"""TidalDecode: decoding that reads the tokens which two layers chose (arXiv 2410.05076).

    python -m experiments.train --config=configs/tidal_decode.py --workdir=runs/tidal_decode
    python -m experiments.reselect --workdir=runs/tidal_decode --k=4 --select=1 --output=runs/tidal_decode/selector.json
    python -m experiments.generate --sparse=tidal:k=64,select=2,reselect=4 --prompt='def main('

The method needs no training of its own and decodes any trained decoder, as in the last line the one that ships; this
trains a small one that finds a value by its key in a long context, in any of its layers.

`tiny` (the default): a layer of attention looped four times above one that sees the previous token; under a minute on
two CPU cores. Evaluated token by token as the dense model and as TidalDecode.
`paper`: Llama 3 8B, which the paper decodes with k from 32 to 512, s = 2 and c = 13; for accelerators.
"""

from ml_collections import ConfigDict

from configs import recall
from configs.matlm import decoder, experiment
from research.config import of
from research.nn.rotary import Rotary
from research.sparse.tidal import Looped, Tidal, TidalDecoding
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")
LENGTH, LAYERS, STEPS = 128, 4, (120, 40, 60)


def get_config(preset: str = "tiny") -> ConfigDict:
    return paper() if preset == "paper" else tiny()


def tiny(seed: int = 0) -> ConfigDict:
    model = recall.decoder(layers=LAYERS, length=LENGTH)
    for block in model.blocks[1:]:
        block.mlp = None
    config = recall.experiment(model, LENGTH, STEPS, seed, every=None)
    # The pairs are given, the queries decoded.
    config.task = of(Looped, model=model, selector=of(Tidal, k=4, select=1), prompt=LENGTH // 2, first=1)
    return config


def paper() -> ConfigDict:
    heads = dict(num_kv_heads=8, rotary=of(Rotary, base=5e5))
    model = decoder(4096, 32, 32, 14336, 8192, vocab_size=128_256, **heads)
    model.tied_head = False
    config = experiment(
        of(LanguageModelling, model=model, compute_dtype="bfloat16"),
        of(
            Stage,
            name="pretrain",
            steps=100_000,
            batch_size=1024,
            optimizer=of(adamw, schedule=of(cosine, peak=3e-4, warmup=2000, floor=0.1), weight_decay=0.1),
        ),
        dict(every=1000),
        mesh=dict(data=-1, fsdp=8),
        checkpoint_every=1000,
    )
    selector = of(Tidal, k=512, select=2, reselect=13)
    config.task = of(TidalDecoding, model=model, compute_dtype="bfloat16", selector=selector, prompt=7168)
    return config
