"""Image models with the other parts."""

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.weights import LowRank
from research.ssm.mamba2 import Mamba2
from research.vision.hyperspectral.morpmamba import MorpMamba, SelectiveState

from .cells import KEY, runs


@runs(
    "MorpMamba",
    "Mamba-2 in place of its recurrence, low-rank kernels",
    "factors of full rank of every projection give the same logits, and get gradients",
)
def _(_):
    state = SelectiveState(Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=8))
    model = MorpMamba(num_classes=3, width=8, num_heads=2, hidden_dim=6, filter_size=3, state=state)
    x = jax.random.normal(KEY, (2, 4, 4, 5))
    shapes = jax.eval_shape(model.init, KEY, x)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda p: np.float32(0.3) * random.standard_normal(p.shape, np.float32), shapes)
    factored = []

    def factor(path, leaf):
        names = [part.key for part in path]
        if names[-1] != "kernel" or "conv" in names:
            return leaf
        left, values, right = np.linalg.svd(leaf, full_matrices=False)
        factored.append(names)
        return LowRank(left * values, right)

    thin = jax.tree_util.tree_map_with_path(factor, params)
    assert len(factored) == 10  # tokens, two gates, query, key, value, two of the mixer, hidden, head

    @jax.jit
    def run(params, thin):
        def logits(params):
            return model.apply({"params": params}, x)

        return logits(params), logits(thin), jax.grad(lambda p: jnp.sum(jnp.square(logits(p))))(thin)

    plain, other, gradients = run(params, thin)
    # Five products deep, sums of at most 16 terms of order 1.
    np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-4 * float(np.abs(plain).max()))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
