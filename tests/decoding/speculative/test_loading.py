"""Drafters on disk come back exactly, and to the target they were trained for; else one line says why."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research.config import build, of, to_json
from research.data.text import TokenDataset
from research.data.tokenizer import Tokenizer
from research.decoding.generator import Generator
from research.decoding.speculative.loading import find_drafter, load_drafter, save_drafter
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.training import DrafterTraining
from research.decoding.speculative.trees import RankTree, chain_paths
from research.errors import UserError
from research.training.loop import Trainer
from research.training.model_directory import fingerprint
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir
from tests.programs import drawn

from .members import PROMPTS, Walks, tiny_target

CONFIG = of(Medusa, tree=of(RankTree, paths=chain_paths(2)), num_heads=2)


@pytest.fixture(scope="module")
def target():
    return load_model(tiny_target().directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of two steps, and its final parameters."""
    folder = tmp_path_factory.mktemp("run") / "medusa"
    stage = of(
        Stage,
        name="drafter",
        steps=2,
        batch_size=8,
        optimizer=of(adamw, schedule=of(constant, peak=1e-2)),
        trainable=("^drafter/",),
    )
    task = of(DrafterTraining, drafter=CONFIG, target=tiny_target().directory)
    config = of(Trainer, task=task, data=of(TokenDataset), stages=(stage,))
    trainer = dataclasses.replace(build(config), data=Walks())  # the target knows 32 tokens only
    with open_workdir(folder, config) as workdir:
        state, _ = trainer.train(workdir, progress=False, devices=jax.devices()[:1])
    return folder, state.params["drafter"]


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_a_run_and_the_directory_saved_from_it_give_the_same_drafter(run, target, tmp_path):
    folder, params = run
    loaded = load_drafter(folder, target)
    assert loaded.proposer == build(CONFIG) and same(loaded.params, params)
    assert loaded.identity.path == tiny_target().directory and loaded.identity.vocab_size == 32
    save_drafter(tmp_path / "saved", loaded.config, loaded.params, target, loaded.identity.path)
    again = find_drafter(str(tmp_path / "saved"), target)
    assert again.proposer == loaded.proposer and same(again.params, params)
    assert again.identity == loaded.identity and to_json(again.config) == to_json(loaded.config)
    fields = dict(proposer=again.proposer, proposer_params=again.params)
    drafted = Generator(target.model, again.target_params(target), **fields).generate(
        PROMPTS, max_new_tokens=9
    )
    plain = Generator(target.model, target.params).generate(PROMPTS, max_new_tokens=9)
    assert [s.tokens for s in drafted.samples] == [s.tokens for s in plain.samples]


def test_fingerprints_see_every_bit_shape_and_name():
    params = {"a": {"kernel": jnp.asarray([[1.0, 2.0], [3.0, 4.0]])}, "b": jnp.zeros(3)}
    changed = [
        {**params, "b": jnp.zeros(3).at[2].set(1e-45)},  # the least float there is
        {**params, "b": -jnp.zeros(3)},
        {**params, "b": jnp.zeros((3, 1))},
        {"a": params["a"], "c": params["b"]},
        {**params, "b": jnp.zeros(3, jnp.int32)},
    ]
    found = {fingerprint(tree) for tree in (params, *changed)}
    assert len(found) == 6
    assert fingerprint(jax.tree.map(np.asarray, params)) == fingerprint(params)


def test_another_target_is_refused(run, target):
    folder, _ = run
    moved = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), target.params)
    here, there = fingerprint(target.params), fingerprint(moved)
    with pytest.raises(UserError, match=f"medusa was trained for another target, .*{here}, not {there}"):
        load_drafter(folder, dataclasses.replace(target, params=moved))


