"""A dense model becomes a mixture that computes the same, a mixture becomes smaller, on disk and off."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import upcycle as program
from research.config_capture import capture
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.moe.upcycle import merge, upcycle
from research.nn.accounting import count_active_parameters, count_parameters
from research.nn.attention import Attention
from research.nn.mlp import MLP, GatedMLP
from research.nn.transformer import Block, scan_params
from research.training.model_directory import load_model_directory, save_model
from research.training.task import LanguageModelling

TOKENS = jnp.arange(12).reshape(2, 6) * 5 % 16
KEY = jax.random.key(7)


def decoder(*mlps, **fields) -> DecoderLM:
    blocks = tuple(Block(Attention(num_heads=2, head_dim=4), mlp) for mlp in mlps)
    return DecoderLM(vocab_size=16, width=8, max_length=16, num_layers=2, blocks=blocks, **fields)


@functools.partial(jax.jit, static_argnums=0)
def init(model):
    return model.init(jax.random.key(0), TOKENS)["params"]


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply({"params": params}, TOKENS)


@pytest.mark.parametrize("mlps, scanned", [((GatedMLP(12),), True), ((MLP(12, "relu"), GatedMLP(8)), False)])
def test_the_mixture_computes_what_the_dense_model_does(mlps, scanned):
    dense = decoder(*mlps, scan_layers=scanned)
    params = init(dense)
    model, mixed = upcycle(dense, params, 4, 2, KEY, balance_weight=0.0)
    expected = jax.eval_shape(model.init, KEY, TOKENS)["params"]
    assert jax.tree.map(jnp.shape, mixed) == jax.tree.map(jnp.shape, expected)
    # Gates add up to 1 within a rounding or two of 2**-24.
    np.testing.assert_allclose(logits(model, mixed), logits(dense, params), rtol=1e-5, atol=1e-5)
    routers = [leaf for path, leaf in jax.tree.leaves_with_path(mixed) if "router" in str(path)]
    assert all(leaf.std() > 0.1 for leaf in routers)  # drawn: tokens go to different experts

    smaller, merged = merge(model, mixed, 2)
    np.testing.assert_allclose(logits(smaller, merged), logits(dense, params), rtol=1e-5, atol=1e-5)
    back, restored = merge(model, mixed, 1)
    assert back == dense
    jax.tree.map(np.testing.assert_array_equal, restored, params)  # the mean of four copies is exact


def test_merging_averages_neighbours():
    model = decoder(MoE(num_experts=4, k=3, hidden_dim=4, router_bias=True))
    params = init(model)
    smaller, merged = merge(model, params, 2)
    assert (smaller.blocks[0].mlp.num_experts, smaller.blocks[0].mlp.k) == (2, 2)
    before, after = params["layer_1"]["mlp"], merged["layer_1"]["mlp"]
    kernel = before["experts"]["down"]["kernel"]
    np.testing.assert_allclose(after["experts"]["down"]["kernel"][1], (kernel[2] + kernel[3]) / 2, rtol=1e-6)
    kernel = before["router"]["kernel"]
    np.testing.assert_allclose(after["router"]["kernel"][:, 0], (kernel[:, 0] + kernel[:, 1]) / 2, rtol=1e-6)
    assert logits(smaller, merged).shape == (2, 6, 16)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m, p: upcycle(m, p, 8, 2, KEY), "the model has 4 experts a layer already"),
        (lambda m, p: merge(m, p, 3), "4 experts can't be merged into 3 equal groups"),
        (lambda m, p: merge(*merge(m, p, 1), 1), "no mixture of experts, so there is nothing to merge"),
        (
            lambda m, p: upcycle(*merge(m, p, 1), 2, 3, KEY),
            "k=3: a token goes to between 1 and all 2 experts",
        ),
    ],
)
def test_mistakes(make, message):
    model = decoder(MoE(num_experts=4, k=2, hidden_dim=4))
    with pytest.raises(UserError, match=message):
        make(model, init(model))


def test_active_parameters():
    model = decoder(MoE(num_experts=4, k=1, hidden_dim=4), GatedMLP(4))
    params = init(model)
    experts = 4 * 3 * 8 * 4  # of which a token meets a quarter
    assert count_active_parameters(model, params) == count_parameters(params) - experts * 3 // 4
    scanned = model.clone(scan_layers=True)
    assert count_active_parameters(scanned, scan_params(params, 2)) == count_active_parameters(model, params)
    # A model that reads images holds a decoder, and has as many layers.
    held = SimpleNamespace(decoder=model, num_layers=model.num_layers)
    assert count_active_parameters(held, {"decoder": params}) == count_active_parameters(model, params)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = decoder(GatedMLP(12))
    directory = tmp_path_factory.mktemp("models") / "dense"
    save_model(directory, capture(model), init(model))
    return directory


def call(capsys, *arguments) -> tuple[int, str]:
    code = program.PROGRAM.call(program.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_program_and_training_from_what_it_wrote(dense, capsys):
    mixture = dense.with_name("mixture")
    code, text = call(capsys, dense, "--experts=4", "--k=2", f"--output={mixture}")
    assert code == 0 and "with the outputs of the dense model" in text
    loaded, original = load_model_directory(mixture), load_model_directory(dense)
    np.testing.assert_allclose(
        logits(loaded.model, loaded.params), logits(original.model, original.params), rtol=1e-5, atol=1e-5
    )
    assert hasattr(LanguageModelling(loaded.model, start_from=str(mixture)), "start")
    assert not hasattr(LanguageModelling(loaded.model), "start")
    started = LanguageModelling(loaded.model, start_from=str(mixture)).start(KEY)
    jax.tree.map(np.testing.assert_array_equal, started, loaded.params)

    other = LanguageModelling(decoder(MoE(num_experts=8, k=2, hidden_dim=12)), start_from=str(mixture))
    with pytest.raises(UserError, match=r"does not fit the model.*float32\[4, .*experiments.upcycle"):
        other.start(KEY)

    code, text = call(capsys, mixture, "--experts=8", f"--output={dense.with_name('more')}")
    assert code == 2 and "has 4 experts a layer already" in text
    code, text = call(capsys, mixture, "--experts=2", f"--output={dense.with_name('merged')}")
    assert code == 0 and "merged from 4, which changes its outputs" in text
    assert call(capsys, "--experts=2", "--output=x")[0] == 2


def test_a_checkpoint_with_another_number_of_experts_names_the_command(dense, capsys):
    mixture = dense.with_name("other")
    call(capsys, dense, "--experts=4", f"--output={mixture}")
    file = mixture / "config.json"
    config = json.loads(file.read_text())
    text = json.dumps(config)
    assert text.count('"num_experts": 4') == 1
    file.write_text(text.replace('"num_experts": 4', '"num_experts": 8'))
    with pytest.raises(
        UserError, match=r"does not fit its config: .*float32\[4, .*python -m experiments.upcycle"
    ):
        load_model_directory(mixture)
