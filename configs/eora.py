"""EoRA: a compressed model repaired by low-rank paths, without training (arXiv 2410.21271).

    python -m experiments.compress --config=configs/eora.py --output=runs/eora

`tiny` (the default): the model that ships in 3 bits, with corrections of rank 16; half a minute on two CPU cores.
`paper`: the setting of its tables for LLaMA 3 8B: channel-wise asymmetric 3-bit GPTQ that takes inputs in order of
their moments, rank 128, calibrated on 128 rows of 2048 tokens of WikiText-2; for accelerators.
"""

from ml_collections import ConfigDict

from research.compression.baselines import GPTQ, RoundToNearest
from research.compression.chain import Chain
from research.compression.eora import EoRA
from research.config import of

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        return of(Chain, methods=(of(RoundToNearest, bits=3), of(EoRA, rank=16)), tokens=8192)
    return of(
        Chain,
        methods=(of(GPTQ, bits=3, order=True, damp=0.01), of(EoRA, rank=128)),
        sources="hf:Salesforce/wikitext@wikitext-2-raw-v1",
        tokens=128 * 2048,
        length=2048,
        batch_size=1,
    )
