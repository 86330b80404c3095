"""The programs spans and generate with a plan: what they write and print, and mistakes in one line."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import generate, spans
from research.config import build, of
from research.data.tokenizer import Tokenizer
from research.decoding.generator import Generator
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.sparse.moa.plan import Plan, apply_plan
from research.training.workdir import load_model, save_model
from tests.programs import drawn

ROOT = Path(__file__).resolve().parents[2]


def save(path: Path, seed: int) -> Path:
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
    params = drawn(build(config), jnp.zeros((1, 1), jnp.int32), seed=seed)
    save_model(path, config, params, tokenizer)
    return path


def call(program, *argv: str) -> int:
    return program.PROGRAM.call(program.main, argv)


def test_a_plan_is_made_and_generates(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    directory, file = save(tmp_path / "model", 0), tmp_path / "plans" / "plan.json"
    # All three datasets of one length, so that two programs serve them.
    data = [f"--config.{name}.length=24" for name in ("calibration.0", "calibration.1", "validation")]
    small = [
        f"--config.{value}" for value in ("samples=2", "batch_size=2", "step=4", "points=2", "lower=0.5")
    ]
    arguments = ["--config=configs/moa.py:plan", f"--workdir={directory}", f"--output={file}", *data, *small]
    assert call(spans, *arguments) == 0
    out, err = capsys.readouterr()
    made = Plan.load(file)
    rules = ", ".join(
        f"{a:+d} {b:g} N: {s}" for (a, b), s in zip(made.rules[0], made.spans(24)[0], strict=True)
    )
    assert f"layer 0: {rules}\n" in out and "up to 24 tokens of prompt and output" in out
    assert "calibration at 24 tokens: 2 rows" in err and "integer program 4 of 4" in err

    using = [f"--workdir={directory}", f"--plan={file}", "--prompt=import os"]
    assert call(generate, *using, "--max_new_tokens=9") == 0
    out = capsys.readouterr().out
    loaded = load_model(directory)
    prompt = len(Generator(loaded.model, loaded.params, loaded.tokenizer).encode(["import os"])[0])
    model, params = apply_plan(loaded.model, loaded.params, made, prompt + 9)
    expected = Generator(model, params, loaded.tokenizer).generate(["import os"], max_new_tokens=9)
    assert out == expected.samples[0].text + "\n"

    for words, message in (
        ([*using, "--max_new_tokens=25"], "beyond the plan's lengths, at most 24"),
        ([f"--workdir={save(tmp_path / 'other', 1)}", *using[1:]], "with other parameters"),
    ):
        assert call(generate, *words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    file.write_text(json.dumps({"moa_plan": 99}))
    assert call(generate, *using) == 2 and "no MoA plan of this version" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/moa.py:tiny", "--output=x"], "builds a Trainer, not a Planner"),
        (["--config=configs/moa.py:plan"], "--output is required"),
        (["--config=configs/moa.py:plan", "--output=x", "--config.density=0"], "density=0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert call(spans, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
