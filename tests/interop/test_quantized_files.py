"""Packed checkpoints of GPTQ and AWQ: codes unpacked by hand, whole directories, and one line for what is not read."""

import functools
import hashlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import convert
from research.config_capture import capture
from research.errors import UserError
from research.interop.families import FAMILIES
from research.interop.huggingface import load, save
from research.interop.names import flatten, stored
from research.interop.quantized_files import PackedFiles, Packing, read_packing, unpack
from research.nn.quantized import Quantized
from research.nn.weights import Permuted
from research.training.model_directory import save_model
from research.training.workdir import load_model

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that a nibble of a word is
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
QUERY = "model.layers.0.self_attn.q_proj."
SIZES = {"intermediate_size": 24, "num_hidden_layers": 1, "tie_word_embeddings": True}


def words(*values):
    return np.array(values, np.uint32).view(np.int32)


def test_nibbles_from_the_lowest_bits():
    """0x76543210 has digit i at 16**i; the highest bit is no sign."""
    np.testing.assert_array_equal(unpack(words(0x76543210, 0xFEDCBA98)), np.arange(16))
    # Of AWQ the outputs 0, 2, 4, 6, 1, 3, 5, 7 have the codes 0 to 7, so outputs 0, 1, 2, ... have 0, 4, 1, ...
    np.testing.assert_array_equal(unpack(words(0x76543210), AWQ), [0, 4, 1, 5, 2, 6, 3, 7])


