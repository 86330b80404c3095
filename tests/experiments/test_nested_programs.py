"""The programs around a nested model: demo, extract, evaluate, generate and ship, and their mistakes in one line."""

import json
import lzma
import os
import random
import shutil

import jax
import numpy as np
import pytest

from experiments import demo, evaluate, extract, generate, ship, train
from research.config import of, to_json
from research.data.text import TokenDataset
from research.elastic.matformer import MatFormer
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import load_model


def experiment(text: str):
    """Two layers of FFN width 16 on text files, four updates."""
    block = of(
        Block,
        attention=of(Attention, num_heads=2, head_dim=4, rotary=of(Rotary)),
        mlp=of(GatedMLP, hidden_dim=16),
    )
    model = of(DecoderLM, vocab_size=4096, width=8, max_length=96, num_layers=2, blocks=(block,))
    held_out = of(TokenDataset, sources=text, split="test", length=32, shuffle=False)
    return of(
        Trainer,
        task=of(MatFormer, task=of(LanguageModelling, model=model), training="sampled"),
        data=of(TokenDataset, sources=text, split="train", length=32),
        stages=(
            of(Stage, name="s", steps=4, batch_size=8, optimizer=of(adamw, schedule=of(constant, peak=1e-3))),
        ),
        evaluators=(of(Evaluate, name="test", data=held_out, batch_size=8),),
        mesh={"data": 8},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a finished demo, and the text it read."""
    folder = tmp_path_factory.mktemp("nested")
    words = ["def", "return", "class", "import", "for", "in", "if", "else", "self", "yield"]
    draw = random.Random(0)
    for split, lines in (("train", 80), ("test", 20)):
        text = "\n".join(" ".join(draw.choices(words, k=8)) for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)
    config = folder / "config.json"
    config.write_text(to_json(experiment(str(folder / "{split}.txt"))))
    call(demo, f"--workdir={folder / 'demo'}", f"--config={config}", "--prompt=def")
    return folder


def call(program, *arguments: str) -> None:
    assert program.PROGRAM.call(program.main, list(arguments)) == 0


def fails(program, *arguments: str) -> None:
    assert program.PROGRAM.call(program.main, list(arguments)) == 2


def test_demo_reports_every_model_and_repeats_for_nothing(made, capsys):
    report = (made / "demo" / "README.md").read_text()
    # 3 neighbours x 2 layers + 1 models: S, then two for each step to the next granularity.
    for name in ("S", "S,M", "M", "M,L", "L", "L,XL", "XL"):
        assert f"| {name} | " in report
    assert (made / "demo" / "trade_off.png").stat().st_size > 1000
    assert "Greedy decoding with M" in report
    before = (made / "demo" / "run" / "metrics.jsonl").read_text()
    call(demo, f"--workdir={made / 'demo'}", f"--config={made / 'config.json'}", "--prompt=def")
    assert (made / "demo" / "run" / "metrics.jsonl").read_text() == before


def test_extracted_models_are_the_slices(made, tmp_path):
    whole = load_model(made / "demo" / "run").params
    call(extract, f"--workdir={made / 'demo' / 'run'}", "--widths=-,L", f"--to={tmp_path / 'cut'}")
    cut = load_model(tmp_path / "cut").params
    assert "layer_1" not in cut  # one layer is left, and it is called layer_0
    # L is half of 16 units.
    np.testing.assert_array_equal(
        cut["layer_0"]["mlp"]["up"]["kernel"], whole["layer_1"]["mlp"]["up"]["kernel"][:, :8]
    )
    np.testing.assert_array_equal(
        cut["layer_0"]["mlp"]["down"]["kernel"], whole["layer_1"]["mlp"]["down"]["kernel"][:8]
    )


def test_evaluate_and_generate_take_submodels(made, capsys):
    run = f"--workdir={made / 'demo' / 'run'}"
    call(evaluate, run, "--json")
    granularities = json.loads(capsys.readouterr().out)["results"]["test"]
    call(evaluate, run, "--json", "--widths=S", "--widths=S,XL")
    submodels = json.loads(capsys.readouterr().out)["results"]["test"]
    assert submodels["S"]["loss"] == granularities["S"]["loss"]
    # One layer grows from 2 to 16 units of 3 vectors of width 8: 14 * 3 * 8.
    assert submodels["S,XL"]["parameters"] == granularities["S"]["parameters"] + 336
    call(generate, run, "--prompt=def", "--widths=S", "--max_new_tokens=3")
    by_widths = capsys.readouterr().out
    call(extract, run, "--widths=S", f"--to={made / 'S'}")
    capsys.readouterr()
    call(generate, f"--workdir={made / 'S'}", "--prompt=def", "--max_new_tokens=3")
    assert capsys.readouterr().out == by_widths


def test_ship_rounds_measures_and_compares(made, capsys):
    call(ship, f"--workdir={made / 'demo' / 'run'}", f"--to={made / 'base'}")
    capsys.readouterr()
    text = (made / "test.txt").read_bytes()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    card = (made / "base" / "README.md").read_text()
    assert f"| xz -9e | | | {xz:.4f} | |" in card and f"({len(text):,} bytes" in card
    shipped, whole = load_model(made / "base"), load_model(made / "demo" / "run")
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), whole.params)
    jax.tree.map(np.testing.assert_array_equal, shipped.params, rounded)
    # The granularities travel with the weights.
    call(extract, f"--workdir={made / 'base'}", "--widths=M", f"--to={made / 'base_M'}")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (
            extract,
            ["--widths=12"],
            "error: width '12' of layer 0 is not a granularity: S (2), M (4), L (8), XL (16); nearest",
        ),
        (extract, ["--widths=S,M,L"], "error: --widths names 3 layers, the model has 2"),
        (evaluate, ["--widths=Q"], "error: width 'Q' of layer 0 is not a granularity"),
        (
            evaluate,
            ["--like=elsewhere"],
            "is no model directory, and says itself what to measure on: no --like",
        ),
        (generate, ["--prompt=def", "--widths=3"], "error: width '3' of layer 0 is not a granularity"),
        (generate, ["--prompt=" + "def " * 200], "context"),
    ],
)
def test_mistakes_end_in_one_line(made, tmp_path, capsys, program, arguments, message):
    extra = [f"--to={tmp_path / 'x'}"] if program is extract else []
    fails(program, f"--workdir={made / 'demo' / 'run'}", *arguments, *extra)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_only_nested_models_are_cut(made, tmp_path, capsys):
    call(extract, f"--workdir={made / 'demo' / 'run'}", "--widths=S", f"--to={tmp_path / 'plain'}")
    capsys.readouterr()
    fails(extract, f"--workdir={tmp_path / 'plain'}", "--widths=S", f"--to={tmp_path / 'again'}")
    assert "was not trained as a MatFormer" in capsys.readouterr().err
    fails(extract, "--widths=S", f"--to={tmp_path / 'plain'}")
    assert "plain exists already; name a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluators", "prompt", "message"),
    [
        (0, "def", "config.json has 0 evaluators; the report is of exactly one"),
        (2, "def", "config.json has 2 evaluators; the report is of exactly one"),
        (1, "def " * 200, "tokens; from 1 to 95 fit in the model's context"),
    ],
)
def test_the_demo_checks_before_it_trains(tmp_path, capsys, evaluators, prompt, message):
    config = experiment("absent.txt")
    evaluator = config.evaluators[0]
    config.evaluators = tuple(of(Evaluate, name=str(i), data=evaluator.data) for i in range(evaluators))
    (tmp_path / "config.json").write_text(to_json(config))
    fails(demo, f"--workdir={tmp_path / 'x'}", f"--config={tmp_path / 'config.json'}", f"--prompt={prompt}")
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("content", "message"), [(None, "no file matches"), ("", "no text")])
def test_training_names_missing_and_empty_data(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "train.txt").write_text(content)
    (tmp_path / "config.json").write_text(to_json(experiment(str(tmp_path / "train.txt"))))
    fails(train, f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'x'}")
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_damaged_checkpoint_is_named(made, tmp_path, capsys):
    run = shutil.copytree(made / "demo" / "run", tmp_path / "run")
    largest = max((run / "checkpoints").rglob("*"), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    for program, *more in ((evaluate,), (train, f"--config={made / 'config.json'}", "--quiet")):
        fails(program, f"--workdir={run}", *more)
        error = capsys.readouterr().err
        assert "checkpoints/4 is damaged: " in error and largest.name in error, error
        assert error.splitlines()[-1].startswith(f"error: no checkpoint in {run / 'checkpoints'} can be read")
