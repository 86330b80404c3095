"""decoupleQ: 2 bits, integers and floats solved for in turns (arXiv 2404.12759).

    python -m experiments.compress --config=configs/decoupleq.py --output=runs/decoupleq

`tiny` (the default): the model that ships, in groups of 32 inputs, its blocks tuned for one epoch; a minute or two on
two CPU cores.
`paper`: the authors' script for Llama: a scale for each output, 128 rows of 2048 tokens of C4, four turns, 160 parts of
the range, four epochs of tuning at 1e-5; for accelerators.
`projected`: the same with the integers of the authors' image models, by projected gradient descent.
"""

from ml_collections import ConfigDict

from research.compression.chain import Chain
from research.compression.decoupleq import DecoupleQ, Projected
from research.config import of

PRESETS = ("tiny", "paper", "projected")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        method = of(DecoupleQ, bits=2, group=32, clips=20, epochs=1, rate=1e-4)
        return of(Chain, methods=(method,), tokens=8192)
    solver = of(Projected, first=50, between=50, rate=1e-3) if preset == "projected" else None
    method = of(DecoupleQ, bits=2, turns=4, clips=160, epochs=4, rate=1e-5, solver=solver)
    return of(
        Chain, methods=(method,), sources="hf:allenai/c4@en", tokens=128 * 2048, length=2048, batch_size=1
    )
