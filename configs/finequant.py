"""FineQuant: int4 weights whose groups are as fine as each matrix needs (arXiv 2308.09723).

    python -m experiments.compress --config=configs/finequant.py --output=runs/finequant

A chain of one method, which trains nothing and needs no data.

`tiny` (the default): for the model that ships; a quarter of a minute on two CPU cores.
`paper`: groups of 64 inputs at least, as the authors' kernels have them, and 16-bit scales; for any model.
"""

from ml_collections import ConfigDict

from research.compression.chain import Chain
from research.compression.finequant import FineQuant
from research.config import of

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    smallest = 32 if preset == "tiny" else 64  # its matrices have 256 inputs
    return of(Chain, methods=(of(FineQuant, bits=4, smallest=smallest),))
