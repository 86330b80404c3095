"""Nested models from disk: the parameters together with the task that knows their granularities."""

import os

from ml_collections import ConfigDict

from research.config import build
from research.elastic.matformer import MatFormer, extract, parse_widths
from research.elastic.slicing import ElasticSpec
from research.errors import UserError
from research.paths import expand
from research.training.model_directory import CONFIG, EXPERIMENT, Loaded, read_config
from research.training.workdir import load_model


def load_nested(
    path: str | os.PathLike[str], step: int | None = None, ema: bool = False
) -> tuple[MatFormer, Loaded]:
    """The MatFormer task and the loaded model of a run or a model directory.

    Raises UserError if it was not trained as a MatFormer, or if `load_model` can't read it.
    """
    loaded = load_model(path, step, ema)
    file = expand(path) / (EXPERIMENT if loaded.step is None else CONFIG)
    node = read_config(file) if file.exists() else None
    while isinstance(node, ConfigDict):
        if node.get("cls") == f"{MatFormer.__module__}:{MatFormer.__qualname__}":
            return build(node), loaded
        node = node.get("task")
    raise UserError(
        f"{path} holds one width only: it was not trained as a MatFormer, so there is nothing to cut"
    )


def load_submodel(
    path: str | os.PathLike[str], widths: str, step: int | None = None, ema: bool = False
) -> tuple[Loaded, ElasticSpec]:
    """A submodel cut out of a nested model. `widths` as in `matformer.parse_widths`.

    The config of the result describes the smaller model, so it can be saved as a model of its own.
    """
    from research.config_capture import capture

    task, loaded = load_nested(path, step, ema)
    spec = parse_widths(widths, task)
    model, params = extract(loaded.model, loaded.params, spec)
    return Loaded(model, params, loaded.tokenizer, capture(model), loaded.step, loaded.inputs), spec
