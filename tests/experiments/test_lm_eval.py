"""The program lm_eval: local tasks with local data, end to end and without a network."""

import functools
import json
import math
import re
import socket
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import lm_eval as program
from research.config import build, of
from research.data.tokenizer import Tokenizer
from research.elastic.matformer import MatFormer, extract, parse_widths
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block
from research.training.task import LanguageModelling
from research.training.workdir import load_model, save_model
from tests.programs import drawn


def call(*argv: str) -> int:
    return program.PROGRAM.call(program.main, argv)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The harness with no network: whoever connects fails the test."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model directory: a random decoder with the tokenizer that ships, which says that it was trained nested."""
    path = tmp_path_factory.mktemp("model") / "model"
    block = of(Block, attention=of(Attention, num_heads=2, head_dim=8), mlp=of(GatedMLP, hidden_dim=64))
    config = of(DecoderLM, blocks=(block,), num_layers=2, vocab_size=4096, width=16, max_length=64)
    params = drawn(build(config), jnp.zeros((1, 2), jnp.int32), seed=1)
    params["embedding"]["table"] = params["embedding"]["table"] * 8
    experiment = ConfigDict({"task": of(MatFormer, task=of(LanguageModelling, model=config))})
    save_model(path, config, params, Tokenizer.load(), experiment=experiment)
    return path


