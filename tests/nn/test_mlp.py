"""Feed-forward layers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.mlp import ACTIVATIONS, MLP, GatedMLP


def test_activations():
    values = {name: float(f(jnp.float32(2.0))) for name, f in ACTIVATIONS.items()}
    # 2 / (1 + e**-2) = 1.7616; 2 Phi(2) = 2 * 0.97725; tanh form: 1 + tanh(0.79788 * (2 + 0.044715 * 8)) = 1.9546;
    # quick form: 2 / (1 + e**-3.404) = 1.9357
    smooth = {"silu": 1.7616, "gelu": 1.9545, "gelu_tanh": 1.9546, "gelu_quick": 1.9357}
    assert values == pytest.approx({**smooth, "relu": 2.0, "relu_squared": 4.0}, abs=5e-5)
    # Slicing units equals masking them only because of this.
    assert [float(f(jnp.float32(0.0))) for f in ACTIVATIONS.values()] == [0.0] * 6


def test_plain_mlp_by_hand():
    params = {
        "up": {"kernel": jnp.asarray([[1.0, -1.0]]), "bias": jnp.asarray([1.0, 1.0])},
        "down": {"kernel": jnp.asarray([[2.0], [3.0]]), "bias": jnp.asarray([0.5])},
    }
    # x = 4: hidden relu([5, -3]) = [5, 0]; 5 * 2 + 0.5
    y = MLP(2, "relu").apply({"params": params}, jnp.asarray([[4.0]]))
    assert y.tolist() == [[10.5]]


def test_gated_mlp_by_hand_and_fused():
    gate, up = jnp.asarray([[1.0, -1.0, 0.5]]), jnp.asarray([[2.0, 5.0, 3.0]])
    down = {"kernel": jnp.asarray([[1.0], [1.0], [10.0]])}
    params = {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": down}
    # x = 2: relu([2, -2, 1]) * [4, 10, 6] = [8, 0, 6]; 8 + 10 * 6
    x = jnp.asarray([[2.0]])
    assert GatedMLP(3, "relu").apply({"params": params}, x).tolist() == [[68.0]]
    fused = {"gate_up": {"kernel": jnp.concatenate([gate, up], 1)}, "down": down}
    assert GatedMLP(3, "relu").apply({"params": fused}, x).tolist() == [[68.0]]


def test_shapes_and_leading_axes():
    for mlp, names in ((MLP(6), {"up", "down"}), (GatedMLP(6), {"gate", "up", "down"})):
        x = jax.random.normal(jax.random.key(0), (2, 3, 4))
        params = mlp.init(jax.random.key(1), x)["params"]
        assert set(params) == names and params["up"]["kernel"].shape == (4, 6)
        assert ("bias" in params["down"]) == (names == {"up", "down"})
        run = jax.jit(lambda p, y, mlp=mlp: mlp.apply({"params": p}, y))
        # Products of 4 and 6 terms of order 1, whose order of addition may differ.
        np.testing.assert_allclose(run(params, x.reshape(6, 4)).reshape(2, 3, 4), run(params, x), atol=1e-6)
