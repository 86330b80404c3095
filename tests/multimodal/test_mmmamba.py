"""mmMamba of a HoVLE: its stacks are converted as one, the rest is shared to the bit, images are read in decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.mmmamba import stages
from research.config import build, of
from research.config_capture import capture
from research.data.shapes import Scenes
from research.errors import UserError
from research.multimodal.conversations import Conversations
from research.multimodal.distillation import VisionMambaDistillation
from research.nn.attention import Attention
from research.nn.linear import Linear
from research.ssm.mmmamba import MMMamba, converted, graft, seed_mixers, student_model
from research.training.loop import Trainer
from research.training.model_directory import save_model
from research.training.paths import named_leaves
from tests.multimodal.test_hovle import PLANNER, toy
from tests.multimodal.test_model import decoded_as_read

INHERITED = [f"{name}/kernel" for name in ("query", "key", "value", "output")]


@functools.cache
def student(shuffle, hybrid=None):
    """Of a module of two layers and a decoder of one."""
    model, params = toy(shuffle)
    made = student_model(model, hybrid, period=3, chunk=4)
    mixers = jax.jit(lambda params: seed_mixers(made, model, params, jax.random.key(1)))(params)
    return made, graft(params, mixers)


def test_what_is_shared_is_the_teachers_to_the_bit():
    model, params = toy("pre")
    made, own = student("pre")
    assert [path for path, _ in converted(made)] == [
        "holistic/layer_0",
        "holistic/layer_1",
        "decoder/layer_0",
    ]
    before, after = named_leaves(params), named_leaves(own)
    assert before.keys() < after.keys()
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf)
    added = {name for name in after if name not in before}
    assert all("/attention/" in name for name in added) and len(added) == 3 * 7
    # One in three layers, counted through both stacks: the first is the module's, the last the decoder's.
    for hybrid, kept in (("head", ("holistic", 0)), ("tail", ("decoder", 0))):
        mixed = student_model(model, hybrid, period=3)
        kinds = {
            (name, i): type(stack.blocks[i % len(stack.blocks)].attention)
            for name, stack in mixed.stacks.items()
            for i in range(stack.num_layers)
        }
        assert kinds.pop(kept) is Attention and set(kinds.values()) == {MMMamba}


@pytest.mark.parametrize(("shuffle", "hybrid"), [("pre", "head"), ("post", None)])
def test_images_decode_as_they_are_read(shuffle, hybrid):
    made, params = student(shuffle, hybrid)
    decoded_as_read(made, params, new=6)


def test_a_state_takes_no_more_for_a_longer_context():
    def held(model, length):
        cache = jax.eval_shape(lambda: model.init_cache(1, length))
        return [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer)) for layer in cache.layers]

    layer = 4 * (2 * 4 * 4 + 3 * 8)  # S of two heads and one input of the convolution
    assert held(student("pre")[0], 100) == held(student("pre")[0], 100_000) == [layer] * 3
    assert held(student("pre", "head")[0], 1000) == [4 * 2 * 8 * 1000, layer, layer]


def test_every_stage_touches_its_own_in_both_stacks(tmp_path):
    model, params = toy("post")
    save_model(tmp_path / "teacher", capture(model), params)
    task = of(VisionMambaDistillation, teacher=str(tmp_path / "teacher"), hybrid="head", period=3, chunk=4)
    data = Conversations(Scenes(), PLANNER, 40)
    config = of(
        Trainer, task=task, data=capture(data), stages=stages((1, 1, 1), (1e-2, 1e-2, 1e-2), (2, 2, 2))
    )
    trainer = build(config)
    began = trainer.task.start(jax.random.key(0))
    state, metrics = trainer.train(params=began, progress=False, devices=jax.devices()[:1])
    assert {"train/loss", "train/mimicry", "train/answers"} <= set(metrics)
    jax.tree.map(np.testing.assert_array_equal, state.params["teacher"], params)
    before, after = named_leaves(began["student"]), named_leaves(state.params["student"])
    assert {name.split("/attention")[0] for name in before} == {"holistic/layer_1", "decoder/layer_0"}
    fixed = {name for name in before if np.array_equal(before[name], after[name])}
    assert fixed == {name for name in before if "output" in name}
    own = trainer.task.unpack(state.params)
    shapes = jax.eval_shape(lambda: trainer.task.model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes["params"])


def test_what_sees_ahead_is_refused():
    task = VisionMambaDistillation(toy("pre")[0], chunk=4)
    batch = Conversations(Scenes(), PLANNER, 40, steps="images").take(np.arange(1))
    with pytest.raises(UserError, match="HoVLE.steps, now 'causal', to say the same"):
        task.inputs(batch)


def test_a_model_without_stacks_is_told():
    with pytest.raises(UserError, match="converts stacks of layers, and a Linear has none"):
        student_model(Linear(3))