def packed(codes, order=range(8)):
    """uint8[..., 8 n] -> int32[..., n]: word = sum over i of 16**i * code[order[i]]."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.int64)
    return sum(16**i * eight[..., place] for i, place in enumerate(order)).astype(np.uint32).view(np.int32)


@pytest.fixture
def write(tmp_path, model_of, random_params):
    """Writes a directory whose projections are packed; gives it and the kernels by parameter path."""

    def make(config, *, offset=1, symmetric=False, family="llama", shuffled=False, **options):
        model = model_of(family, **SIZES | options)
        target = tmp_path / "packed"
        save(model, {"params": random_params(model)}, target)
        tensors = load_file(target / "model.safetensors")
        rng, kernels = np.random.default_rng(1), {}
        for name in [name for name in tensors if re.search(r"_proj\.|\.w[123]\.", name)]:
            columns, rows = tensors.pop(name).shape
            prefix, groups = name.removesuffix("weight"), rows // 8
            codes = rng.integers(0, 16, (rows, columns), np.uint8)
            zeros = rng.integers(1, 16, (groups, columns), np.uint8)
            zeros[:] = 8 if symmetric else zeros
            scales = rng.uniform(0.5, 1.0, (groups, columns)).astype(np.float16)
            owner = np.arange(rows) // 8
            tensors[prefix + "scales"] = scales
            if config.get("quant_method") == "awq" or "w_bit" in config:
                tensors[prefix + "qweight"], tensors[prefix + "qzeros"] = (
                    packed(codes, AWQ),
                    packed(zeros, AWQ),
                )
            else:
                tensors[prefix + "qweight"] = np.ascontiguousarray(packed(codes.T).T)
                tensors[prefix + "qzeros"] = packed(zeros - offset)
                inputs = rng.permutation(rows) if shuffled else np.arange(rows)
                tensors[prefix + "g_idx"] = owner = (inputs // 8).astype(np.int32)
                tensors[prefix + "bias"] = np.zeros(columns, np.float16)
            spread = [part.astype(np.float32)[owner] for part in (zeros, scales)]
            kernels[name] = (codes - spread[0]) * spread[1]
        save_file(tensors, target / "model.safetensors")
        content = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
        return target, kernels

    return make


def kernels_of(params):
    return {path: leaf for path, leaf in flatten(params) if isinstance(leaf, Quantized)}


@pytest.mark.parametrize(
    ("config", "offset"),
    [(GPTQ_CONFIG, 1), ({**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}, 0), (AWQ_CONFIG, 0)],
    ids=["gptq", "gptq_v2", "awq"],
)
def test_every_kernel_is_exact(write, config, offset):
    """(code - zero) * scale in float32, packed codes and scales of 16 bits in memory; zero biases are dropped."""
    directory, wanted = write(config, offset=offset)
    _, variables, _ = load(directory)
    found = kernels_of(variables["params"])
    assert len(found) == len(wanted) == 7
    for name, path in (
        (QUERY, "layer_0/attention/query/kernel"),
        ("model.layers.0.mlp.down_proj.", "layer_0/mlp/down/kernel"),
    ):
        kernel = found[path]
        np.testing.assert_array_equal(kernel.materialize(), wanted[name + "weight"])
        assert (kernel.group, str(kernel.scale.dtype), str(kernel.zero.dtype)) == (8, "float16", "uint8")
    # 24 * 16 codes of 4 bits, 3 * 16 scales of 16 bits, 3 * 16 zeros of 8 bits.
    assert found["layer_0/mlp/down/kernel"].stored_bits() == 24 * 16 * 4 + 3 * 16 * (16 + 8)


def test_act_order_is_read_as_it_is(write, tmp_path):
    """The group of input k is g_idx[k], whatever k: (code - zero[g_idx[k]]) * scale[g_idx[k]], in products as well."""
    directory, wanted = write({**GPTQ_CONFIG, "desc_act": True}, shuffled=True)
    model, variables, _ = load(directory)
    for name, path in ((QUERY, ("attention", "query")), ("model.layers.0.mlp.down_proj.", ("mlp", "down"))):
        kernel = functools.reduce(lambda tree, key: tree[key], path, variables["params"]["layer_0"])["kernel"]
        assert isinstance(kernel, Permuted) and kernel.kernel.group == 8 and kernel.order.dtype == np.uint16
        np.testing.assert_array_equal(kernel.materialize(), wanted[name + "weight"])
        x = np.random.default_rng(0).integers(-4, 5, (3, kernel.shape[0])).astype(np.float32)
        exact = x.astype(np.float64) @ wanted[name + "weight"]
        np.testing.assert_allclose(kernel.dot(x), exact, rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(kernel.narrow(None, 8).materialize(), wanted[name + "weight"][:, :8])
        # 4 bits a code, 16 and 8 for a group's scale and zero, 16 for the place of an input.
        rows, columns = kernel.shape
        assert kernel.stored_bits() == rows * columns * 4 + rows // 8 * columns * 24 + rows * 16
        with pytest.raises(UserError, match=f"first 8 of {rows} inputs lie scattered"):
            kernel.narrow(8, None)
    save_model(tmp_path / "kept", capture(model), variables["params"])
    again = load_model(str(tmp_path / "kept")).params
    jax.tree.map(np.testing.assert_array_equal, again, variables["params"])


@pytest.mark.parametrize(
    ("peer", "kind"), [("gptqmodel", Permuted), ("autogptq", Permuted), ("autoawq", Quantized)]
)
def test_what_others_wrote(peer, kind):
    """Quantized and saved by the code of others (`packed/make.py`): every kernel is to the last bit what that code
    multiplies out, logits are those of transformers with them."""
    directory = Path(__file__).parent / "packed" / peer
    expected = json.loads((directory / "expected.json").read_text())
    model, variables, _ = load(directory)
    found = {}
    for path, leaf in flatten(variables["params"]):
        if isinstance(leaf, Quantized | Permuted):
            assert isinstance(leaf, kind)
            name = stored(path, leaf.shape, FAMILIES["llama"]).names[0].removesuffix(".weight")
            found[name] = hashlib.sha256(np.asarray(leaf.materialize(), np.float32).tobytes()).hexdigest()
    assert found == expected["kernels"] and len(found) == 7
    logits = jax.jit(model.apply)(variables, np.array([expected["tokens"]]))[0]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    if peer == "gptqmodel":
        # Outputs 2 and 3 have positive weights only: zeros of 0 side by side, stored as 15 and, lent from, 14.
        query = variables["params"]["layer_0"]["attention"]["query"]["kernel"]
        np.testing.assert_array_equal(query.kernel.zero[:, 2:4], 0)


@pytest.mark.parametrize("config", [{**GPTQ_CONFIG, "sym": True}, {**AWQ_CONFIG, "zero_point": False}])
def test_symmetric_grids_keep_no_zeros(write, config):
    """GPTQModel stores zeros of 8 as well where AWQ's config says that there are none."""
    directory, wanted = write(config, symmetric=True)
    kernel = load(directory)[1]["params"]["layer_0"]["attention"]["query"]["kernel"]
    assert kernel.zero is None
    np.testing.assert_array_equal(kernel.materialize(), wanted[QUERY + "weight"])


