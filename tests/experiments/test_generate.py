"""The program generate: what it prints, and its mistakes in one line."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import generate
from research.config import build, of
from research.data.tokenizer import Tokenizer
from research.decoding.correction import Correction
from research.decoding.generator import Generator
from research.decoding.sampling import Sampling
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.moe.scmoe import self_contrast
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.sparse.gathered import gathered
from research.sparse.selectors import Newest
from research.training.workdir import load_model, save_model
from tests.programs import drawn


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model directory with an untrained decoder of a few thousand parameters and a context of 32."""
    path = tmp_path_factory.mktemp("model") / "base"
    tokenizer = Tokenizer.load()
    attention = of(Attention, num_heads=2, head_dim=4, rotary=of(Rotary))
    config = of(
        DecoderLM,
        blocks=(of(Block, attention=attention, mlp=of(GatedMLP, hidden_dim=16)),),
        num_layers=1,
        vocab_size=tokenizer.vocab_size,
        width=8,
        max_length=32,
    )
    params = drawn(build(config), jnp.zeros((1, 1), jnp.int32))
    save_model(path, config, params, tokenizer)
    return path


def call(*argv: str) -> int:
    return generate.PROGRAM.call(generate.main, argv)


def test_streams_the_continuation(directory, capsys):
    assert call(f"--workdir={directory}", "--prompt=import os", "--max_new_tokens=9") == 0
    out, err = capsys.readouterr()
    loaded = load_model(directory)
    expected = Generator(loaded.model, loaded.params, loaded.tokenizer).generate(
        ["import os"], max_new_tokens=9
    )
    assert out == expected.samples[0].text + "\n"
    assert re.search(r"9 new in 9 calls, ended by length; \d+ tokens/s", err)


def test_prompts_and_samples(directory, capsys, tmp_path):
    (tmp_path / "prompt.py").write_text("x = ")
    arguments = [f"--workdir={directory}", "--prompt=import os", f"--prompt_file={tmp_path / 'prompt.py'}"]
    arguments += ["--samples=2", "--temperature=0.8", "--top_k=50", "--seed=3", "--max_new_tokens=5"]
    assert call(*arguments) == 0
    out = capsys.readouterr().out
    loaded = load_model(directory)
    generator = Generator(loaded.model, loaded.params, loaded.tokenizer)
    samples = generator.generate(
        ["import os", "x = "], max_new_tokens=5, samples=2, seed=3, sampling=Sampling(0.8, top_k=50)
    ).samples
    assert out == "".join(f"{generate.heading(s.prompt, s.sample)}\n{s.text}\n" for s in samples)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=x", "--temperature=-1"], "temperature must be 0 (greedy) or a positive number, not -1.0"),
        (["--prompt=x", "--temperature=1", "--top_p=1.5"], "top_p must be above 0 and at most 1, not 1.5"),
        (["--prompt=x", "--top_k=5"], "top_k=5 changes nothing at temperature 0"),
        (
            ["--prompt=x", "--seed=4294967296"],
            "--seed=4294967296: 4294967296 is not an integer in the range [0, 4294967295]",
        ),
        (["--prompt=x", "--samples=3"], "3 samples at temperature 0"),
        (["--prompt=x", "--max_new_tokens=0"], "max_new_tokens must be at least 1, not 0"),
        (["--prompt=x", "--stop="], "a stop string is empty"),
        (
            ["--prompt=" + "x y " * 40],
            "tokens and the model's context is 32: at most 31 leave room for output",
        ),
        (["--prompt=x", "--tempreature=1"], "unknown flag --tempreature; did you mean --temperature?"),
        (["--prompt_file=absent.txt"], "--prompt_file=absent.txt: No such file or directory"),
        ([], "no prompt: give --prompt=TEXT"),
        (["--prompt=x", "--workdir=absent"], "absent"),
    ],
)
def test_mistakes_are_one_line(directory, capsys, flags, message):
    workdir = [] if any(flag.startswith("--workdir") for flag in flags) else [f"--workdir={directory}"]
    assert call(*workdir, *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_directory_of_hugging_face_is_sent_to_convert(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["Q"], "model_type": "qwen2", "rope_scaling": null}'
    )
    for file in ("model-00001-of-00002.safetensors", "model.safetensors"):  # in shards, then as one file
        (tmp_path / file).touch()
        assert call(f"--workdir={tmp_path}", "--prompt=x") == 2
        expected = (
            f"is of Hugging Face: python -m experiments.convert --from={tmp_path} --to=FOLDER --format=lathe"
        )
        assert expected in capsys.readouterr().err


def test_reads_standard_input(directory):
    command = [sys.executable, "-m", "experiments.generate", f"--workdir={directory}", "--prompt=-"]
    root = Path(generate.__file__).parent.parent
    run = subprocess.run(
        [*command, "--max_new_tokens=3"],
        input="import os",
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    loaded = load_model(directory)
    expected = Generator(loaded.model, loaded.params, loaded.tokenizer).generate(
        ["import os"], max_new_tokens=3
    )
    assert run.stdout == expected.samples[0].text + "\n"


def test_contrast_of_a_mixture(tmp_path, capsys):
    tokenizer = Tokenizer.load()
    block = of(
        Block,
        attention=of(Attention, num_heads=2, head_dim=4, rotary=of(Rotary)),
        mlp=of(MoE, num_experts=4, k=2, hidden_dim=8),
    )
    config = of(
        DecoderLM, blocks=(block,), num_layers=1, vocab_size=tokenizer.vocab_size, width=8, max_length=32
    )
    params = drawn(build(config), jnp.zeros((1, 1), jnp.int32))
    save_model(tmp_path / "mixture", config, params, tokenizer)
    base = [f"--workdir={tmp_path / 'mixture'}", "--prompt=import os", "--max_new_tokens=6"]
    assert call(*base, "--contrast=2", "--contrast_beta=0.9", "--drafter=prompt_lookup") == 0
    model, params = self_contrast(build(config), params, weak=(1,), beta=0.9)
    expected = Generator(model, params, tokenizer).generate(["import os"], max_new_tokens=6).samples[0].text
    assert capsys.readouterr().out == expected + "\n"
    for wrong, message in (
        (["--contrast=0"], "--contrast=0: a rank from 1"),
        (["--contrast=5"], "ranks from 0 to 3 are expected"),
        (["--contrast_beta=1"], "are of --contrast"),
        (["--contrast=2", "--drafter=submodel"], "prompt_lookup and iad do"),
    ):
        assert call(*base, *wrong) == 2
        assert message in capsys.readouterr().err


def test_sparse_decoding(directory, capsys):
    base = [f"--workdir={directory}", "--prompt=import os", "--max_new_tokens=6"]
    assert call(*base, "--sparse=newest:k=4,sinks=1,dense=0", "--sparse_correct=2") == 0
    loaded = load_model(directory)
    model, params = gathered(loaded.model, loaded.params, Newest(4, sinks=1, dense=0))
    generator = Generator(model, params, loaded.tokenizer, correction=Correction(loaded.model, 2))
    expected = generator.generate(["import os"], max_new_tokens=6).samples[0].text
    assert capsys.readouterr().out == expected + "\n"
    for wrong, message in (
        (["--sparse=tidal:k=4,select=0"], "no layer of this DecoderLM is left"),
        (["--sparse=tidal"], "tidal needs k"),
        (["--sparse_correct=2"], "is of --sparse"),
    ):
        assert call(*base, *wrong) == 2
        assert message in capsys.readouterr().err
