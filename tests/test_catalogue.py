"""Walks the catalogue: every system's tiny config builds, is saved exactly, and learns for a few steps, or decodes or
compresses where nothing is trained."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import matlm
from experiments.systems import System, read_catalogue
from research.compression.blocks import plain
from research.compression.chain import Chain
from research.config import build, from_json, load_config, of, to_json
from research.decoding.generator import Generator
from research.decoding.speculative.loading import find_drafter
from research.errors import UserError
from research.nn.weights import stored_bits
from research.training.loop import Trainer
from research.training.model_directory import save_model
from research.training.optimizers import constant
from research.training.partitioning import make_mesh, parameter_shardings
from research.training.paths import named_leaves
from research.training.task import LanguageModelling
from research.training.workdir import load_model
from tests.programs import drawn_like

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
# They say what is done at which layer, or (GAD) continue a model that is not shortened with them.
NAME_LAYERS = ("arcana", "ep_alm", "gad", "iaa")
# And those whose paper's config pairs the layers of two models, or has another number for each kind.
PAIR_LAYERS = ("eve", "mmmamba_vlm", "zipper")
# Their papers' vocabularies, widths or classes are no multiples of 4 and 2: whoever divides them adds rules.
ODD_SIZES = ("gad", "morpmamba", "sjd", "uoe", "zipper")


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> Callable[[System], str]:
    """Makes a model directory in place of the base model, with its vocabulary and context but narrow and shallow."""

    @functools.cache
    def make(layers: int) -> str:
        directory = tmp_path_factory.mktemp("catalogue") / f"target_{layers}"
        config = matlm.decoder(width=32, num_layers=layers, num_heads=4, hidden_dim=64, length=512)
        task = build(of(LanguageModelling, model=config))
        save_model(directory, config, drawn_like(lambda: task.init(jax.random.key(0))))
        return str(directory)

    # Hidden Transfer's maps stand after layer 4.
    return lambda system: make(5 if system.name == "hidden_transfer" else 2)


def shorten(part: Any) -> None:
    """Every stack of layers in a config, to one period of its blocks."""
    if isinstance(part, ConfigDict):
        if "blocks" in part and "num_layers" in part:
            part.num_layers = len(part.blocks)
        part = part.values()
    if not isinstance(part, str) and isinstance(part, Iterable):
        for inner in part:
            shorten(inner)


def few_steps(name: str, config: ConfigDict, target: str) -> ConfigDict:
    """The same experiment with `STEPS` steps a stage, small batches, one period of its layers, no evaluators, drafting
    for `target`."""
    short = from_json(to_json(config))
    short.evaluators = ()
    if name not in NAME_LAYERS:
        shorten(short.task)
    for model in ("target", "teacher", "base"):
        if short.task.get(model) == "package:language/base":
            short.task[model] = target
    if "start_from" in short.task:
        short.task.start_from = None  # its model is not this narrow one
    for stage in short.stages:
        stage.steps, stage.batch_size = STEPS, 2
        # Warm-ups are longer than that.
        stage.optimizer.schedule = of(constant, peak=stage.optimizer.schedule.peak)
    return short


def decodes(config: str, target: str) -> bool:
    """Whether the drafter of a config drafts for the target, and plain decoding's output comes out."""
    loaded = load_model(target)
    found = find_drafter(config, loaded)
    plain = Generator(loaded.model, loaded.params)
    drafted = Generator(loaded.model, loaded.params, proposer=found.proposer, proposer_params=found.params)
    one, other = (g.generate([[1, 2, 3]], max_new_tokens=64) for g in (plain, drafted))
    return one.samples == other.samples and other.stats.drafted > 0


def compresses(chain: Chain, target: str) -> bool:
    """Whether a chain makes a model smaller, and leaves it finite."""
    loaded = load_model(target)
    short = dataclasses.replace(chain, tokens=512, length=64)
    *_, last = short.run(loaded.model, loaded.params, short.batches(loaded.model, None))
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain(last.params)))
    return finite and stored_bits(last.params) < stored_bits(loaded.params)


@pytest.mark.parametrize("system", read_catalogue(), ids=lambda system: system.name)
def test_the_tiny_config_builds_and_trains(system: System, targets: Callable[[System], str], monkeypatch):
    monkeypatch.chdir(ROOT)
    config, target = load_config(f"{system.config}:tiny"), targets(system)
    assert load_config(system.config) == config  # `tiny` is the default
    assert from_json(to_json(config)) == config
    if "methods" in config:
        assert compresses(build(config), target)
        return
    if "stages" not in config:
        assert decodes(f"{system.config}:tiny", target)
        return
    trainer = build(few_steps(system.name, config, target))
    # One device and no workdir: simulated devices and checkpoints have tests of their own, once.
    # Parameters are given where the task does not need its own: the program that draws them is the largest.
    task = trainer.task
    params = (
        None
        if hasattr(task, "start") or hasattr(task, "rearrange")
        else drawn_like(lambda: task.init(jax.random.key(0)))
    )
    state, metrics = trainer.train(progress=False, devices=jax.devices()[:1], params=params)
    assert int(state.step) == STEPS * len(trainer.stages)
    assert np.isfinite(metrics["train/loss"])
    leaves = jax.tree.leaves(state.params)
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    if params is not None:
        keep_their_bits(trainer, params, state.params)


def keep_their_bits(trainer: Trainer, before: Any, after: Any) -> None:
    """What no stage trains is frozen bit for bit, whatever the optimizers decay; what one trains has changed. Integers,
    such as a count of updates, are the task's own business."""
    masks = [stage.mask(before) for stage in trainer.stages]
    trained = jax.tree.map(lambda *flags: any(flags), *masks)
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), before, after)
    counted = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.integer), before)
    assert all(jax.tree.leaves(jax.tree.map(lambda *allowed: any(allowed), trained, same, counted)))
    assert not all(jax.tree.leaves(same))


@pytest.mark.parametrize("system", read_catalogue(), ids=lambda system: system.name)
def test_the_papers_config_builds(system: System, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(f"{system.config}:paper")
    build(config)
    if "stages" not in config:
        return
    # Shapes only: the paper's size does not fit into a test. And of one period of layers, as the others repeat it.
    if system.name not in NAME_LAYERS + PAIR_LAYERS:
        config = from_json(to_json(config))
        shorten(config.task)
    params = jax.eval_shape(build(config).task.init, jax.random.key(0))
    assert jax.tree.leaves(params)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    if system.name in ODD_SIZES:
        with pytest.raises(UserError, match="cannot be divided by"):
            parameter_shardings(params, mesh)
        return
    # Every large parameter has a rule, or this raises, and one that divides it.
    found = named_leaves(parameter_shardings(params, mesh))
    large = [path for path, leaf in named_leaves(params).items() if leaf.ndim > 1 and leaf.size >= 1 << 22]
    assert [path for path in large if found[path].is_fully_replicated] == []
