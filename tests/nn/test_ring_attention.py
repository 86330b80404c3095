"""Attention in a ring of 8 simulated devices: the same as on one, with its gradients, divided indeed, and no pair of
chunks computed that a rule masks whole."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.matlm import decoder
from research.config import build, of
from research.data.pipeline import RecordDataset
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.attention_kernels import DenseAttention
from research.nn.masks import Causal, Full, MaskRule, Prefix, Steps, Window, step_ends
from research.nn.mlp import GatedMLP
from research.nn.ring_attention import RingAttention, _Ring, schedule
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.loop import Trainer
from research.training.optimizers import constant, sgd
from research.training.partitioning import make_mesh
from research.training.stages import Stage
from research.training.task import LanguageModelling

B, H, KV, T, D = 2, 4, 2, 32, 8


def arrays():
    random = np.random.default_rng(0)
    query, key, value, target = (
        jnp.asarray(random.standard_normal((B, heads, T, D)), jnp.float32) for heads in (H, KV, KV, H)
    )
    segments = jnp.asarray(
        [[1] * 11 + [2] * 21, [1] * 28 + [0] * 4], jnp.int32
    )  # two documents; one and padding
    return query, key, value, target, segments


def prefixes(rule):
    """Of the two rows: 5 and 14 tokens; images of 9 tokens from the 6th, and of 7 from the 21st on."""
    if isinstance(rule, Prefix):
        return jnp.array([5, 14], jnp.int32)
    if isinstance(rule, Steps):
        inside = np.zeros((B, T), bool)
        inside[0, 6:14] = inside[1, 21:27] = True
        return step_ends(jnp.asarray(~inside))
    return None


def needed(rule, count, rows):
    """The pairs of `count` chunks in which any query of these rows sees a key."""
    place, prefix = jnp.arange(T)[None], prefixes(rule)
    mask = rule.allowed(place, place, None if prefix is None else prefix[rows]).any((0, 1))
    return int(mask.reshape(count, T // count, count, T // count).any((1, 3)).sum())


def outputs(kernel, rule, softcap, mesh):
    """The output, the gradients of its product with a fixed array, and the text of the program."""
    *rows, segments = arrays()
    rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, None, "seq")))

    def run(query, key, value, target):
        out = kernel(
            query, key, value, rule, segments=segments, prefix=prefixes(rule), scale=0.3, softcap=softcap
        )
        return jnp.sum(out * target * (segments > 0)[:, None, :, None]), out

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    with jax.set_mesh(mesh):
        step = step.lower(*rows).compile()
        (_, out), gradients = step(*rows)
    real = np.asarray(segments > 0)[:, None, :, None]
    return [np.asarray(out) * real, *map(np.asarray, gradients)], step.as_text()


@pytest.mark.parametrize(
    "rule, softcap, sizes",
    [
        (Causal(), None, {"seq": 8}),
        (Window(9), 5.0, {"data": 2, "seq": 2, "tensor": 2}),
        (Window(6, sinks=2), None, {"seq": 8}),
        (Full(), None, {"seq": 8}),
        (Prefix(), None, {"seq": 4, "tensor": 2}),
        (Steps(), None, {"data": 2, "seq": 4}),
    ],
)
def test_the_same_as_on_one_device(rule, softcap, sizes, monkeypatch):
    computed, plain = [], _Ring.scores

    def counted(*arguments):
        jax.debug.callback(lambda: computed.append(1))
        return plain(*arguments)

    monkeypatch.setattr(_Ring, "scores", counted)
    expected, _ = outputs(DenseAttention(), rule, softcap, make_mesh({}, jax.devices()[:1]))
    found, text = outputs(RingAttention(), rule, softcap, make_mesh(sizes))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)  # sums of 32 terms near 1, in another order

    jax.effects_barrier()
    parts, replicas = sizes["seq"], sizes.get("data", 1)
    count = parts * len(schedule(rule, parts, T).holders[0])
    pairs = sum(needed(rule, count, rows) for rows in np.split(np.arange(B), replicas))
    assert (
        len(computed) == 2 * sizes.get("tensor", 1) * pairs
    )  # once in each pass, and none that is masked whole
    if parts == 8:  # no device holds all keys, nor keeps them for the backward pass
        assert "collective-permute" in text and "all-gather" not in text
        shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", text)
        assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < B * KV * T * D


@pytest.mark.parametrize(
    "rule, parts, length, holders, pairs",
    [
        # Of 4 pairs of halves: the two on the diagonal and one below it; then two, whoever's block it is.
        (Causal(), 3, 12, [(0, 5), (1, 4), (2, 3)], [[3, 3, 3], [2, 2, 2], [2, 2, 2]]),
        # Odd blocks can't be halved: the last device computes all, the first its own.
        (Causal(), 3, 9, [(0,), (1,), (2,)], [[1, 1, 1], [0, 1, 1], [0, 0, 1]]),
        # Queries 4-5 see keys 2-5, 6-7 see 4-7: two of the own pairs and one before; after the second turn, none.
        (Window(3), 4, 16, [(0, 1), (2, 3), (4, 5), (6, 7)], [[3, 3, 3, 3], [0, 1, 1, 1]]),
        # The first key travels through all turns, and each time somebody needs it.
        (
            Window(2, sinks=1),
            4,
            4,
            [(0,), (1,), (2,), (3,)],
            [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]],
        ),
        (Full(), 2, 4, [(0,), (1,)], [[1, 1], [1, 1]]),
    ],
)
def test_what_is_computed(rule: MaskRule, parts, length, holders, pairs):
    made = schedule(rule, parts, length)
    assert list(made.holders) == holders
    assert made.pairs().tolist() == pairs


def test_a_decoder_trains_as_on_one_device():
    """The loss of a step and the parameters after two, positions over 4 devices and rows over 2."""
    fields = dict(num_heads=2, head_dim=8, rotary=of(Rotary), kernel=of(RingAttention))
    block = of(Block, attention=of(Attention, **fields), mlp=of(GatedMLP, hidden_dim=16))
    shape = dict(vocab_size=64, width=16, max_length=16, num_layers=1, token_layout="batched")
    task = of(LanguageModelling, model=of(DecoderLM, blocks=(block,), **shape))

    def trained(mesh, devices):
        stage = of(Stage, name="s", steps=2, batch_size=4, optimizer=of(sgd, schedule=of(constant, peak=0.1)))
        trainer = build(of(Trainer, task=task, data=of(Numbers), stages=(stage,), mesh=mesh))
        state, metrics = trainer.train(progress=False, devices=devices)
        return metrics["train/loss"], state.params

    loss, params = trained({"data": 2, "seq": 4}, None)
    expected, one = trained({}, jax.devices()[:1])
    assert loss == pytest.approx(expected, rel=2e-6)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(
            a, b, atol=1e-6
        )  # a rate of 0.1 times gradients whose sums differ by rounding


class Numbers(RecordDataset):
    """Rows of random tokens."""

    def element_spec(self):
        spec = {
            name: jax.ShapeDtypeStruct((16,), np.int32)
            for name in self.take(np.arange(1))
            if name != "weights"
        }
        return spec | {"weights": jax.ShapeDtypeStruct((16,), np.float32)}

    def __len__(self):
        return 64

    def take(self, numbers):
        text = np.stack([np.random.default_rng(n).integers(0, 64, 17) for n in numbers]).astype(np.int32)
        ones = np.ones((len(numbers), 16), np.int32)
        places = np.broadcast_to(np.arange(16, dtype=np.int32), ones.shape)
        rows = {"tokens": text[:, :-1], "targets": text[:, 1:], "segments": ones, "positions": places}
        return rows | {"target_bytes": ones, "weights": ones.astype(np.float32)}


@pytest.mark.parametrize(
    "sizes, shape, message",
    [
        ({"seq": 8}, (1, 4, 12, 4), "12 positions are no multiple of the mesh's seq=8"),
        ({"seq": 4, "tensor": 2}, (1, 3, 16, 4), "3 heads over 3 key heads are no multiple of tensor=2"),
    ],
)
def test_what_does_not_divide_is_refused(sizes, shape, message):
    x = jnp.zeros(shape)
    with jax.set_mesh(make_mesh(sizes)), pytest.raises(UserError, match=message):
        RingAttention()(x, x, x, Causal(), segments=None, prefix=None, scale=1.0, softcap=None)


def test_a_mesh_that_nothing_in_the_model_follows_is_refused():
    task = of(LanguageModelling, model=decoder(width=16, num_layers=1, num_heads=2, hidden_dim=16, length=16))
    stage = of(Stage, name="s", steps=1, batch_size=4, optimizer=of(sgd, schedule=of(constant, peak=0.1)))
    trainer = build(of(Trainer, task=task, data=of(Numbers), stages=(stage,), mesh={"seq": 4, "data": 2}))
    with pytest.raises(UserError, match="seq=4 divides positions, but nothing in the model does"):
        trainer.run(progress=False)
