"""Probes count what a model that is known to be right, wrong or uniform gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from research.data.recall import Recall
from research.training.probes import loss_by_position, needle_accuracy, recall_accuracy


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Logits of a model that answers right where the queried key stands before `until`, and is uniform elsewhere."""

    until: int
    vocab_size: int = 160

    def apply(self, variables, tokens, positions=None, segments=None, rngs=None, mutable=()):
        length = tokens.shape[1]
        earlier = (tokens[:, :, None] == tokens[:, None, :]) & (jnp.arange(length) < self.until)
        earlier &= jnp.arange(length)[:, None] > jnp.arange(length)
        after = jnp.pad(tokens, ((0, 0), (0, 1)))[:, 1:]
        answer = jnp.max(jnp.where(earlier, after[:, None, :], -1), axis=-1)
        return 30.0 * jax.nn.one_hot(answer, self.vocab_size), {}


def test_recall_and_needles():
    assert recall_accuracy(Oracle(64), {}, (16, 32), records=8, batch_size=8) == {16: 1.0, 32: 1.0}
    # A needle at the end begins at token 44 of 48, beyond what this oracle sees; ties count as right, so the uniform
    # answer is not told from a right one by accuracy, and the oracle answers with filler instead.
    found = needle_accuracy(Wrong(24), {}, (48,), (0.0, 1.0), records=8, batch_size=8)
    np.testing.assert_array_equal(found, [[1.0, 0.0]])


class Wrong(Oracle):
    """Says filler 159 where it does not know."""

    def apply(self, variables, tokens, **places):
        logits, rest = super().apply(variables, tokens, **places)
        unknown = logits.max(-1, keepdims=True) == 0
        return jnp.where(unknown, 30.0 * jax.nn.one_hot(159, self.vocab_size), logits), rest


def test_loss_by_position():
    data = Recall(32, split="test", size=8)  # the answers are the targets of positions 16, 18, .. 30
    losses = loss_by_position(Oracle(0), {}, data, block=8, batch_size=8)
    assert list(losses) == [16, 24]
    np.testing.assert_allclose(list(losses.values()), np.log(160.0), rtol=1e-6)
