"""The convert program: both directions, and its mistakes in one line."""

import jax
import numpy as np
import pytest

from experiments import convert
from research.config_capture import capture
from research.data.tokenizer import Tokenizer
from research.elastic.slicing import ElasticSpec, slice_model, slice_params
from research.interop import huggingface
from research.interop.families import read_config
from research.training.workdir import load_model, save_model
from tests.programs import drawn

ENTRIES = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model directory with a tokenizer."""
    _, model = read_config(ENTRIES, "config.json")
    params = drawn(model, np.zeros((1, 2), np.int32))
    directory = tmp_path_factory.mktemp("convert") / "trained"
    save_model(directory, capture(model), params, Tokenizer.load())
    return directory


def run(*arguments):
    return convert.PROGRAM.call(convert.main, [str(argument) for argument in arguments])


def test_there_and_back(trained, tmp_path, monkeypatch, capsys):
    assert run(f"--from={trained}", f"--to={tmp_path / 'hf'}", "--format=huggingface") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'hf'}: qwen2, ")
    assert huggingface.is_huggingface(tmp_path / "hf") and not huggingface.is_huggingface(trained)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert huggingface.is_huggingface("~/hf")
    assert run("--from=~/hf", "--to=~/back", "--format=lathe") == 0
    before, after = load_model(trained), load_model(tmp_path / "back")
    assert after.model == before.model and after.tokenizer.fingerprint == before.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_cut_models_and_dtypes(trained, tmp_path, capsys):
    loaded = load_model(trained)
    spec = ElasticSpec((0, 1), (6, 12))
    save_model(tmp_path / "cut", capture(slice_model(loaded.model, spec)), slice_params(loaded.params, spec))
    arguments = (f"--from={tmp_path / 'cut'}", f"--to={tmp_path / 'out'}", "--format=huggingface")
    assert run(*arguments, "--unequal=refuse") == 2
    assert "FFN widths 6, 12 differ between layers" in capsys.readouterr().err
    assert run(*arguments, "--dtype=bfloat16") == 0
    assert "FFN widths 6, 12 are zero-padded to 12" in capsys.readouterr().out
    stored = jax.tree.leaves(huggingface.load(tmp_path / "out", dtype=None)[1])
    assert {str(leaf.dtype) for leaf in stored} == {"bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to=x", "--format=lathe"), "--from is required"),
        (("--from={0}", "--to=x", "--format=gguf"), "--format=gguf: value should be one of"),
        (
            ("--from={0}", "--to=x", "--format=lathe", "--unequal=pad"),
            "--unequal is for --format=huggingface",
        ),
        (("--from=nowhere", "--to=x", "--format=lathe"), "nowhere does not exist"),
        (("--from={0}", "--to={0}", "--format=huggingface"), "trained exists already; name a new directory"),
        (("--from={0}", "--to={0}", "--format=lathe"), "trained exists already; name a new directory"),
        (("--from={0}", "--to=x", "--format=lathe", "--ema"), "no moving average"),
    ],
)
def test_mistakes_end_in_one_line(trained, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*(argument.format(trained) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
