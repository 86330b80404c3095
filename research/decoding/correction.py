"""Correction of a cache that was written by an approximate `extend` (TidalDecode, arXiv 2410.05076, section 3.3).

Rows of tokens that were decoded approximately are computed anew by the exact model, many tokens in one call, over the
rows before them, which are clean. What was said is not taken back; what follows reads a clean cache.
"""

import dataclasses
from typing import Any

from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Correction:
    """model: the exact one, with the parameters and caches of the approximate one. every: calls between corrections."""

    model: Any
    every: int

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"correction after every {self.every} calls: at least 1 is expected")
