"""The mixture of LoRA experts: one expert a token for all projections, and what trains the router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.adapters import mole
from research.adapters.lora import LoRA, flat, tree
from research.adapters.mole import LoRAExperts, MoLE
from research.adapters.tuning import AdapterTuning
from research.config import build
from research.errors import UserError
from research.moe.dispatch import SortedDispatch
from research.training.model_directory import load_model_directory, save_model
from research.training.workdir import load_model
from tests import programs

from .conftest import WIDTH, text

ADAPTER = MoLE(rank=2, alpha=4.0, num_experts=3, dropout=0.0)


@pytest.fixture(scope="module")
def task(base):
    return AdapterTuning(ADAPTER, base)


@pytest.fixture(scope="module")
def params(task):
    """Experts that differ, and a router that tells tokens apart."""
    started = task.start(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), started["adapter"]
    )
    return {**started, "adapter": adapter}


@pytest.fixture(scope="module")
def batch():
    rows = next(build(text()).batches(0, 4))
    rows["segments"][2:, 10:] = 0
    rows["weights"][2:, 10:] = 0
    return rows


@pytest.fixture(scope="module")
def measure(task):
    """(task's metrics, gradients of text and of balance) by the parameters; one program."""

    def both(adapter, params, batch):
        metrics = task.loss({**params, "adapter": adapter}, batch, jax.random.key(0))
        return (metrics["cross_entropy"][0], metrics["balance"][0] / metrics["balance"][1]), metrics

    def run(params, batch):
        _, pull, metrics = jax.vjp(lambda a: both(a, params, batch), params["adapter"], has_aux=True)
        zero, one = jnp.float32(0), jnp.float32(1)
        return metrics, pull((one, zero))[0], pull((zero, one))[0]

    return jax.jit(run)


def apply(task):
    return jax.jit(
        lambda params, batch: task.model.apply(
            {"params": task.unpack(params)}, batch["tokens"], batch["positions"], batch["segments"]
        )
    )


def test_it_begins_as_the_base(task, base, batch):
    loaded = load_model(base)
    plain = jax.jit(
        lambda p, b: loaded.model.apply({"params": p}, b["tokens"], b["positions"], b["segments"])
    )
    np.testing.assert_allclose(
        apply(task)(task.start(jax.random.key(0)), batch), plain(loaded.params, batch), atol=1e-6
    )


def test_the_text_gives_the_router_no_gradient_and_padding_no_balance(params, batch, measure):
    metrics, of_text, of_balance = measure(params, batch)
    for path, leaf in flat(of_text).items():
        assert ("/router/" in path) == (not any(np.asarray(part).any() for part in jax.tree.leaves(leaf)))
    for path, leaf in flat(of_balance).items():
        if "layer_1/mlp/router" in path:
            assert np.asarray(leaf).any()
    moved = {**batch, "tokens": batch["tokens"].copy()}
    moved["tokens"][2:, 10:] = 3
    np.testing.assert_array_equal(measure(params, moved)[0]["balance"][0], metrics["balance"][0])
    # Uniform routing: the weight 0.01 times 1 / E, the mean over blocks.
    even = tree({p: leaf * 0 if "/router/" in p else leaf for p, leaf in flat(params["adapter"]).items()})
    total, weight = measure({**params, "adapter": even}, batch)[0]["balance"]
    assert total / weight == pytest.approx(0.01 / 3, rel=1e-5)


def test_tokens_of_one_expert_get_plain_lora(task, base, params, batch):
    """All projections take the same expert: with the router fixed to it, the mixture is LoRA with its factors."""
    forced = {
        path: (jnp.array([0.0, 99.0, 0.0]) if path.endswith("bias") else leaf * 0)
        if "/router/" in path
        else leaf
        for path, leaf in flat(params["adapter"]).items()
    }
    lora = AdapterTuning(LoRA(rank=2, alpha=4.0), base)
    factors = flat(lora.start(jax.random.key(0))["adapter"])
    for path in factors:
        down, up = (forced.get(f"{path}/experts_{name}") for name in ("down", "up"))
        term = forced[path] if down is None else factors[path].replace(down=down[1], up=up[1])
        factors[path] = term
    wanted = apply(lora)({**params, "adapter": tree(factors)}, batch)
    np.testing.assert_allclose(apply(task)({**params, "adapter": tree(forced)}, batch), wanted, atol=2e-5)


def test_tokens_sorted_by_experts_are_the_same_tokens(params, task, batch, monkeypatch):
    """Logits and gradients of both ways, with padding; E r = 6 here."""

    def both():
        def total(adapter):
            y = apply(task)({**params, "adapter": adapter}, batch)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params["adapter"])

    (_, masked), masked_slopes = both()
    sizes, make = [], SortedDispatch.make
    monkeypatch.setattr(mole, "SORTED_FROM", 6)
    monkeypatch.setattr(
        SortedDispatch, "make", lambda choices: sizes.append(choices.index.shape) or make(choices)
    )
    (_, found), slopes = both()
    assert sizes == [(4 * 16, 1)] * 2
    np.testing.assert_allclose(found, masked, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), slopes, masked_slopes)
    assert np.abs(flat(slopes)["layer_1/mlp/down/kernel/experts_up"]).max() > 0.1


def test_a_mixture_of_one_is_merged(base, batch):
    task = AdapterTuning(MoLE(rank=2, alpha=4.0, num_experts=1, dropout=0.0), base)
    started = task.start(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    adapter = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(next(keys), leaf.shape), started["adapter"])
    params = {**started, "adapter": adapter}
    model, merged, told = task.merge(params)
    assert told == "14 kernels merged" and model == load_model(base).model
    wanted = apply(task)(params, batch)
    found = programs.call(model, merged, batch["tokens"], batch["positions"], batch["segments"])
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_one_expert_and_dense_routing(params, batch, base):
    kernel = jnp.ones((4, 3))
    experts = LoRAExperts(
        kernel, jnp.arange(2.0)[:, None, None] * jnp.ones((2, 4, 1)), jnp.ones((2, 1, 3)), 0.5
    )
    x = jnp.array([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    # 1 + 0.5 * 1 * expert; gates that mix: 0.25 * 0 + 0.75 * 1.
    routed = experts.routed(jnp.array([[0.0, 1.0], [0.25, 0.75]])).dot(x)
    np.testing.assert_allclose(routed, [[1.5] * 3, [2 * (1 + 0.5 * 0.75)] * 3])
    np.testing.assert_allclose(experts.expert(1).dot(x), [[1.5] * 3, [3.0] * 3])
    narrow = experts.narrow(2, 1)
    assert narrow.shape == (2, 1) and narrow.size == 2 + 4 + 2
    for match, call in {
        "multiplied by its MLP alone": lambda: experts.dot(x),
        "can't be one array": experts.materialize,
        "can't be merged": lambda: ADAPTER.merge(None, params),
        "num_experts=0": lambda: MoLE(num_experts=0),
        "does not fit the base: layer_0/mlp/down": lambda: dataclasses.replace(ADAPTER, rank=3).check(
            None, load_model(base).params, params["adapter"]
        ),
    }.items():
        with pytest.raises(UserError, match=match):
            call()


def test_a_mixture_is_saved_as_a_model(task, params, tmp_path, batch):
    model_params = task.unpack(params)
    save_model(tmp_path / "mixture", task.model_config, model_params)
    again = load_model_directory(tmp_path / "mixture")
    jax.tree.map(np.testing.assert_array_equal, again.params, model_params)
    assert again.params["layer_0"]["mlp"]["base"]["up"]["kernel"].shape == (WIDTH, 32)
