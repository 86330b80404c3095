"""Sharding by rule on 8 simulated devices: errors, exact memory, and the same step as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block
from research.training import partitioning
from research.training.partitioning import make_mesh, parameter_shardings
from research.training.paths import named_leaves
from research.training.task import Classification, LanguageModelling
from research.vision.vit import ViT


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def decoder():
    layer = {
        "attention": {name: {"kernel": (16, 16)} for name in ("query", "key", "value", "output")},
        "mlp": {"gate": {"kernel": (16, 32)}, "up": {"kernel": (16, 32)}, "down": {"kernel": (32, 16)}},
        "mlp_norm": {"scale": (16,)},
    }
    tree = {
        "embedding": {"table": (64, 16)},
        "layer_0": layer,
        "layer_1": layer,
        "head": {"kernel": (16, 64)},
    }
    make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return jax.tree.map(make, tree, is_leaf=lambda x: isinstance(x, tuple))


def specs(params, mesh, rules=()):
    return {path: s.spec for path, s in named_leaves(parameter_shardings(params, mesh, rules)).items()}


def test_default_rules_cover_a_decoder():
    found = specs(decoder(), make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    into, out = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    assert found["layer_0/attention/query/kernel"] == found["layer_1/mlp/gate/kernel"] == into
    assert found["layer_0/attention/output/kernel"] == found["layer_1/mlp/down/kernel"] == out
    assert found["embedding/table"] == PartitionSpec(("tensor", "fsdp")) and found["head/kernel"] == into
    assert found["layer_0/mlp_norm/scale"] == PartitionSpec()


def test_specs_fit_the_last_dimensions():
    stacked = {"layers": {"mlp": {"up": shapes(kernel=(3, 16, 32))}}}
    found = specs(stacked, make_mesh({"fsdp": 8}))
    assert found["layers/mlp/up/kernel"] == PartitionSpec(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    "rules, message",
    [
        (
            (("mlp/upp", ("fsdp",)),),
            "rules: 'mlp/upp' matches none of the 18 parameters; did you mean 'mlp/up'?",
        ),
        ((("mlp/up", ("fspd",)),), "names the unknown axis 'fspd'; did you mean 'fsdp'?"),
        (
            (("scale", ("fsdp", None)),),
            r"spec .'fsdp', None. has 2 entries but layer_0/mlp_norm/scale has shape",
        ),
        (
            (("query/kernel", (("fsdp", "tensor"), None)), ("embedding", (None, ("data", "fsdp", "tensor")))),
            r"embedding/table of shape \(64, 16\) cannot be divided by .*: 16 is not a multiple of 32",
        ),
    ],
)
def test_wrong_rules_are_named(rules, message):
    mesh = make_mesh({"fsdp": 8})
    if "32" in message:
        mesh = jax.sharding.AbstractMesh((4, 4, 2, 1, 1), partitioning.AXES)
    with pytest.raises(UserError, match=message):
        parameter_shardings(decoder(), mesh, rules)


def test_large_leaf_without_a_rule_is_named_and_a_small_one_is_replicated():
    mesh = make_mesh({"fsdp": 8})
    assert specs(shapes(odd=(255, 257)), mesh)["odd"] == PartitionSpec()  # 65 535 elements
    with pytest.raises(UserError, match=r"no rule matches odd of shape \(256, 256\); add \('odd', spec\)"):
        parameter_shardings(shapes(odd=(256, 256)), mesh)
    assert specs(shapes(odd=(256, 256)), mesh, (("odd", ()),))["odd"] == PartitionSpec()


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsd": 2}, "unknown axis 'fsd'; did you mean 'fsdp'?"),
        ({"fsdp": 3}, "fsdp=3 does not divide 8 devices"),
        ({"data": 2, "fsdp": 2}, "data=2, fsdp=2 does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1, not data and fsdp"),
        ({"data": 0}, "axis 'data' has size 0"),
    ],
)
def test_wrong_meshes_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes)


def test_mesh_sizes():
    assert dict(make_mesh({}).shape) == {"data": 8, "fsdp": 1, "tensor": 1, "expert": 1, "seq": 1}
    assert make_mesh({"fsdp": -1, "tensor": 2}).shape["fsdp"] == 4
    assert make_mesh({"tensor": 2}).shape["data"] == 4


def test_table_counts_bytes_on_one_device():
    params = decoder()
    text = partitioning.table(params, parameter_shardings(params, make_mesh({"fsdp": 4, "tensor": 2})))
    # Two layers' query kernels: 2 * 16 * 16 * 4 bytes / 8 devices.
    assert "layer_*/attention/query/kernel   2" in text and "fsdp, tensor  256" in text
    # Elements: 2 * (4 * 256 + 3 * 512) + 2 * 1024 divided by 8, and 2 * 16 replicated.
    total = 4 * ((2 * (4 * 256 + 3 * 512) + 2 * 1024) // 8 + 2 * 16)
    assert text.splitlines()[-1].split() == ["total", f"{total:,}"]


def bytes_on(device, tree) -> int:
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def test_fsdp_divides_parameters_and_optimizer_by_the_devices(toy):
    one, _ = toy.trainer(stages=(toy.stage(steps=1),)).train(progress=False, devices=toy.one_device)
    eight, _ = toy.trainer(stages=(toy.stage(steps=1),), mesh={"fsdp": 8}).train(progress=False)
    for device in jax.devices():
        # Matrices: 16*8 + 8*16 + 16*8 + 8*16 elements; replicated: a scale of 8.
        assert bytes_on(device, eight.params) == 4 * (512 // 8 + 8)
        # Adam keeps two moments of each, and two int32 counts.
        assert bytes_on(device, eight.opt_state) == 4 * (2 * (512 // 8 + 8) + 2)
    assert bytes_on(jax.devices()[0], one.params) == 4 * (512 + 8)


@pytest.mark.parametrize(
    "mesh, accumulate",
    [
        ({"data": 8}, 1),
        ({"fsdp": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
        ({"fsdp": 4, "tensor": 2}, 2),
    ],
)
def test_one_and_eight_devices_take_the_same_steps(toy, mesh, accumulate):
    losses = {}
    for name, where in (("one", dict(devices=toy.one_device)), ("eight", {})):
        stages = (toy.stage(steps=3, accumulate=accumulate),)
        trainer = toy.trainer(stages=stages, mesh={} if name == "one" else mesh)
        losses[name] = trainer.train(progress=False, **where)
    # The devices differ in the order in which float32 sums are added. Sums of 32 terms of one magnitude
    # differ by at most 32 half-units of 2**-24, some 2e-6 of their size; Adam's update is bounded by the rate
    # (1e-2) but near a zero gradient it is a ratio of two roundings, so three steps allow parameters more.
    (one, metrics), (eight, others) = losses["one"], losses["eight"]
    assert others["train/loss"] == pytest.approx(metrics["train/loss"], rel=2e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_decoder_takes_the_same_steps_on_every_mesh_axis(toy):
    block = Block(attention=Attention(num_heads=4, head_dim=4, num_kv_heads=2), mlp=GatedMLP(hidden_dim=32))
    model = DecoderLM(vocab_size=toy.VOCAB, width=16, max_length=toy.LENGTH, num_layers=1, blocks=(block,))
    results = []
    for mesh, where in (({}, dict(devices=toy.one_device)), ({"data": 2, "fsdp": 2, "tensor": 2}, {})):
        trainer = toy.trainer(task=LanguageModelling(model), stages=(toy.stage(steps=2),), mesh=mesh)
        results.append(trainer.train(progress=False, **where))
    # As above: 32 tokens and widths up to 32, so 2e-6 for sums, taken through two layers' products.
    assert results[1][1]["train/loss"] == pytest.approx(results[0][1]["train/loss"], rel=4e-6)


def test_optimizer_state_that_follows_no_parameter_is_named():
    mesh = make_mesh({"fsdp": 8})
    params = {"up": shapes(kernel=(16, 32))}
    shardings = parameter_shardings(params, mesh)
    small = {"mu": params, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    followed = partitioning.follow_parameters(small, params, shardings)
    assert followed["mu"]["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    with pytest.raises(UserError, match=r"optimizer state factor of shape \(256, 256\) follows no parameter"):
        partitioning.follow_parameters(shapes(factor=(256, 256)), params, shardings)


def test_batch_must_divide_over_the_devices(toy):
    with pytest.raises(
        UserError, match=r"stage 'main': batch_size 12 is not a multiple of the 8 parts .*data=8"
    ):
        toy.trainer(stages=(toy.stage(batch_size=12),)).train(progress=False)
    with pytest.raises(UserError, match="microbatch 4 is not a multiple of the 8 parts"):
        toy.trainer(stages=(toy.stage(accumulate=2),)).train(progress=False)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_default_rules_cover_every_large_parameter_of_the_models(scan_layers):
    block = Block(attention=Attention(num_heads=4, head_dim=8, num_kv_heads=2), mlp=GatedMLP(hidden_dim=64))
    decoder = DecoderLM(
        vocab_size=64,
        width=32,
        max_length=16,
        num_layers=2,
        blocks=(block,),
        tied_head=False,
        scan_layers=scan_layers,
    )
    image_block = Block(
        attention=Attention(num_heads=4, head_dim=8, rule=Full()), mlp=GatedMLP(hidden_dim=64)
    )
    vit = ViT(
        num_classes=8,
        width=32,
        patch=4,
        num_layers=2,
        blocks=(image_block,),
        pool="class",
        scan_layers=scan_layers,
    )
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for task in (LanguageModelling(decoder), Classification(vit, image_shape=(8, 8, 4))):
        params = jax.eval_shape(task.init, jax.random.key(0))
        # From the first element on, a parameter that no rule matches is an error.
        shardings = parameter_shardings(params, mesh, replicate_below=1)
        for path, sharding in named_leaves(shardings).items():
            axes = {axis for entry in sharding.spec if entry for axis in np.atleast_1d(entry)}
            if path.endswith("kernel"):
                assert axes == {"fsdp", "tensor"}, path


class Chip:
    """A device of one of several slices."""

    platform, device_kind = "other", "other"

    def __init__(self, number: int, slices: int):
        self.id = number
        self.slice_index = self.process_index = number * slices // 16


def test_slices_lie_along_data_or_else_along_fsdp():
    def slice_numbers(sizes, slices):
        grid = make_mesh(sizes, [Chip(i, slices) for i in range(16)]).devices
        return np.vectorize(lambda chip: chip.slice_index)(grid).reshape(grid.shape[:2])

    # data x fsdp: each row of data is one slice, which fsdp never leaves.
    assert slice_numbers({"data": 2, "fsdp": 8}, 2).tolist() == [[0] * 8, [1] * 8]
    assert slice_numbers({"data": 4, "fsdp": 4}, 2).tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    assert slice_numbers({"fsdp": 16}, 2).tolist() == [[0] * 8 + [1] * 8]
    with pytest.raises(UserError, match="neither data=1 nor fsdp=2 is a multiple"):
        make_mesh({"fsdp": 2, "tensor": 8}, [Chip(i, 4) for i in range(16)])


def test_what_is_whole_though_large_is_marked():
    params = {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}}}
    for sizes, rules, marked in (
        ({"fsdp": 8}, (("mlp/up/kernel", ()),), True),
        ({"fsdp": 8}, (), False),
        ({"data": 8}, (), False),  # nothing is meant to be divided
    ):
        text = partitioning.table(params, parameter_shardings(params, make_mesh(sizes), rules))
        assert ("large, and whole on every device" in text) == marked
