"""Structured weights in checkpoints, model directories, meshes and stages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research.config_capture import capture
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.normal_float import quantize_normal
from research.nn.quantized import Quantized, quantize
from research.nn.transformer import Block
from research.nn.weights import LowRank, Sum, stored_bits
from research.training.checkpoints import Checkpoints
from research.training.model_directory import abstract_params, load_model_directory, save_model
from research.training.optimizers import constant, sgd
from research.training.partitioning import device_bytes, make_mesh, parameter_shardings
from research.training.paths import map_named, named_leaves
from research.training.stages import Stage, merge, split
from research.training.structures import structures, with_structures
from research.training.workdir import read_checkpoint

MODEL = DecoderLM(
    vocab_size=16,
    width=16,
    num_layers=1,
    max_length=8,
    blocks=(Block(Attention(num_heads=2, head_dim=8), GatedMLP(16)),),
)


def mixed_params():
    """One kernel of each kind among random arrays."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(MODEL, (jax.ShapeDtypeStruct((1, 2), jnp.int32),))
    params = map_named(lambda _, leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    mlp, attention = params["layer_0"]["mlp"], params["layer_0"]["attention"]
    gate, up, query = mlp["gate"]["kernel"], mlp["up"]["kernel"], attention["query"]["kernel"]
    mlp["gate"]["kernel"] = quantize(gate, 3, 8, symmetric=False, scale_dtype=jnp.float16)
    low = LowRank(jnp.asarray(up[:, :2], jnp.bfloat16), up[:2])
    mlp["up"]["kernel"] = Sum((quantize(up, 4), low))
    attention["query"]["kernel"] = quantize_normal(query, 4, 8, scale_block=8)
    return params


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (name, here), there in zip(named_leaves(found).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(here, there, name, strict=True)


def test_they_are_saved_and_read_exactly(tmp_path):
    params, abstract = mixed_params(), abstract_params(MODEL, (jax.ShapeDtypeStruct((1, 2), jnp.int32),))
    save_model(tmp_path / "model", capture(MODEL), params)
    assert_same(load_model_directory(tmp_path / "model").params, params)
    described = json.loads(json.dumps(structures(params)))
    assert set(described) == {f"layer_0/{p}/kernel" for p in ("attention/query", "mlp/gate", "mlp/up")}
    again = with_structures(abstract, described, "here")
    assert jax.tree.structure(again) == jax.tree.structure(params)

    run = Checkpoints(tmp_path / "checkpoints", warn=print, asynchronous=False)
    run.save(3, {"params": params}, {"record": 0})
    assert_same(read_checkpoint(tmp_path, abstract)[0], params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert_same(run.restore(3, {"params": shapes})[0]["params"], params)
    # The same arrays in another order of rows are other weights.
    gate = shapes["layer_0"]["mlp"]["gate"]
    gate["kernel"] = gate["kernel"].replace(tile=8)
    with pytest.raises(UserError, match="params/layer_0/mlp/gate/kernel is .*'tile': 16.* but .*'tile': 8"):
        run.restore(3, {"params": shapes})
    run.close()


def test_wrong_descriptions_are_named(tmp_path):
    abstract = {"a": {"kernel": jax.ShapeDtypeStruct((16, 4), jnp.float32)}}
    good = structures({"a": {"kernel": quantize(jnp.ones((16, 4)), 4)}})["a/kernel"]
    for description, message in (
        (good | {"kind": "Popen"}, "a/kernel is described wrongly: there is no kind 'Popen'"),
        (good | {"bits": 5}, "bits=5 is not supported"),
        (good | {"tile": "16"}, "tile=16 does not hold whole bytes"),
        (good | {"code": 1}, "a Quantized has the fields codes, scale, zero, bits, tile"),
        (good | {"bits": 2}, "are not tiles|32"),
        ([1], "1 is no description"),
        ({"dtype": "object", "shape": [16, 4]}, "describes no array"),
    ):
        with pytest.raises(UserError, match=message):
            with_structures(abstract, {"a/kernel": description}, "file")
    with pytest.raises(UserError, match="file: b/kernel is a structured weight that is not expected here"):
        with_structures(abstract, {"b/kernel": good}, "file")

    class Other(LowRank):
        pass

    with pytest.raises(UserError, match="a/kernel: a Other cannot be saved; .* materialize it first"):
        structures({"a": {"kernel": Other(jnp.ones((16, 1)), jnp.ones((1, 4)))}})
    save_model(tmp_path / "model", capture(MODEL), mixed_params())
    path = tmp_path / "model" / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = safetensors.numpy.load_file(path)
    arrays["layer_0/mlp/gate/kernel/codes"] = arrays["layer_0/mlp/gate/kernel/codes"].astype(np.int8)
    safetensors.numpy.save_file(arrays, path, metadata=metadata)
    with pytest.raises(UserError, match="gate/kernel/codes has type int8; uint8 is described"):
        load_model_directory(tmp_path / "model")


def test_codes_and_scales_are_divided_like_the_kernel():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 16)), jnp.float32)
    params = {
        "layer_0": {
            "mlp": {"up": {"kernel": quantize(w[0], 4, 8)}, "gate": {"kernel": quantize(w[0], 4)}},
            "moe": {"experts": {"down": {"kernel": quantize(w, 2, 16)}}},
        },
        "low": {"up": {"kernel": LowRank(w[0, :, :3], w[0, :3])}},
    }
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    shardings = parameter_shardings(params, mesh)
    specs = {name: tuple(sharding.spec) for name, sharding in named_leaves(shardings).items()}
    assert specs == {
        "layer_0/mlp/gate/kernel/codes": ("fsdp", "tensor"),
        "layer_0/mlp/gate/kernel/scale": (None, "tensor"),  # one group
        "layer_0/mlp/up/kernel/codes": ("fsdp", "tensor"),
        "layer_0/mlp/up/kernel/scale": ("fsdp", "tensor"),
        "layer_0/moe/experts/down/kernel/codes": ("expert", "tensor", "fsdp"),
        "layer_0/moe/experts/down/kernel/scale": ("expert", "tensor", "fsdp"),
        "low/up/kernel/down": ("fsdp",),
        "low/up/kernel/up": (None, "tensor"),
    }
    up, rule = params["layer_0"]["mlp"]["up"], shardings["layer_0"]["mlp"]["up"]
    placed = jax.device_put(up, rule)["kernel"]
    assert device_bytes(up, rule) * 4 * 8 == stored_bits(up)
    x = jnp.ones((3, 64))
    np.testing.assert_allclose(jax.jit(lambda k: k.dot(x))(placed), x @ up["kernel"].materialize(), atol=1e-5)


def test_a_stage_trains_scales_and_holds_codes():
    params = {"up": {"kernel": quantize(jnp.asarray(np.random.default_rng(0).normal(size=(8, 4))), 4)}}
    stage = Stage("main", steps=1, batch_size=1, optimizer=sgd(constant(0.1)))
    mask = stage.mask(params)
    assert named_leaves(mask) == {"up/kernel/codes": False, "up/kernel/scale": True}
    trainable, frozen = split(params, mask)
    x = jnp.ones((1, 8))
    loss = jax.jit(jax.grad(lambda t: merge(t, frozen)["up"]["kernel"].dot(x).sum()))
    gradient = loss(trainable)["up"]["kernel"]
    kernel: Quantized = params["up"]["kernel"]
    # d/dscale of sum_k (code - 8) scale; codes have no place in the gradient at all.
    expected = (np.asarray(kernel.unpacked(), np.float32) - 8).sum(0, keepdims=True)
    np.testing.assert_allclose(gradient.scale, expected)
    assert gradient.codes is None