DOCUMENTS = [
    {"question": "The sky is", "choices": ["blue", "a fish", "seven"], "text": "import os\n" * 40},
    {"question": "Two and two are", "choices": ["four", "green", "late"], "text": "def f(x):"},
    {"question": "Grass is", "choices": ["loud", "green", "a verb"], "text": "return 1"},
]

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
"""
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""
ROLLING = """
task: local_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
task: local_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with three tasks on one file of documents, whose labels are all 0."""
    write_documents(tmp_path, [0, 0, 0])
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = COMMON.format(data=tmp_path / "documents.jsonl", cache=tmp_path / "cache")
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "generate": GENERATE}.items():
        (folder / f"{name}.yaml").write_text(text + common)
    return folder


def write_documents(folder: Path, labels: list[int]) -> None:
    lines = (
        json.dumps({**document, "label": label}) for document, label in zip(DOCUMENTS, labels, strict=True)
    )
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")


def nats(model, params, inputs: list[int], targets: list[int]) -> float:
    """Nats of `targets`, each predicted from the place before it. Padding on the right can't matter."""
    logits = np.asarray(apply(model, params, jnp.asarray([inputs + [0] * (64 - len(inputs))])), np.float64)[0]
    logits = logits[len(inputs) - len(targets) : len(inputs)]
    return float(sum(row[t] - np.log(np.exp(row).sum()) for row, t in zip(logits, targets, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
    return model.apply({"params": params}, tokens)


def test_local_tasks_of_a_cut_model(offline, directory, tasks, tmp_path, capsys):
    loaded = load_model(directory)
    spec = parse_widths("S,M", MatFormer(LanguageModelling(loaded.model)))
    model, params = extract(loaded.model, loaded.params, spec)
    encode = loaded.tokenizer.encode
    chosen = []
    for document in DOCUMENTS:
        start = len(encode(document["question"], bos=True))
        wholes = [encode(f"{document['question']} {choice}", bos=True) for choice in document["choices"]]
        chosen.append(int(np.argmax([nats(model, params, whole[:-1], whole[start:]) for whole in wholes])))
    write_documents(tmp_path, [chosen[0], chosen[1], (chosen[2] + 1) % 3])  # so 2 of 3 are right

    output = tmp_path / "results.json"
    code = call(
        f"--workdir={directory}",
        "--widths=S,M",
        f"--include_path={tasks}",
        "--tasks=local_*",
        "--batch_size=4",
        f"--output={output}",
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    # The harness' own table; how many digits it shows is its library's.
    assert re.search(r"\|local_choice +\|Yaml *\|none *\| +0\|acc +\|. +\| +0\.6{2,}7\|", shown.out), shown.out
    assert "FFN widths by layer 0: 8, 1: 16" in shown.err  # of 64: an eighth and a quarter
    saved = json.loads(output.read_text())
    assert saved["config"]["model"] == f"{directory} cut to S,M"
    results = saved["results"]
    assert results["local_choice"]["acc,none"] == 2 / 3
    assert results["local_generate"]["exact_match,none"] == 0.0  # the model is random

    total = 0.0
    for document in DOCUMENTS:
        row = encode(document["text"], bos=True)
        for first in range(
            1, len(row), 64
        ):  # targets row[first:end], the last one from end - 1 at most 64 back
            end = min(first + 64, len(row))
            total += nats(model, params, row[max(0, end - 1 - 64) : end - 1], row[first:end])
    size = sum(len(document["text"].encode()) for document in DOCUMENTS)
    expected = -total / size / math.log(2)
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_the_task_of_the_guide(offline, directory, tmp_path, monkeypatch, capsys):
    from research.interop.lm_eval import HarnessModel

    guide = Path(__file__).resolve().parents[2] / "docs" / "lm_eval.md"
    (text,) = re.findall(r"```yaml\n(.*?)```", guide.read_text(), re.DOTALL)
    folder = tmp_path / "my_tasks"
    folder.mkdir()
    (folder / "task.yaml").write_text(
        text.replace("data_files:", f"cache_dir: {tmp_path}/cache\n  data_files:")
    )
    for split, numbers in {"train": (7, 8, 9), "test": (1100, 12)}.items():
        lines = [json.dumps({"question": f"n + {n}?", "answer": f"Easy.\n#### {n}"}) for n in numbers]
        (tmp_path / f"gsm8k_{split}.jsonl").write_text("\n".join(lines))
    prompts = []

    def answers(model, requests):
        prompts.extend(request.args[0] for request in requests)
        return [" So much.\n#### 1,100", "#### 13"]

    monkeypatch.setattr(HarnessModel, "generate_until", answers)
    output = tmp_path / "out.json"
    code = call(
        f"--workdir={directory}", f"--include_path={folder}", "--tasks=gsm8k_local", f"--output={output}"
    )
    assert code == 0, capsys.readouterr().err
    assert json.loads(output.read_text())["results"]["gsm8k_local"]["exact_match,number"] == 0.5
    assert prompts[1].endswith("\n\nQuestion: n + 12?\nAnswer:") and prompts[1].count("Easy.\n#### ") == 2


def test_mistakes_are_one_line(offline, directory, tasks, tmp_path, capsys):
    def error(*argv: str) -> str:
        assert call(f"--workdir={directory}", f"--include_path={tasks}", *argv) == 2
        lines = capsys.readouterr().err.splitlines()
        return lines[-1]

    assert error("--tasks=local_choise") == "error: unknown task local_choise; did you mean local_choice?"
    assert error("--tasks=local_choice", "--limit=1.5").startswith("error: --limit=1.5: a whole number")
    assert error("--tasks=local_choice", "--widths=XXL").startswith("error: width 'XXL' of layer 0")
    assert error("--tasks=local_choice", "--hf=x").startswith("error: --workdir does not go with --hf")
    assert "there is no folder" in error("--tasks=local_choice", f"--output={tmp_path}/no/x.json")
    (tmp_path / "documents.jsonl").unlink()
    assert "tasks local_choice cannot be loaded" in error("--tasks=local_choice")
    (tasks / "generate.yaml").write_text("task: [")
    assert "generate.yaml is not a task" in error("--tasks=local_choice")


@pytest.mark.parametrize("limit", ["nan", "inf", "-1"])
def test_a_limit_is_a_count_or_a_fraction(capsys, limit):
    assert call("--tasks=x", f"--limit={limit}") == 2
    assert capsys.readouterr().err.startswith(f"error: --limit={limit}: a whole number of documents")


def test_without_the_harness(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "research.interop.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it now fails
    assert call("--tasks=hellaswag") == 2
    expected = "error: lm_eval is not installed, or older than 0.4.13: pip install 'lm_eval>=0.4.13'\n"
    assert capsys.readouterr().err == expected
