"""PAT: the base at first, a mask of 0 and 1 at the end, and a smaller model that computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.adapters.pat import PAT, active_loss, mask_at
from research.adapters.tuning import AdapterTuning
from research.config import of
from research.errors import UserError
from research.nn.accounting import count_parameters
from research.training.workdir import load_model

from .conftest import HIDDEN, WIDTH, stage, trainer

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
ADAPTER = of(PAT, rank=2, alpha=4.0, mixing_rank=4, steps=4, dropout=0.1)


def test_the_mask_is_1_then_soft_then_0_or_1():
    proxy = jnp.array([-0.7, 0.0, 0.3])
    np.testing.assert_array_equal(mask_at(jnp.zeros(3), 0, 10), 1.0)
    # At step 5 of 10: tau = 1 / (1 - ln 5 / ln 10) = 3.3219, beta = 0.
    np.testing.assert_allclose(mask_at(proxy, 5, 10), 1 / (1 + np.exp(-3.3219 * proxy)), rtol=1e-4)
    # At step 2: tau = 1 / (1 - ln 2 / ln 10) = 1.4307, beta = 0.3.
    np.testing.assert_allclose(mask_at(proxy, 2, 10), 0.3 + 1 / (1 + np.exp(-1.4307 * proxy)), rtol=1e-4)
    np.testing.assert_array_equal(mask_at(proxy, 10, 10), [0, 0, 1])
    # 10 |2 - 1| / 1 + (0.3 - 0.5)^2 + mean(0.2^2, 0.5^2); every channel feels the count.
    loss, gradient = jax.value_and_grad(active_loss)(proxy, 1)
    assert loss == pytest.approx(10 + 0.04 + (0.04 + 0.25) / 2)
    np.testing.assert_allclose(gradient, 10 + np.array([-0.2, 0.5, -0.4]), rtol=1e-5)


@pytest.fixture(scope="module")
def programs(base):
    """Logits of a run's parameters in training, and of a model's own."""
    task = AdapterTuning(PAT(rank=2, alpha=4.0, mixing_rank=4, steps=4), base)
    assembled = jax.jit(
        lambda params: task.model.apply(
            {"params": task.adapter.assemble(params, None)}, TOKENS, method="features"
        )
    )
    plain = load_model(base)
    features = jax.jit(lambda params: plain.model.apply({"params": params}, TOKENS, method="features"))
    return task, assembled, features


def test_it_begins_as_the_base(programs, base):
    task, assembled, features = programs
    params = task.start(jax.random.key(0))
    np.testing.assert_allclose(assembled(params)[0], features(load_model(base).params)[0], atol=1e-6)
    np.testing.assert_array_equal(params["base"]["head"]["kernel"], params["base"]["embedding"]["table"].T)
    losses = task.adapter.losses(params)
    assert losses["identity"] < 1e-4


def test_it_merges_into_a_smaller_model_that_computes_the_same(base, run, programs):
    rates = (("proxy", 8.0),)
    optimizer = stage(4).optimizer
    optimizer.rates = rates
    stages = (
        stage(4, name="prune", optimizer=optimizer),
        stage(2, name="recover", frozen=("^adapter/proxy",)),
    )
    done = run(trainer(of(AdapterTuning, adapter=ADAPTER, base=base), *stages))
    state, task = done.state, done.trainer.task
    assert int(state.params["fixed"]["step"]) == 6
    proxy = jnp.where(
        jnp.arange(WIDTH) % 4 == 1, -0.5, 0.5
    )  # 12 of 16 channels, whatever six steps made of it
    params = {**state.params, "adapter": {**state.params["adapter"], "proxy": proxy}}
    _, assembled, _ = programs
    hidden, fresh = assembled(params)
    gone = np.flatnonzero(np.asarray(proxy) < 0)
    assert not np.asarray(hidden)[..., gone].any() and np.asarray(hidden).any()
    small, cut, told = task.merge(params)
    assert told == "12 of 16 channels kept, 12 asked for" and small.width == 12
    assert cut["layer_0"]["attention"]["output"]["kernel"].shape == (16, 12)
    assert cut["layer_1"]["mlp"]["up"]["kernel"].shape == (12, HIDDEN)
    assert count_parameters(cut) == 12 * 24 * 2 + 2 * (4 * 12 * 16 + 3 * 12 * HIDDEN + 2 * 12) + 12
    wanted = jax.jit(lambda p: task.model.apply({"params": task.unpack(p)}, TOKENS))(params)
    found = jax.jit(lambda p: small.apply({"params": p}, TOKENS))(cut)
    # The same sums in another order: float32's rounding.
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    for match, call in {
        "not yet 0 or 1 after 3 of 4": lambda: task.merge(
            {**params, "fixed": {**params["fixed"], "step": jnp.int32(3)}}
        ),
        "keeps no channel": lambda: task.merge(
            {**params, "adapter": {**params["adapter"], "proxy": -proxy * 0 - 1}}
        ),
        "keep=0": lambda: PAT(keep=0.0),
        "mixing_rank=17": lambda: AdapterTuning(
            dataclasses.replace(task.adapter, mixing_rank=17), base
        ).start(jax.random.key(0)),
    }.items():
        with pytest.raises(UserError, match=match):
            call()
