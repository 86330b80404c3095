"""Tiny checkpoints of transformers' kind, made without torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.interop.families import read_config
from research.interop.huggingface import save
from research.interop.names import shapes
from research.language.decoder import DecoderLM
from research.training.paths import nested

SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def model_of() -> Callable[..., DecoderLM]:
    """The model that `config.json` of a family describes: `model_of("llama", mlp_bias=True)`."""

    def make(model_type: str, **options: Any) -> DecoderLM:
        return read_config({"model_type": model_type, **SIZES, **options}, "config.json")[1]

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[[DecoderLM], dict[str, Any]]:
    """Normal random float32 parameters of a model."""

    def make(model: DecoderLM) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        leaves = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes(model).items()}
        return nested(leaves)

    return make


@pytest.fixture
def checkpoint(tmp_path, model_of, random_params) -> Path:
    """A Llama directory of one safetensors file."""
    model = model_of("llama", tie_word_embeddings=True)
    save(model, {"params": random_params(model)}, tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def edit() -> Callable[..., None]:
    """Changes entries of a JSON file; None removes one."""

    def change(path: Path, **entries: Any) -> None:
        content = {**json.loads(path.read_text()), **entries}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change
