"""Self-distilled rows: what the target says, weighed where it says it, written once."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.data.tokenizer import train as train_tokenizer
from research.decoding.generator import Generator
from research.decoding.sampling import Sampling
from research.decoding.speculative import distill
from research.decoding.speculative.distill import SelfDistilled, self_distill
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.workdir import save_model
from tests.programs import drawn

from .members import PROMPTS, tiny_target

LENGTH, PROMPT = 12, 4


@pytest.fixture(scope="module")
def plain():
    target = tiny_target()
    return Generator(target.model, target.params)


def test_rows_are_the_target_s_own_output(plain):
    rows = self_distill(plain, PROMPTS, 20, Sampling(), seed=0, first=0)
    for row, prompt in enumerate(PROMPTS):
        said = plain.generate([prompt], max_new_tokens=21 - len(prompt)).samples[0].tokens
        assert rows.tokens[row].tolist() == prompt + said
    assert rows.begin.tolist() == [3, 12, 1] and rows.end.tolist() == [21, 21, 21]


def test_a_row_ends_with_the_end_token(plain):
    target = tiny_target()
    whole = self_distill(plain, PROMPTS, 20, Sampling(), seed=0, first=0).tokens[2].tolist()
    ending = Generator(target.model, target.params, ends=(whole[5],))
    rows = self_distill(ending, PROMPTS, 20, Sampling(), seed=0, first=0)
    assert rows.tokens[2].tolist() == whole[:6] + [0] * 15 and rows.end[2] == 6


def test_draws_belong_to_the_row_s_number(plain):
    options = dict(length=20, sampling=Sampling(1.0), seed=3)
    all_rows = self_distill(plain, PROMPTS, first=5, **options)
    again = self_distill(plain, [PROMPTS[0], PROMPTS[2], PROMPTS[2]], first=5, **options)
    assert again.tokens[2].tolist() == all_rows.tokens[2].tolist() != again.tokens[1].tolist()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A byte-level target without training, and a text file."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "text.txt").write_text("".join(f"line {i} of some text\n" for i in range(60)))
    block = of(
        Block,
        attention=of(Attention, num_heads=2, head_dim=8, rotary=of(Rotary)),
        mlp=of(GatedMLP, hidden_dim=24),
    )
    model = of(DecoderLM, blocks=(block,), num_layers=1, vocab_size=259, width=16, max_length=16)
    params = drawn(build(model), jnp.zeros((1, 1), jnp.int32))
    save_model(folder / "target", model, params, train_tokenizer([], vocab_size=259))
    return folder


@pytest.fixture
def dataset(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LATHE_DATA_DIR", str(tmp_path / "data"))

    def make(**fields) -> SelfDistilled:
        given = dict(target=str(corpus / "target"), sources=str(corpus / "text.txt"), split="all")
        return build(of(SelfDistilled, **given | dict(rows=40, length=LENGTH, prompt=PROMPT) | fields))

    return make


def test_batches_weigh_what_the_target_said(dataset):
    data = dataset(temperature=1.0)
    batch = next(data.batches(0, 8))
    assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in data.element_spec().items()
    }
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    # Prompts of 4 tokens: the first target that the target said stands at place 3. No row has ended here.
    np.testing.assert_array_equal(batch["weights"], np.broadcast_to([0.0] * 3 + [1.0] * 9, (8, LENGTH)))
    # A byte a token, and 0 for the three special ones.
    np.testing.assert_array_equal(batch["target_bytes"], batch["weights"] * (batch["targets"] >= 3))
    np.testing.assert_array_equal(batch["positions"], np.broadcast_to(np.arange(LENGTH), (8, LENGTH)))
    seen = np.concatenate([b["tokens"] for b in data.batches(0, 8, epochs=1)])
    assert len({tuple(row) for row in seen}) == 40  # an epoch has every row once
    assert not np.array_equal(next(data.batches(40, 8))["tokens"], batch["tokens"])  # in an order of its own


def test_a_row_that_ended_is_padded(dataset):
    data = dataset()
    rows = data.prepare()._rows
    end = rows.end.copy()
    end[:] = 7  # tokens 0 to 6 are real
    data._rows = dataclasses.replace(rows, end=end)
    batch = data.take(np.arange(1))
    # Inputs 0 to 6 are real; the last target that was said is token 6, at place 5.
    assert batch["segments"][0].tolist() == [1] * 7 + [0] * 5
    assert batch["weights"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0]


def test_rows_are_written_once_and_work_goes_on_where_it_stopped(dataset, tmp_path, monkeypatch):
    written: list[int] = []
    real = distill.self_distill

    def counted(*args, **kwargs):
        written.append(args[-1])
        return real(*args, **kwargs)

    monkeypatch.setattr(distill, "self_distill", counted)
    told: list[tuple[str, int, int]] = []
    first = dataset().prepare(lambda *line: told.append(line))._rows
    assert written == [0, 32] and [line[1:] for line in told if "writes rows" in line[0]] == [
        (32, 40),
        (40, 40),
    ]
    (folder,) = (tmp_path / "data" / "distilled").iterdir()
    shutil.rmtree(folder / "000001")
    again = dataset(rows=70).prepare()._rows
    assert written == [0, 32, 32, 64]
    np.testing.assert_array_equal(again.tokens[:64], first.tokens)
    dataset(temperature=0.5).prepare()
    assert written[4:] == [0, 32] and len(list(folder.parent.iterdir())) == 2


def test_what_cannot_be_written_is_named(dataset, tmp_path):
    with pytest.raises(
        UserError, match="has .* windows of 4 tokens in one document, and 5000 rows need 5024"
    ):
        dataset(rows=5000).prepare()
    with pytest.raises(UserError, match="rows of 16 tokens do not fit the context of .*, 16"):
        dataset(length=16).prepare()
    with pytest.raises(UserError, match="a prompt shorter than the row"):
        dataset(prompt=LENGTH)
    with pytest.raises(UserError, match="temperature must be 0"):
        dataset(temperature=-1.0)
    data = dataset()
    data.prepare()
    (folder,) = (tmp_path / "data" / "distilled").iterdir()
    (folder / "000000" / "rows.npz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="rows.npz is damaged"):
        dataset().prepare()