def test_experts_become_one_stack(write):
    directory, wanted = write(AWQ_CONFIG, family="mixtral", num_local_experts=2, num_experts_per_tok=1)
    experts = load(directory)[1]["params"]["layer_0"]["mlp"]["experts"]
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    stack = np.stack([wanted[name.format(i)] for i in (0, 1)])
    np.testing.assert_array_equal(experts["down"]["kernel"].materialize(), stack)


def test_convert_keeps_it_packed_and_multiplies_it_out(write, tmp_path):
    """The config in a file beside config.json, in AutoAWQ's names."""
    old = {"w_bit": 4, "q_group_size": 8, "zero_point": True, "version": "GEMM"}
    directory, wanted = write(old)
    content = json.loads((directory / "config.json").read_text())
    del content["quantization_config"]
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "quant_config.json").write_text(json.dumps(old))

    def run(start, target, kind):
        flags = [f"--from={start}", f"--to={tmp_path / target}", f"--format={kind}"]
        assert convert.PROGRAM.call(convert.main, flags) == 0

    run(directory, "lathe", "lathe")
    kept = kernels_of(load_model(str(tmp_path / "lathe")).params)
    jax.tree.map(np.testing.assert_array_equal, kept, kernels_of(load(directory)[1]["params"]))
    assert len(kept) == 7
    run(tmp_path / "lathe", "floats", "huggingface")
    floats = load_file(tmp_path / "floats" / "model.safetensors")
    np.testing.assert_array_equal(floats[QUERY + "weight"], wanted[QUERY + "weight"].T)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GPTQ_CONFIG, "bits": 3}, "bits is 3; accepted: 4"),
        ({**GPTQ_CONFIG, "quant_method": "hqq"}, 'quant_method is "hqq"; accepted: awq, gptq'),
        ({**GPTQ_CONFIG, "checkpoint_format": "marlin"}, 'is "marlin"; accepted: gptq, gptq_v2'),
        ({**GPTQ_CONFIG, "dynamic": {"-:.*down.*": {}}}, "dynamic is .*accepted: nothing"),
        ({**GPTQ_CONFIG, "group_size": 0}, "group_size is 0; accepted: a whole number from 1"),
        ({**AWQ_CONFIG, "version": "gemv"}, 'version is "gemv"; accepted: gemm'),
    ],
)
def test_options_that_are_not_read(tmp_path, config, message):
    with pytest.raises(UserError, match=message) as error:
        read_packing(tmp_path, {"quantization_config": config})
    assert "\n" not in str(error.value)


class Memory:
    """Tensors of one layer of 16 inputs and 8 outputs that are all zero, with changes."""

    directory = Path("packed")

    def __init__(self, **changes):
        tensors = {
            "qweight": np.zeros((2, 8), np.int32),
            "qzeros": np.zeros((2, 1), np.int32),
            "scales": np.ones((2, 8), np.float16),
            "g_idx": np.repeat([0, 1], 8).astype(np.int32),
        } | changes
        self.tensors = {f"x.{name}": value for name, value in tensors.items() if value is not None}
        self.names = list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]

    read_words = read


