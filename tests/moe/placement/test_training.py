"""Placed experts in the ordinary trainer: the steps of one device, the same bits after a restart, other meshes."""

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.moe.placement import sharding
from research.moe.placement.cost import CostModel
from research.moe.placement.hecate import FSSDP
from research.moe.placement.task import ExpertPlacement, move_experts
from research.nn.mlp import MLP
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import constant, sgd
from research.training.partitioning import make_mesh
from research.training.paths import named_leaves
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir

VOCAB, WIDTH, LENGTH, E, L = 16, 8, 4, 8, 2


class NoAttention(nn.Module):
    """Tokens do not see each other: what is tested is the FFN."""

    def __call__(self, x, context, cache=None):
        return jnp.zeros_like(x), None


class Tokens:
    """Language records made from their number. `ends`: the reader dies after so many batches."""

    def __init__(self, ends: int | None = None):
        self.ends = ends

    def element_spec(self):
        spec = {n: jax.ShapeDtypeStruct((LENGTH,), np.int32) for n in self._record(0)}
        return spec | {"weights": jax.ShapeDtypeStruct((LENGTH,), np.float32)}

    def __len__(self) -> int:
        return 64

    def _record(self, number: int) -> dict[str, np.ndarray]:
        text = np.random.default_rng([3, number % 64]).integers(0, VOCAB, LENGTH + 1).astype(np.int32)
        return {
            "tokens": text[:-1],
            "targets": text[1:],
            "segments": (np.arange(LENGTH) < 4 - number % 2).astype(np.int32),  # some padding
            "positions": np.arange(LENGTH, dtype=np.int32),
            "target_bytes": np.ones(LENGTH, np.int32),
            "weights": (np.arange(LENGTH) < 4 - number % 2).astype(np.float32),
        }

    def batches(self, start, batch_size, *, rows=None, epochs=None) -> Iterator[dict[str, np.ndarray]]:
        count = 0
        while epochs is None or start < 64:
            if count == self.ends:
                raise KeyboardInterrupt
            rows = [self._record(n) for n in range(start, start + batch_size)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            start, count = start + batch_size, count + 1


def language_model(**changes) -> dict:
    mlp = of(MoE, num_experts=E, k=2, hidden_dim=4, gated=False, activation="relu", balance="switch")
    block = of(Block, attention=of(NoAttention), mlp=mlp)
    model = dict(
        vocab_size=VOCAB, width=WIDTH, max_length=LENGTH, num_layers=L, blocks=(block,), scan_layers=True
    )
    return of(LanguageModelling, model=of(DecoderLM, **{**model, **changes}))


# Moving experts costs next to nothing, so that copies are made after the gate too.
CHEAP = of(CostModel, flops=1e6, bandwidth=1e15, node_bandwidth=1e15, latency=0.0)
POLICY = of(FSSDP, overlap=4, memory=1, window=2, reshard_every=3, own_factor=1.5, calibration=1, cost=CHEAP)


def config(task, mesh, **changes):
    optimizer = of(sgd, schedule=of(constant, peak=0.3), momentum=0.9)
    stages = (of(Stage, name="main", steps=6, batch_size=8, optimizer=optimizer),)
    evaluators = (of(Evaluate, name="v", data=of(Tokens), batch_size=16),)
    fields = dict(task=task, data=of(Tokens), stages=stages, mesh=mesh, evaluators=evaluators)
    return of(Trainer, **{**fields, **changes}, ema=0.5, log_every=1, checkpoint_every=2)


@functools.partial(jax.jit, static_argnums=0)
def unpack(task, params):
    return task.unpack(params)


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in named_leaves(tree).items()}


