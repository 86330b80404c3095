"""The programs train and evaluate, as a user runs them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import evaluate, train
from research.config import build, load_config
from research.errors import UserError
from research.training.profiling import Profile
from research.training.workdir import open_workdir

CONFIG = '''
"""A vision transformer of some thousand parameters on the digits, for a few steps."""
from research.config import of
from research.data.images import ImageDataset
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.training.task import Classification
from research.vision.vit import ViT

PRESETS = ("tiny",)


def get_config(preset="tiny"):
    attention = of(Attention, num_heads=2, head_dim=8, rule=of(Full))
    block = of(Block, attention=attention, mlp=of(GatedMLP, hidden_dim=32))
    model = of(ViT, num_classes=10, width=16, patch=4, num_layers=1, blocks=(block,))
    optimizer = of(adamw, schedule=of(constant, peak=3e-3))
    return of(
        Trainer,
        task=of(Classification, model=model, image_shape=(8, 8, 1)),
        data=of(ImageDataset, split="train"),
        stages=(of(Stage, name="train", steps=20, batch_size=16, optimizer=optimizer),),
        evaluators=(of(Evaluate, name="validation", data=of(ImageDataset, split="validation"), every=10),),
        checkpoint_every=10,
        log_every=5,
    )
'''


def logged(directory) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "digits.py").write_text(CONFIG)
    return "digits.py"


def test_a_run_continued_in_a_new_process_ends_in_the_same_bits(config, run_program, tmp_path):
    whole = run_program("train", f"--config={config}", "--workdir=whole", "--profile=7:2")
    assert whole.returncode == 0, whole.stderr
    # A trace changes nothing: the run is compared with one that has none.
    kinds = {
        path.name.partition(".")[2] for path in (tmp_path / "whole/profile").rglob("*") if path.is_file()
    }
    assert "steps up to 8 are traced" in whole.stderr
    assert {"json.gz", "xplane.pb"} <= {kind.rpartition("trace.")[2] for kind in kinds} | kinds, kinds
    half = run_program(
        "train", f"--config={config}", "--workdir=parts", "--config.stages.0.steps=10", "--quiet"
    )
    assert half.returncode == 0 and half.stderr == "", half.stderr
    assert [row["step"] for row in logged(tmp_path / "parts")] == [1, 5, 10, 10]
    rest = run_program("train", f"--config={config}", "--workdir=parts", "--baseline=whole")
    assert (tmp_path / "parts/figures/loss_against_parameters.png").stat().st_size > 1000
    assert "resuming after step 10" in rest.stderr
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")

    trainer = build(load_config(tmp_path / config))
    devices = jax.devices()[:1]
    states = [trainer.restore(tmp_path / name, devices=devices)[0] for name in ("whole", "parts")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    # What a person sees: the table, and figures that are images.
    assert re.search(r"validation\W+\d\.\d+\W+0?\.\d+", whole.stdout)
    figure = re.search(r"figure: (.*loss.png)", whole.stdout)[1]
    assert Path(figure).read_bytes()[:4] == b"\x89PNG"

    # The evaluation of the last checkpoint is the one that training logged, to the bit.
    result = run_program("evaluate", "--workdir=whole", "--json")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    (last,) = [r for r in logged(tmp_path / "whole") if r["kind"] == "eval" and r["step"] == 20]
    assert measured["step"] == 20
    assert {
        name: measured["results"]["validation"][""][name] for name in ("loss", "accuracy", "parameters")
    } == {name: last[name] for name in ("loss", "accuracy", "parameters")}


def test_a_workdir_of_another_config_is_refused(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = load_config(config)
    open_workdir("run", config).close()
    code = train.PROGRAM.call(train.main, ["--config=digits.py", "--workdir=run", "--config.seed=1"])
    message = capsys.readouterr().err
    assert code == 2
    assert re.fullmatch(r"error: .*seed is 0 there and 1 here.*\n", message), message


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        (train, ("--config=digits.py", "--config.clipp=1"), "config.clipp: unknown field of Trainer"),
        (
            train,
            ("--config=digits.py", "--config.mesh.fspd=2"),
            "mesh: unknown axis 'fspd'; did you mean 'fsdp'",
        ),
        (
            train,
            ("--config=digits.py", "--config.task.model.num_classes=5"),
            "num_classes of the model is 5, but the data of stage 'train' needs at least 10",
        ),
        (
            train,
            ("--config=digits.py", "--config.task.model.num_layers=0"),
            "num_layers is 0; training needs at least 1",
        ),
        (
            train,
            ("--config=digits.py", "--config.task.model.patch=0"),
            "ViT.patch is 0; it must be at least 1",
        ),
        (train, ("--config=digits.py", "--baseline=b"), "--baseline is drawn into a figure: it needs a"),
        (
            train,
            ("--config=digits.py", "--workdir=run", "--baseline=b"),
            "b/config.json does not exist",
        ),
        (
            train,
            ("--config=digits.py", "--export=huggingface"),
            "no family of transformers expresses this model: it is a ViT, not a plain DecoderLM",
        ),
        (train, ("--config=digits.py", "--profile=3"), "--profile=3: expected FIRST_STEP:STEPS"),
        (train, ("--config=digits.py", "--profile=3:1"), "a profile is written into the workdir"),
        (
            train,
            ("--config=digits.py", "--workdir=run", "--profile=100:3"),
            "--profile=100:3: none of these steps is to come; 0 of 20 steps are made",
        ),
        (evaluate, ("--workdir=nowhere",), "nowhere is not a workdir"),
    ],
)
def test_mistakes_end_in_one_line(config, tmp_path, monkeypatch, capsys, program, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert program.PROGRAM.call(program.main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and message in line


def test_a_profile_of_the_past_is_refused_unless_it_was_written(tmp_path):
    profile = Profile((7, 2), tmp_path / "profile")
    profile.check(7, 20)  # step 8 is to come
    with pytest.raises(
        UserError, match="--profile=7:2: none of these steps is to come; 8 of 20 steps are made"
    ):
        profile.check(8, 20)
    (tmp_path / "profile").mkdir()
    profile.check(8, 20)
