"""Programs around drafters: using one, writing one, comparing them; and what their claims share."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import drafter as writer
from experiments import generate
from experiments import train as training
from experiments.bench import __main__ as bench
from experiments.bench import drafters, drafters_page
from experiments.claims import drafting
from research.config import build, of, to_json
from research.data.text import TokenDataset
from research.data.tokenizer import train as train_tokenizer
from research.decoding.generator import Generator
from research.decoding.speculative.loading import load_drafter
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.training import DrafterTraining
from research.decoding.speculative.trees import RankTree, chain_paths
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.training.workdir import load_model, save_model
from tests import programs

CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """target/: a byte-level decoder without training; text.txt; drafting.json: a config that trains a Medusa."""
    path = tmp_path_factory.mktemp("drafters")
    (path / "text.txt").write_text("".join(f"the line number {i} of a text\n" for i in range(99)))
    block = of(
        Block,
        attention=of(Attention, num_heads=2, head_dim=8, rotary=of(Rotary)),
        mlp=of(GatedMLP, hidden_dim=20),
    )
    model = of(DecoderLM, blocks=(block,), num_layers=1, vocab_size=259, width=16, max_length=CONTEXT)
    params = jax.jit(build(model).init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    save_model(path / "target", model, params, train_tokenizer([], vocab_size=259))
    drafter = of(Medusa, tree=of(RankTree, paths=chain_paths(2)), num_heads=2)
    stage = of(
        Stage,
        name="heads",
        steps=2,
        batch_size=8,
        optimizer=of(adamw, schedule=of(constant, peak=1e-3)),
        trainable=("^drafter/",),
    )
    config = of(
        Trainer,
        task=of(DrafterTraining, drafter=drafter, target=str(path / "target")),
        data=of(
            TokenDataset,
            sources=str(path / "text.txt"),
            split="all",
            length=16,
            tokenizer=str(path / "target" / "tokenizer.json"),
        ),
        stages=(stage,),
    )
    (path / "drafting.json").write_text(to_json(config))
    return path


@pytest.fixture(scope="module")
def run(folder) -> Path:
    argv = [
        f"--config={folder / 'drafting.json'}",
        f"--workdir={folder / 'medusa'}",
        "--quiet",
        "--nofigures",
    ]
    assert training.PROGRAM.call(training.main, argv) == 0
    return folder / "medusa"


def call(program, *argv: str) -> int:
    return program.PROGRAM.call(program.main, argv)


def test_training_says_how_to_use_the_drafter(folder, run, capsys):
    argv = [f"--config={folder / 'drafting.json'}", f"--workdir={run}", "--quiet", "--nofigures"]
    assert call(training, *argv) == 0  # it is complete already
    out = capsys.readouterr().out
    assert f"use it: python -m experiments.generate --drafter={run} --prompt=" in out


@pytest.mark.parametrize("drafter", ["run", "prompt_lookup", "target"])
def test_generate_says_the_same_with_a_drafter(folder, run, capsys, drafter):
    names = {"run": str(run), "target": str(folder / "target")}
    options = ["--prompt=of a text of a", "--max_new_tokens=12"]
    assert call(generate, f"--workdir={folder / 'target'}", *options) == 0
    expected = capsys.readouterr().out
    # A run knows its target.
    workdir = [] if drafter == "run" else [f"--workdir={folder / 'target'}"]
    name = names.get(drafter, drafter)
    assert call(generate, *workdir, *options, f"--drafter={name}") == 0
    out, err = capsys.readouterr()
    assert out == expected
    line = re.search(rf"{re.escape(name)}: (\S+) tokens a call, (\d+) drafted, (\d+) of them wasted", err)
    per_call, drafted, wasted = float(line[1]), int(line[2]), int(line[3])
    assert per_call >= 1 and drafted >= wasted
    if drafter == "target":  # it drafts for itself: all is kept but what the limit cut off
        assert per_call > 3


def test_generate_with_typical_acceptance(run, capsys):
    options = ["--prompt=of a text", "--max_new_tokens=8", "--temperature=1", f"--drafter={run}"]
    assert call(generate, *options, "--acceptance=typical") == 0
    assert "tokens a call" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drafter=promt_lookup"], "no drafter promt_lookup; did you mean prompt_lookup?"),
        (
            ["--drafter=absent"],
            "no drafter absent; give a run, a drafter directory, or prompt_lookup, ",
        ),
        (["--acceptance=typical"], "--acceptance=typical judges drafts: it needs a --drafter"),
        (
            ["--drafter=RUN", "--acceptance=typical"],
            "--acceptance=typical is for sampling: give a --temperature",
        ),
        (["--drafter=RUN", "--prompt="], "prompt 2 is empty: give at least one character"),
        (["--drafter=RUN", "--prompt=" + "x" * 99], "prompt 2 has 100 tokens and the model's context is 64"),
        (
            ["--drafter=RUN", "--temperature=-0.5"],
            "temperature must be 0 (greedy) or a positive number, not -0.5",
        ),
        (["--drafter=RUN", "--max_new_tokens=0"], "max_new_tokens must be at least 1, not 0"),
        (["--drafter=RUN", "--samples=2"], "2 samples at temperature 0 would be copies of one"),
        (["--drafter=RUN", "--workdir=OTHER"], "was trained for another target"),
        (
            ["--drafter=RUN", "--workdir=BASE"],
            "drafts from a vocabulary of 259 tokens, and the target has 4096",
        ),
        (["--drafter=BASE"], "the draft model has a vocabulary of 4096 and the target of 259"),
        (["--drafter=submodel"], "has no first 1/8 to draft with"),
    ],
)
def test_mistakes_are_one_line(folder, run, capsys, flags, message):
    other = folder / "other"
    if not other.exists():
        loaded = load_model(folder / "target")
        shifted = jax.tree.map(lambda x: np.asarray(x) + np.float32(1e-3), loaded.params)
        save_model(other, loaded.config, shifted, loaded.tokenizer)
    places = {"RUN": run, "OTHER": other, "BASE": "package:language/base"}
    if "--drafter=BASE" in flags:
        places["BASE"] = Path(generate.__file__).parent.parent / "research" / "language" / "base"
    if not any(flag.startswith("--workdir") for flag in flags):
        flags = [*flags, f"--workdir={folder / 'target'}"]
    for name, place in places.items():
        flags = [flag.replace(f"={name}", f"={place}") for flag in flags]
    assert call(generate, "--prompt=x", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_drafter_written_with_a_tree_that_fits(folder, run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LATHE_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "texts").mkdir()
    text = " ".join(f"word{i}" for i in range(500))
    for i in range(60):  # so many that some of them are in the validation split
        (tmp_path / "texts" / f"{i}.txt").write_text(text[i * 10 :])
    options = ["--nodes=4", "--rows=16", "--length=40", f"--sources={tmp_path / 'texts'}"]
    assert call(writer, f"--drafter={run}", f"--output={tmp_path / 'saved'}", *options) == 0
    out = capsys.readouterr().out
    assert re.search(r"expected tokens a call: \S+ with the 3 nodes it has, \S+ with these 4", out)
    target = load_model(folder / "target")
    before, after = load_drafter(run, target), load_drafter(tmp_path / "saved", target)
    assert after.proposer.size == 4 and after.identity == before.identity
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    prompt = ["of a text"]
    fields = dict(proposer=after.proposer, proposer_params=after.params)
    found = Generator(target.model, target.params, target.tokenizer, **fields).generate(
        prompt, max_new_tokens=8
    )
    plain = Generator(target.model, target.params, target.tokenizer).generate(prompt, max_new_tokens=8)
    assert found.samples == plain.samples
    assert call(writer, f"--drafter={run}") == 2
    assert "nothing to do: give --output=FOLDER, --nodes=N, or both" in capsys.readouterr().err
    assert call(writer, "--drafter=prompt_lookup", "--output=x") == 2
    assert "prompt_lookup is no trained drafter" in capsys.readouterr().err


def test_the_bench_of_drafters(folder, run, monkeypatch, tmp_path, capsys):
    questions = [
        {"category": c, "turns": [f"{c} {i}?", "and?"]} for c in ("maths", "writing") for i in range(5)
    ]
    questions.append({"category": "maths", "turns": ["x" * 200]})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    texts = [list(range(3 + i, 3 + i + 30)) for i in range(8)]
    monkeypatch.setattr(drafting, "prompts", lambda kind, count, tokenizer: texts[:count])
    monkeypatch.setattr(drafters, "HELD_OUT", 8)
    lines: list[str] = []
    found = drafters.run(
        ["prompt_lookup", str(folder / "target"), str(run)],
        str(folder / "target"),
        str(path),
        runs=str(tmp_path / "runs"),
        count=6,
        new_tokens=8,
        held_out=8,
        figure=str(tmp_path / "figure.png"),
        report=lines.append,
    )
    kinds = [*drafting.KINDS, "maths", "writing"]
    assert [(row.drafter, row.kind) for row in found.rows] == [
        (name, kind) for name in ("prompt_lookup", "target", "medusa") for kind in kinds
    ]
    assert all(row.equal == 1 and row.tokens_per_call >= 1 for row in found.rows)
    assert all(row.speed == row.plain_seconds / row.seconds > 0 for row in found.rows)
    ideal = [row for row in found.rows if row.drafter == "target"]
    # 7 tokens after prefill: a call of 4 + 1, and one of which the limit leaves 2.
    assert all(row.calls == 2 * (5 if row.kind == "writing" else 6) for row in ideal)
    assert all(row.tokens_per_call == 3.5 for row in ideal)
    assert all(row.best_speed > 0 for row in found.rows)
    assert found.held_out == 8 and found.differences == {"prompt_lookup": [], "target": [], "medusa": []}
    assert f"{path}: of 1 prompts only the last 56 tokens fit the context" in lines
    assert sum("all 8 held-out prompts" in line for line in lines) == 3
    assert (tmp_path / "figure.png").stat().st_size > 5000
    json.dumps(found.as_dict())


def test_updates_are_shared_out_in_proportion(folder, tmp_path):
    """The config has one stage of 2 updates; here it gets another one of 4."""
    config = json.loads((folder / "drafting.json").read_text())
    (stages,) = config["stages"].values()
    stages.append({**stages[0], "name": "more", "steps": 4})
    (tmp_path / "two.json").write_text(json.dumps(config))
    lines: list[str] = []
    run = drafters.train(str(tmp_path / "two.json"), str(folder / "target"), str(tmp_path), lines.append, 2)
    assert lines == [f"{tmp_path / 'two.json'}: 3 steps in {run}, fewer where it has begun"]
    assert [
        x["steps"] for x in json.loads((Path(run) / "config.json").read_text())["stages"]["__tuple__"]
    ] == [1, 2]


def test_targets_that_are_grown():
    grown = drafters.open_target("grown:40M")
    assert (grown.model.width, grown.model.num_layers) == (512, 10)
    with pytest.raises(UserError, match="--target=grown:20M: a width of 256 does not double to 384"):
        drafters.open_target("grown:20M")
    with pytest.raises(UserError, match="no size 'big'; there are"):
        drafters.open_target("grown:big")
    with pytest.raises(
        UserError, match="--target=grown:40M is no path: train configs/medusa.py for a model dir"
    ):
        drafters.train("configs/medusa.py", "grown:40M", "runs", print)


def test_the_bench_in_bfloat16(folder, monkeypatch, tmp_path):
    texts = [list(range(3 + i, 3 + i + 30)) for i in range(8)]
    monkeypatch.setattr(drafting, "prompts", lambda kind, count, tokenizer: texts[:count])
    lines: list[str] = []
    options = dict(count=4, new_tokens=8, held_out=8, dtype="bfloat16", report=lines.append)
    (tmp_path / "result.json").write_text(json.dumps({"rows": [{"drafter": "eagle", "kind": "code"}]}))
    with pytest.raises(UserError, match="also has eagle"):  # before anything is trained or decoded
        drafters.run(["no_such.py"], str(folder / "target"), replaces=tmp_path, **options)
    found = drafters.run(["prompt_lookup"], str(folder / "target"), **options)
    assert set(found.differences) == {"prompt_lookup", "prompt_lookup, one token a call"}
    assert found.differences["prompt_lookup, one token a call"] == []
    assert "identical to one token a call in the same program" in lines[-1]


def test_differences_are_reported_with_their_gap(folder):
    loaded = load_model(folder / "target")
    plain = Generator(loaded.model, loaded.params, ends=(2,))
    prompts = [[5, 6, 7], [8, 9]]
    expected = drafters.in_batches(plain, prompts, 4)
    wrong = [list(row) for row in expected]
    wrong[1][2] = (wrong[1][2] + 1) % 259
    text = np.asarray([[*prompts[1], *expected[1][:2]]])
    logits = np.asarray(programs.call(loaded.model, loaded.params, text))[0, -1]
    (found,) = drafters.compare(plain, prompts, expected, wrong)
    assert (found.prompt, found.place) == (1, 2)
    assert (
        found.gap == pytest.approx(logits[expected[1][2]] - logits[wrong[1][2]], rel=1e-5) and found.gap > 0
    )
    assert "1 of 2 held-out prompts in batches of 8 differ" in drafters.verdict("x", [found], 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--prompts=.*: No such file or directory"),
        ("", "holds no prompt"),
        ('{"turns": ["a"]}\n\n{"question": "b"}', "line 3 holds no prompt"),
        ("not json", "line 1 holds no prompt"),
    ],
)
def test_files_of_prompts_that_are_none(folder, tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        drafters.read_prompts(str(tmp_path / "p.jsonl"), load_model(folder / "target"), 4, 8, print)


def test_mistakes_of_the_bench(capsys):
    assert call(bench, "drafters", "--figure=absent/x.png") == 2
    assert "--figure=absent/x.png: its folder does not exist" in capsys.readouterr().err


def test_loopiness_by_hand():
    assert drafting.loopiness([1] * 7) == 0  # no 8-gram
    # Ten tokens have three 8-grams, here all the same.
    assert drafting.loopiness([1] * 10) == 1 - 1 / 3
    assert drafting.loopiness(range(20)) == 0


def test_prompts_are_held_out_and_of_one_length():
    for kind, length in (("code", 64), ("prose", 64), ("copy", 113)):
        found = drafting.prompts(kind, 60)
        assert {len(prompt) for prompt in found} == {length}
        assert len({tuple(prompt) for prompt in found}) == 60
    assert len(drafting.prompts("code", drafters.HELD_OUT)) == 104
    for prompt in drafting.prompts("copy", 3):
        assert prompt[97:] == prompt[1:17]
    with pytest.raises(UserError, match="no prompts of kind 'prosa'; did you mean prose"):
        drafting.prompts("prosa", 1)
    with pytest.raises(UserError, match="there are .* prompts of kind prose, not 5000"):
        drafting.prompts("prose", 5000)


def test_the_page_of_drafters(tmp_path):
    """Two drafters on two kinds: the better one first, the best of a kind in bold, differences with their gap."""

    def row(name: str, kind: str, tokens: float, speed: float, equal: float) -> drafters.Row:
        return drafters.Row(name, kind, tokens, speed, 1.0, speed, speed, 10, 40, 10, equal, 0.25)

    rows = [row("a", "code", 1.5, 1.2, 1.0), row("a", "maths", 1.25, 0.5, 1.0)]
    rows += [row("b", "code", 2.5, 0.9, 1.0), row("b", "maths", 1.125, 0.7, 0.5)]
    differences = {"a": [], "b": [drafters.Difference(3, 7, 1e-6), drafters.Difference(4, 1, 0.5)]}
    report = drafters.Report(rows, 104, differences)
    settings = {"machine": {"load": 2.5}, "updates": 75}
    text = drafters_page.write(report, settings, tmp_path).read_text()
    assert text.index("| b | **2.50** | 1.12 |") < text.index("| a | 1.50 | **1.25** |")
    assert "| a | **1.20** | 0.50 |" in text and "| b | 0.90 | **0.70** |" in text
    assert (
        "| *loopiness of the text* | 0.25 | 0.25 |" in text and "updates: 75." in text and "load: 2.5" in text
    )
    assert "| a | 25% | 100.0% | 0 | - |" in text and "| b | 25% | 75.0% | 2 | 0.5 |" in text
    drafters.refuse_loss(tmp_path, {"drafter": ["b", "new", "a"], "kind": ["code", "maths"]})
    with pytest.raises(UserError, match="^--record: .*result.json also has a: measure all, or move it away"):
        drafters.refuse_loss(tmp_path, {"drafter": ["b"], "kind": ["code", "maths"]})
    with pytest.raises(UserError, match="also has code, maths: measure all"):
        drafters.refuse_loss(tmp_path, {"drafter": ["a", "b"], "kind": ["prose"]})
    drafters.refuse_loss(tmp_path / "new", {"drafter": ["b"]})
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["machine"] == {"load": 2.5} and found["rows"][0]["tokens_per_call"] == 1.5
    assert (tmp_path / "figure.png").stat().st_size > 5000