RESULTS = ("train/cross_entropy", "train/crossed", "train/imbalance", "v/loss")
PLACED = of(ExpertPlacement, task=language_model(), placement=POLICY)
MESH = {"data": 2, "fsdp": 2, "expert": 2}  # two replicas of two nodes of two devices


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps on eight devices."""
    directory = tmp_path_factory.mktemp("placed") / "run"
    trained = build(config(PLACED, MESH))
    with open_workdir(directory, config(PLACED, MESH)) as workdir:
        state, metrics = trained.train(workdir, progress=False)
    return directory, trained.task, state, metrics


def test_the_steps_are_those_of_the_ordinary_trainer_on_one_device(run):
    directory, task, state, metrics = run
    trainer = build(config(language_model(), {}, evaluators=()))
    plain, expected = trainer.train(progress=False, devices=jax.devices()[:1])
    # Six steps at a rate of 0.3 from sums in another order.
    assert metrics["train/cross_entropy"] == pytest.approx(expected["train/cross_entropy"], rel=1e-5)
    for found, wanted in ((state.params, plain.params), (state.ema, plain.ema)):
        leaves = named_leaves(wanted)
        for path, leaf in named_leaves(unpack(task, found)).items():
            np.testing.assert_allclose(leaf, leaves[path], atol=1e-5, err_msg=path)
    # What `load_model` reads of the workdir is the plain model.
    assert bits(load_model(directory).params) == bits(unpack(task, state.params))


def test_steps_report_imbalance_bytes_and_crossing_tokens(run):
    *_, state, metrics = run
    assert 1 <= metrics["train/imbalance"] <= 4
    assert 0 < metrics["train/crossed"] < 1
    # One expert ahead of the gate and one after it, at most, to each of eight devices in two layers; an expert is up
    # and down, 8 x 4 of float32. More than half of that: some were made after the gate.
    most = 8 * 2 * L * (2 * 8 * 4 * 4)
    assert most / 2 < metrics["train/moved_bytes"] <= most
    history = np.asarray(state.params["placement"]["history"])
    assert history.shape == (2, L, E)
    # Two choices for each of 8 x 4 - 4 real tokens of a batch.
    assert (history.sum(axis=2) == 2 * 28).all()
    assert bits(state.ema["placement"]) == bits(state.params["placement"])


def test_homes_move_with_their_optimizer_state_and_memory_is_divided(run):
    _, task, state, _ = run
    rows = np.asarray(state.params["placement"]["rows"])
    assert (rows != sharding.even_rows(L, E)).any()
    owned = sharding.owned(rows, 4)
    assert owned.max() <= 3 and (owned.sum(axis=0) == 4).all()
    for leaves in (state.params["store"], named_leaves(state.opt_state)):
        for path, leaf in named_leaves(leaves).items():
            if "experts" in path:
                assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {L * E // 4}
    up = state.params["store"]["experts"]["up"]["kernel"]
    assert up.addressable_shards[0].data.nbytes * 4 == up.nbytes


def test_a_restarted_run_ends_in_the_same_bits(run, tmp_path):
    _, _, state, metrics = run
    settings = config(PLACED, MESH)
    with open_workdir(tmp_path / "run", settings) as workdir:
        dying = build(settings)
        object.__setattr__(dying, "data", Tokens(ends=5))  # of the saved step 4, one after the homes moved
        with pytest.raises(KeyboardInterrupt):
            dying.train(workdir, progress=False)
        resumed, again = build(settings).train(workdir, progress=False)
    assert bits(resumed) == bits(state)
    assert {name: again[name] for name in RESULTS} == {name: metrics[name] for name in RESULTS}
    # From the same checkpoint on another number of devices, up to the rounding of sums.
    (tmp_path / "run" / "checkpoints" / "6").rename(tmp_path / "6")
    trainer = build(config(PLACED, {"expert": 4}, evaluators=()))
    elsewhere, others = trainer.train(tmp_path / "run", progress=False, devices=jax.devices()[:4])
    assert others["train/cross_entropy"] == pytest.approx(metrics["train/cross_entropy"], rel=1e-5)
    task = build(PLACED)
    one, other = (named_leaves(unpack(task, s.params)) for s in (state, elsewhere))
    for path, leaf in one.items():
        np.testing.assert_allclose(other[path], leaf, atol=1e-5, err_msg=path)


def test_homes_that_another_mesh_can_not_have_are_changed_at_the_start(run):
    _, task, state, _ = run
    mesh = make_mesh(MESH)
    before = bits([unpack(task, tree) for tree in (state.params, state.ema)])
    state = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x), x.sharding), state
    )  # the moved leaves are deleted
    # Layer after layer: all of layer 0 on the first two devices, twice what each may own.
    rows = np.arange(L * E, dtype=np.int32).reshape(L, E)
    source = sharding.sources(np.asarray(state.params["placement"]["rows"]), rows)
    moved = move_experts(state, rows, source, mesh)
    assert sharding.owned(np.asarray(moved.params["placement"]["rows"]), 4).max() == 4
    fitted = task.rearrange(moved, mesh, None)
    assert sharding.owned(np.asarray(fitted.params["placement"]["rows"]), 4).max() <= 3
    assert task.rearrange(fitted, mesh, None) is fitted
    assert task.rearrange(fitted, mesh, 2) is fitted  # not yet time
    assert bits([unpack(task, tree) for tree in (fitted.params, fitted.ema)]) == before


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="placement='fsspd': no such placement; did you mean 'fssdp'?"):
        ExpertPlacement(build(language_model()), placement="fsspd")
    block = of(Block, attention=of(NoAttention), mlp=of(MLP, hidden_dim=8))
    with pytest.raises(UserError, match="no layer of the model has an FFN that is a mixture of experts"):
        ExpertPlacement(build(language_model(blocks=(block,))))
    with pytest.raises(UserError, match="ExpertPlacement.capacity is 0; it must be above 0"):
        ExpertPlacement(build(language_model()), capacity=0)
    trainer = build(config(PLACED, {"expert": 3}))
    with pytest.raises(UserError, match="placement: 8 experts do not divide over the 3 devices"):
        trainer.train(progress=False, devices=jax.devices()[:3])
    for wrong, message in (
        (dict(overlap=-1), "at least 0"),
        (dict(window=0), "at least 1"),
        (dict(own_factor=0.5), "below 1"),
    ):
        with pytest.raises(UserError, match=message):
            FSSDP(**wrong)
