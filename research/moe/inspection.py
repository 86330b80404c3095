"""Looking at routers from outside: who went where, and how settled the routers are."""

import os
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from research.errors import UserError
from research.moe.losses import agreement
from research.moe.routing import Routing
from research.nn.transformer import LayerStack, unscan_layers
from research.training.workdir import load_model

PyTree = Any


def routings(model: LayerStack, params: PyTree, *args: Any, **keywords: Any) -> dict[str, Routing]:
    """{"layer_0/mlp": the choices of that layer, ...} of one call of the model; N tokens are those of the batch, in
    its order. Raises `UserError` if nothing in the model routes."""
    model, params = unscan_layers(model, params)
    _, kept = model.apply({"params": params}, *args, mutable=["intermediates"], **keywords)
    flat = traverse_util.flatten_dict(kept.get("intermediates", {}))
    found = {"/".join(path[:-1]): values[0] for path, values in flat.items() if path[-1] == "routing"}
    if not found:
        raise UserError(
            f"no layer of {type(model).__name__} routes its tokens, so there is nothing to look at"
        )
    return found


def router_agreement(
    workdir: str | os.PathLike[str], *args: Any, **keywords: Any
) -> dict[str, list[tuple[int, float]]]:
    """{"layer_0/mlp": [(step, share), ...]}: the share of choices that a checkpoint of a run has in common with the
    checkpoint before it, on the same call of the model. Early in training routers move; at its end near 1.

    Raises `UserError` if the run has kept fewer than two checkpoints (`keep_last`, `checkpoint_every`).
    """
    names = (folder.name for folder in (Path(workdir) / "checkpoints").glob("*"))
    steps = sorted(int(name) for name in names if name.isdecimal())
    if len(steps) < 2:
        raise UserError(
            f"{workdir}: {len(steps)} checkpoints are kept, and two are compared; raise keep_last"
        )
    loaded = load_model(workdir, steps[0])
    look = jax.jit(lambda params: routings(loaded.model, params, *args, **keywords))
    shares: dict[str, list[tuple[int, float]]] = {}
    before = look(loaded.params)
    for step in steps[1:]:
        after = look(load_model(workdir, step).params)
        for name, routing in after.items():
            shares.setdefault(name, []).append((step, float(agreement(routing, before[name]))))
        before = after
    return shares
