"""Balance losses and measurements, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.moe import losses
from research.moe import routing as routers
from research.moe.losses import BALANCES

# One program a shape instead of one an operation.
route = jax.jit(routers.route, static_argnames="k")
balance_loss = jax.jit(losses.balance_loss, static_argnames=("kind", "groups"))
router_z_loss, load, max_over_mean, variation, entropy, agreement = (
    jax.jit(getattr(losses, name))
    for name in ("router_z_loss", "load", "max_over_mean", "variation", "entropy", "agreement")
)
mutual_information = jax.jit(losses.mutual_information, static_argnames="num_labels")


def routing(weights, k=2, mask=None) -> routers.Routing:
    """Probabilities in proportion to the weights of each token's experts."""
    return routed(np.log(weights), k, mask)


def routed(logits, k, mask=None) -> routers.Routing:
    logits = np.asarray(logits, np.float32)
    return route(logits, k=k, mask=np.ones(len(logits), bool) if mask is None else np.asarray(mask))


# Two tokens, four experts: probabilities (.4 .3 .2 .1) and (.1 .5 .1 .3); first choices 0 and 1, second 1 and 3.
# P = (.25 .4 .15 .2).
TWO = [[4.0, 3.0, 2.0, 1.0], [1.0, 5.0, 1.0, 3.0]]


@pytest.mark.parametrize(
    "kind, groups, value",
    [
        # First choices: f = (1/2 1/2 0 0): 4 (.25 / 2 + .4 / 2) = 1.3.
        ("switch", 1, 1.3),
        # All choices: f = (1/4 2/4 0 1/4): 4 (.25 / 4 + .4 / 2 + .2 / 4) = 1.25.
        ("jetmoe", 1, 1.25),
        # Each token a group: 4 * .4 and 4 * .5.
        ("gshard", 2, 1.8),
        ("gshard", 1, 1.3),
        ("mole", 2, 0.45),
        # Mean 1/4, deviations 0, .15, -.1, -.05: variance .035 / 4, over 1/16.
        ("importance", 1, 0.14),
    ],
)
def test_balance_losses(kind, groups, value):
    assert float(balance_loss(routing(TWO), kind=kind, groups=groups)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", BALANCES)
def test_in_balance_and_out_of_it(kind):
    """Uniform routers give 1 (mole 1/E, importance 0), a collapsed one E times that, or E - 1 for importance."""
    uniform = routing(np.ones((8, 4)), 1).replace(index=np.arange(8)[:, None] % 4)
    collapsed = routed([[-50.0, -50.0, 50.0, -50.0]] * 8, 1)
    expected = {"importance": (0.0, 3.0), "mole": (0.25, 1.0)}.get(kind, (1.0, 4.0))
    # 1e-6 of the sums' rounding; importance is a square of it.
    np.testing.assert_allclose(
        [balance_loss(uniform, kind=kind), balance_loss(collapsed, kind=kind)], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", [*BALANCES, "z"])
def test_padding_does_not_matter(kind):
    @jax.jit
    @jax.value_and_grad
    def loss(weights, mask):
        made = routers.route(jnp.log(weights), 2, mask=mask)
        return losses.router_z_loss(made) if kind == "z" else losses.balance_loss(made, kind, 2)

    # The groups are the halves: (token, padding) and (token, padding).
    padded = np.asarray([TWO[0], [1.0, 1.0, 1.0, 9.0], TWO[1], [9.0, 1.0, 1.0, 1.0]], np.float32)
    value, gradient = loss(padded, np.asarray([True, False, True, False]))
    np.testing.assert_allclose(value, loss(np.asarray(TWO, np.float32), None)[0], rtol=1e-6)
    gradient = np.asarray(gradient)
    assert gradient[0].any() and not gradient[[1, 3]].any()


def test_a_sequence_of_padding_alone_is_left_out():
    made = routing([*TWO, *TWO], mask=[True, True, False, False])
    assert float(balance_loss(made, kind="gshard", groups=2)) == pytest.approx(1.3, rel=1e-5)


def test_the_share_of_choices_has_no_gradient():
    """d(E sum f P) / dP_e = E f_e only: through the softmax of one token, E p_e (f_e - sum_j f_j p_j) / N."""
    loss = lambda z: losses.balance_loss(routers.route(z, 2), "switch")  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(np.log(TWO).astype(np.float32))
    p, f = np.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.1, 0.3]]), np.asarray([0.5, 0.5, 0.0, 0.0])
    np.testing.assert_allclose(gradient, 4 * p * (f - (p @ f)[:, None]) / 2, rtol=1e-4, atol=1e-7)


def test_z_loss():
    made = routed([[math.log(3.0), math.log(5.0)], [0.0, 0.0]], 1)
    expected = (math.log(8) ** 2 + math.log(2) ** 2) / 2
    assert float(router_z_loss(made)) == pytest.approx(expected, rel=1e-6)
    assert float(router_z_loss(routed([[1e4, 1e4]] * 2, 1))) == pytest.approx(1e8, rel=1e-3)  # no overflow


def test_measurements():
    made = routing([*TWO, TWO[0]], mask=[True, True, False])
    assert load(made).tolist() == [1, 2, 0, 1]
    assert float(max_over_mean(load(made))) == 2.0
    # Deviations from 1: 0, 1, -1, 0.
    assert float(variation(load(made))) == pytest.approx(math.sqrt(0.5), rel=1e-6)
    by_hand = -sum(p * math.log(p) for row in ([0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.1, 0.3]) for p in row)
    assert float(entropy(made)) == pytest.approx(by_hand, rel=1e-6)


def test_agreement_of_routers():
    a = routing([*TWO, TWO[0]], mask=[True, True, False])
    assert float(agreement(a, a)) == 1.0
    # Choices {0, 1} and {1, 3}, against {1, 0} and {1, 2}: 2 of 2 and 1 of 2.
    b = a.replace(index=np.asarray([[1, 0], [1, 2], [3, 2]]))
    assert float(agreement(a, b)) == 0.75


def test_mutual_information():
    chosen = routing([[9.0, 1.0], [9.0, 1.0], [1.0, 9.0], [1.0, 9.0]], 1)
    labels = np.asarray([0, 0, 1, 1])
    assert float(mutual_information(chosen, labels, num_labels=2)) == pytest.approx(math.log(2), rel=1e-6)
    apart = np.asarray([0, 1, 0, 1])
    assert float(mutual_information(chosen, apart, num_labels=2)) == pytest.approx(0, abs=1e-6)


def test_an_unknown_balance_loss():
    with pytest.raises(UserError, match="balance='gshart': no such balance loss; did you mean 'gshard'"):
        balance_loss(routing(TWO), kind="gshart")