def test_one_layer_by_hand():
    """Of output 1, input 9 (bits 4 to 7 of the second word) has the code 0xD = 13; the zero of its group is stored as
    6, that is 7; its scale is 1/2: (13 - 7) / 2 = 3. All other codes are 0 and zeros 1: (0 - 1) * 1 = -1."""
    codes, zeros, scales = np.zeros((2, 8), np.int32), np.zeros((2, 1), np.int32), np.ones((2, 8), np.float16)
    codes[1, 1], zeros[1], scales[1, 1] = 0xD << 4, 6 << 4, 0.5
    files = PackedFiles(Memory(qweight=codes, qzeros=zeros, scales=scales), Packing("gptq", 8, 1))
    wanted = np.full((16, 8), -1.0)
    wanted[8:, 1] = (0 - 7) / 2
    wanted[9, 1] = 3
    np.testing.assert_array_equal(files.kernel(("x.weight",), False).materialize(), wanted)
    assert files.names == ["x.weight"] and files.shape("x.weight") == (8, 16)


def test_groups_out_of_order_by_hand():
    """Even inputs are of group 1 with scale 2, odd ones of group 0 with scale 1; codes of input k are k // 2, zeros
    3."""
    codes = np.ascontiguousarray(packed(np.repeat(np.arange(8), 2)[None].repeat(8, 0).astype(np.uint8)).T)
    scales = np.stack([np.ones(8), np.full(8, 2)]).astype(np.float16)
    zeros, owner = packed(np.full((2, 8), 2, np.uint8)), np.array([1, 0] * 8, np.int32)
    files = PackedFiles(
        Memory(qweight=codes, qzeros=zeros, scales=scales, g_idx=owner), Packing("gptq", 8, 1)
    )
    kernel = files.kernel(("x.weight",), False)
    wanted = [-6, -3, -4, -2, -2, -1, 0, 0, 2, 1, 4, 2, 6, 3, 8, 4]
    np.testing.assert_array_equal(kernel.materialize(), np.repeat(np.array(wanted)[:, None], 8, axis=1))
    np.testing.assert_array_equal(kernel.order, [1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14])
    stack = files.kernel(("x.weight", "x.weight"), True)
    np.testing.assert_array_equal(stack.materialize()[1], kernel.materialize())


@pytest.mark.parametrize(
    ("changes", "group", "message"),
    [
        (
            {"g_idx": np.array([1] * 9 + [0] * 7, np.int32)},
            8,
            "g_idx does not give each of 2 groups 8 inputs",
        ),
        ({"qzeros": words([0xF], [0])}, 8, "qzeros holds 15, which stands for 16 .* gptq_v2"),
        ({"qzeros": None}, 8, "missing tensors x.qzeros"),
        ({"g_idx": np.zeros(8, np.int32)}, 8, r"x.g_idx is \[8\]; groups of 8 inputs ask for \[16\]"),
        ({}, None, r"x.qzeros is \[2, 1\]; groups of 16 inputs ask for \[1, 1\]"),
        ({}, 5, "of 16 inputs and 8 outputs, which groups of 5 inputs"),
        ({"qweight": np.zeros(8, np.int32)}, 8, r"x.qweight is \[8\], no matrix"),
    ],
)
def test_tensors_that_are_not_read(changes, group, message):
    with pytest.raises(UserError, match=message) as error:
        PackedFiles(Memory(**changes), Packing("gptq", group, 1)).kernel(("x.weight",), False)
    assert "\n" not in str(error.value)


def test_biases_of_packed_layers(write):
    """Zeros are what AutoGPTQ writes where there are none; others are the model's, and Llama has none."""
    directory, _ = write(GPTQ_CONFIG)
    path = directory / "model.safetensors"
    save_file({**load_file(path), QUERY + "bias": np.ones(16, np.float16)}, path)
    with pytest.raises(UserError, match="tensors that llama doesn't have: .*self_attn.q_proj.bias"):
        load(directory)


def test_config_of_packed_kernels_that_are_none(checkpoint, edit):
    edit(checkpoint / "config.json", quantization_config=GPTQ_CONFIG)
    with pytest.raises(UserError, match="no tensor is a qweight, though gptq is what its config says"):
        load(checkpoint)
