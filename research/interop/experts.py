"""Mixtures of experts as `config.json` and the files describe them."""

import dataclasses
from collections.abc import Mapping

Part = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Experts:
    """How the experts of a family are described.

    Args:
        names: where the parameters of a layer are in files: our module -> the tensor below `model.layers.0.`, with
            `*` for the number of an expert, and which of its equal parts.
    """

    names: Mapping[str, tuple[str, Part]]