def test_another_vocabulary_and_tokenizer_are_refused(run, target, tmp_path):
    folder, params = run
    model = target.model.copy(vocab_size=40)
    wide = drawn(model, jnp.zeros((1, 1), jnp.int32))
    message = "drafts from a vocabulary of 32 tokens, and the target has 40"
    with pytest.raises(UserError, match=message):
        load_drafter(folder, dataclasses.replace(target, model=model, params=wide))
    with_tokenizer = dataclasses.replace(target, tokenizer=Tokenizer.load())
    save_drafter(tmp_path / "saved", CONFIG, params, with_tokenizer, "there")
    described = json.loads((tmp_path / "saved" / "drafter.json").read_text())
    described["target"]["tokenizer"] = "0" * 64
    (tmp_path / "saved" / "drafter.json").write_text(json.dumps(described))
    with pytest.raises(
        UserError, match="trained with another tokenizer than the target's .000000000000, not"
    ):
        load_drafter(tmp_path / "saved", with_tokenizer)
    load_drafter(
        tmp_path / "saved", target
    )  # a target without a tokenizer reads token ids: nothing to compare


def test_a_tree_beyond_the_context_is_refused(run, target):
    folder, _ = run
    short = dataclasses.replace(target, model=target.model.copy(max_length=2))
    with pytest.raises(UserError, match="drafts 3 nodes on 3 levels, and the target's context is 2 tokens"):
        load_drafter(folder, short)


def test_a_decoder_is_a_draft_model(target):
    """The target drafts for itself, so that every draft is kept: 4 drafted tokens and its own in a call."""
    loaded = load_drafter(tiny_target().directory, target)
    assert build(loaded.config) == loaded.proposer and loaded.identity is None
    fields = dict(proposer=loaded.proposer, proposer_params=loaded.params)
    stats = Generator(target.model, target.params, **fields).generate([[7]], max_new_tokens=11).stats
    assert stats.tokens_per_call == 5.0 and stats.drafted == 8 and stats.wasted == 0
    with pytest.raises(UserError, match="the draft model has a vocabulary of 32 and the target of 40"):
        load_drafter(
            tiny_target().directory, dataclasses.replace(target, model=target.model.copy(vocab_size=40))
        )


def test_what_is_no_drafter_is_named(run, target, tmp_path):
    with pytest.raises(UserError, match="no drafter promt_lookup; did you mean prompt_lookup"):
        find_drafter("promt_lookup", target)
    assert find_drafter("prompt_lookup", target).params == ()
    with pytest.raises(UserError, match="is neither: a drafter directory"):
        load_drafter(tmp_path, target)
    of_model = of(Trainer, task=of(LanguageModelling, model=target.config), data=of(TokenDataset), stages=())
    (tmp_path / "config.json").write_text(to_json(of_model))
    with pytest.raises(UserError, match="the run in .* has not saved a checkpoint yet"):
        load_drafter(tmp_path, target)
    with pytest.raises(UserError, match="there is no checkpoint of step 9"):
        load_drafter(run[0], target, step=9)


def test_damaged_directories_are_named(run, target, tmp_path):
    _, params = run
    folder = tmp_path / "saved"
    save_drafter(folder, CONFIG, params, target, "there")
    weights = (folder / "drafter.safetensors").read_bytes()
    (folder / "drafter.safetensors").write_bytes(weights[:-1])
    with pytest.raises(UserError, match="drafter.safetensors is not an intact safetensors file"):
        load_drafter(folder, target)
    safetensors.numpy.save_file(
        {"head_1/output": np.zeros((2, 2), np.float32)}, folder / "drafter.safetensors"
    )
    with pytest.raises(UserError, match="do not fit the drafter's config: .*head_1"):
        load_drafter(folder, target)
    (folder / "drafter.json").write_text("{}")
    with pytest.raises(UserError, match="drafter.json is not the description of a drafter"):
        load_drafter(folder, target)
    with pytest.raises(UserError, match="is a drafter directory, with one set of parameters: no step 3"):
        load_drafter(folder, target, step=3)
    with pytest.raises(UserError, match="exists and is no drafter directory"):
        save_drafter(tmp_path, CONFIG, params, target, "there")
