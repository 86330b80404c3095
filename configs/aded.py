"""ADED: trigrams that adapt to the text, searched for drafts (arXiv 2407.12021). It is not trained.

    python -m experiments.generate --drafter=configs/aded.py:tiny --prompt='def main('

`tiny` (the default): counts 2.1M tokens of Python's standard library, in seconds, for the base model that ships;
about two tokens a call on code.
`paper`: the paper's search, with a table of the whole corpus; give your own, `--config.corpus` in Python or a copy of
this file: the paper's were ShareGPT, UltraChat and The Stack.
"""

from ml_collections import ConfigDict

from research.config import of
from research.decoding.speculative.aded import ADED

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    return of(ADED) if preset == "tiny" else of(ADED, records=1_000_000)
