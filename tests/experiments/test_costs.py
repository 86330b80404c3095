"""The program that measures call times, on a model without training, and the choice made from its table."""

import jax
import jax.numpy as jnp
import pytest

from experiments import generate
from experiments.bench import costs as program
from experiments.bench.shapes import Shape
from research.config import build, of
from research.data.tokenizer import train as train_tokenizer
from research.decoding.cost import Candidate, Costs, choose, default_path
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block
from research.training.model_directory import fingerprint
from research.training.workdir import load_model, save_model


@pytest.fixture
def target(tmp_path):
    block = of(Block, attention=of(Attention, num_heads=2, head_dim=8), mlp=of(GatedMLP, hidden_dim=20))
    model = of(DecoderLM, blocks=(block,), num_layers=1, vocab_size=259, width=16, max_length=192)
    params = build(model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_model(tmp_path / "target", model, params, train_tokenizer([], vocab_size=259))
    return tmp_path / "target"


def test_costs_are_measured_and_written(target, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "SIZES", (1, 4))
    monkeypatch.setattr(program, "_SHAPE", Shape("small", width=16, layers=1, heads=2, hidden=20, vocab=32))
    lines, path = [], tmp_path / "costs.json"
    program.run(str(target), ["prompt_lookup"], rounds=1, count=2, path=str(path), report=lines.append)
    costs = Costs.load(path)
    assert sorted(costs.calls) == [1, 4, 11]  # prompt lookup scores the root and ten drafts
    assert costs.fingerprint == fingerprint(load_model(target).params)
    (candidate,) = costs.candidates
    assert (candidate.name, candidate.size) == ("prompt_lookup", 11) and candidate.tokens >= 1
    assert choose(costs).name in (None, "prompt_lookup")
    assert "of\n     4 nodes" in lines[0] and lines[1].startswith("prompt_lookup: ")
    assert lines[-1].startswith("small: a call of 1 node takes")


def test_repeated_drafts_change_nothing(target):
    """What is timed is exact: the tokens of plain decoding."""
    loaded = load_model(target)

    def tokens(**drafting):
        generator = program.Generator(loaded.model, loaded.params, **drafting)
        return generator.generate([[5, 7, 9]], max_new_tokens=20).samples[0].tokens

    assert tokens(proposer=program.Repeat(4)) == tokens()


def test_generate_with_the_drafter_that_is_predicted_to_be_fastest(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [f"--workdir={target}", "--prompt=a text", "--max_new_tokens=8", "--drafter=auto"]
    assert generate.PROGRAM.call(generate.main, argv) == 2
    assert "no call times at" in capsys.readouterr().err
    mark = fingerprint(load_model(target).params)
    for tokens, expected in ((3.0, "prompt_lookup"), (1.5, "none, plain decoding is the fastest")):
        # A call of 11 nodes that costs two plain ones.
        candidates = (Candidate("prompt_lookup", 11, tokens, 0.0),)
        Costs(str(target), mark, "cpu", {1: 1.0, 11: 2.0}, candidates).save(default_path(mark))
        assert generate.PROGRAM.call(generate.main, argv) == 0
        err = capsys.readouterr().err
        assert f"prompt_lookup: {tokens / 2:.2f}x plain decoding" in err and f"drafter: {expected}\n" in err
