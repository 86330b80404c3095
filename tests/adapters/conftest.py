"""A tiny decoder on disk, text of its vocabulary, and runs of adapters beside it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from research.config import build, of
from research.data.recall import Recall
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.transformer import Block
from research.training.loop import Trainer
from research.training.model_directory import save_model
from research.training.optimizers import adamw, constant
from research.training.stages import Stage

WIDTH, HIDDEN, VOCAB, LENGTH = 16, 32, 24, 16


def text(**fields: Any) -> ConfigDict:
    """Rows of text of the vocabulary, 16 tokens each."""
    sizes = dict(length=LENGTH, pairs=2, queries=2, keys=8, values=8, fillers=8)
    return of(Recall, **{**sizes, **fields})


@pytest.fixture(scope="package")
def base(tmp_path_factory) -> str:
    """A model directory of two layers of width 16."""
    attention = of(Attention, num_heads=2, head_dim=8, rotary=None)
    config = of(
        DecoderLM,
        blocks=(
            of(
                Block,
                attention=attention,
                mlp=of(GatedMLP, hidden_dim=HIDDEN),
                norm=of(RMSNorm, epsilon=1e-3),
            ),
        ),
        num_layers=2,
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=64,
    )
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    directory = tmp_path_factory.mktemp("adapters") / "base"
    save_model(directory, config, params)
    return str(directory)


def stage(steps: int, **fields: Any) -> ConfigDict:
    optimizer = of(adamw, schedule=of(constant, peak=1e-2), weight_decay=0.0)
    fields = {"name": "adapter", "optimizer": optimizer, "trainable": ("^adapter/",)} | fields
    return of(Stage, steps=steps, batch_size=8, **fields)


def trainer(task: ConfigDict, *stages: ConfigDict, **fields: Any) -> ConfigDict:
    return of(Trainer, task=task, data=text(), stages=stages, **fields)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its config, workdir, trainer and last state."""

    config: ConfigDict
    workdir: Path
    trainer: Trainer
    state: Any


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Callable[..., Run]:
    """Trains a config in a workdir of its own, on one device."""
    from research.training.workdir import open_workdir

    def train(config: ConfigDict) -> Run:
        folder = tmp_path_factory.mktemp("runs") / "run"
        made = build(config)
        with open_workdir(folder, config) as workdir:
            state, _ = made.train(workdir, progress=False, devices=jax.devices()[:1])
        return Run(config, folder, made, state)

    return train
