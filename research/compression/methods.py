"""The compression methods by name, for programs that chain them: a new method is a line in `METHODS`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from research.compression.baselines import GPTQ, RoundToNearest
from research.compression.chain import Method
from research.compression.decoupleq import DecoupleQ
from research.compression.eora import EoRA
from research.compression.factors import Factors
from research.compression.finequant import FineQuant
from research.compression.qmoe import QMoE
from research.errors import UserError, nearest

# {name: (class, fields that the name fixes)}
METHODS: dict[str, tuple[Callable[..., Method], dict[str, Any]]] = {
    "round_to_nearest": (RoundToNearest, {}),
    "gptq": (GPTQ, {}),
    "finequant": (FineQuant, {}),
    "decoupleq": (DecoupleQ, {}),
    "qmoe": (QMoE, {}),
    "factors": (Factors, {}),
    "eora": (EoRA, {}),
    "svd": (EoRA, {"space": "plain"}),
    "act_s": (EoRA, {"space": "activation"}),
}


def make_methods(names: list[str], options: Mapping[str, Any]) -> tuple[Method, ...]:
    """The methods of a chain. Each takes the options that it has.

    Raises:
        UserError: no such method, with the nearest name; an option that none of them has; a value it can't be.
    """
    taken, methods = set(), []
    for name in names:
        if name not in METHODS:
            found = nearest(name, METHODS)
            hint = f"did you mean {found}?" if found else f"there are {', '.join(METHODS)}"
            raise UserError(f"no compression method {name!r}; {hint}")
        make, fixed = METHODS[name]
        own = {field.name for field in dataclasses.fields(make)} - set(fixed)
        taken |= own & set(options)
        methods.append(make(**fixed, **{key: value for key, value in options.items() if key in own}))
    if unused := [key for key in options if key not in taken]:
        raise UserError(f"{unused[0]}={options[unused[0]]}: none of {', '.join(names)} has this option")
    return tuple(methods)
