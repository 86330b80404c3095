"""Hidden Transfer: the states of future tokens, guessed by linear maps in the middle of the model.

Wu et al., "Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration",
arXiv 2404.12022. At the output of layer t_j a map makes, from the state of a token, that of the token j places
on: h W_j + b_j. The pseudo state then runs through the frozen layers above like any row, sees the text up to
its anchor and the pseudo states of the steps before, and ends as a guess of the token j + 1 places on. While
the candidates of one call are verified, every one of them gets its k pseudo states, so the guesses of the next
call are there wherever the path ends.

The paper's equations and layers were not at hand in detail: the mask of the parallel training, the biases,
the start at the identity and t_j about two thirds up are this project's.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative import losses
from research.decoding.speculative.training import Teacher, ahead, shifted
from research.decoding.speculative.trees import Guess, Path, chain_paths
from research.decoding.speculative.virtual import (
    Chains,
    Layout,
    at_anchors,
    draw_anchors,
    lay_out,
    run_anchored,
)
from research.decoding.verify import Draft
from research.errors import UserError
from research.training.task import Batch, Metrics, PyTree


class Transferred(struct.PyTreeNode):
    """`VirtualRows`: step j maps the tokens' states at the output of layer layers[j].

    kernel [k, D, D]; bias [k, D]; anchors int32[B, count], the tokens that are mapped, or None for all `count`.
    """

    kernel: jax.Array
    bias: jax.Array
    anchors: jax.Array | None
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.count,) * len(self.layers)

    @property
    def size(self) -> int:
        return self.count * len(self.layers)

    def rows(self, group: int, x: jax.Array) -> jax.Array:
        if self.anchors is not None:
            x = at_anchors(x, self.anchors)
        return x @ self.kernel[group] + self.bias[group]


class TransferState(struct.PyTreeNode):
    """ready bool[B]: there are guesses, which is so after the first call; guesses int32[B, k, top]."""

    ready: jax.Array
    guesses: jax.Array


@dataclasses.dataclass(frozen=True)
class HiddenTransfer:
    """The drafter. Its parameters are {"projection": {"kernel": f32[k, D, D], "bias": f32[k, D]}}.

    Args:
        layers: t_1 .. t_k, ascending: step j starts at the output of layer t_j (0: at the embedding; the number
            of layers: no layer is left, a linear Medusa head that shares the model's own).
        paths: the tree of ranks that is drafted; by default the chain of the k best guesses.
        anchors: at how many places of a row, drawn anew in every step, pseudo states are trained; None is
            everywhere at once.

    Raises:
        UserError: no layers or not ascending, or a tree deeper than there are steps.
    """

    layers: tuple[int, ...] = (4, 4, 4)
    paths: tuple[Path, ...] | None = None
    anchors: int | None = None

    def __post_init__(self):
        layers = tuple(self.layers)
        if not layers or layers[0] < 0 or list(layers) != sorted(layers):
            raise UserError(f"HiddenTransfer: layers ascend from 0 on, one for each step: not {layers}")
        paths = chain_paths(len(layers)) if self.paths is None else self.paths
        chains = Chains(paths, (len(layers),) * (len(paths) + 1))
        if chains.levels > len(layers) + 1:
            raise UserError(f"HiddenTransfer: a tree {chains.levels - 1} deep for {len(layers)} steps")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "paths", chains.paths)

    @property
    def steps(self) -> int:
        """k."""
        return len(self.layers)

    @functools.cached_property
    def _top(self) -> int:
        return 1 + max(max(path) for path in self.paths)

    @functools.cached_property
    def _layout(self) -> Layout:
        return lay_out([Chains(self.paths, (self.steps,) * (len(self.paths) + 1))], self._top)

    @property
    def size(self) -> int:
        return self._layout.tree.size

    @property
    def levels(self) -> int:
        return self._layout.tree.levels

    def create(self, key: jax.Array, target: Target) -> PyTree:
        if self.layers[-1] > target.model.num_layers:
            raise UserError(
                f"HiddenTransfer: layer {self.layers[-1]} of a model with {target.model.num_layers} layers"
            )
        width = target.model.width
        kernel = jnp.broadcast_to(jnp.eye(width), (self.steps, width, width))
        return {"projection": {"kernel": kernel, "bias": jnp.zeros((self.steps, width))}}

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> TransferState:
        rows = len(prompt.root)
        guesses = jnp.zeros((rows, self.steps, self._top), jnp.int32)
        return TransferState(jnp.zeros((rows,), bool), guesses)

    def propose(
        self, params: PyTree, target: Target, state: TransferState, round: Round
    ) -> tuple[Draft, TransferState]:
        layout = self._layout.at(jnp.zeros_like(round.root))
        tree = layout.tree.replace(real=layout.tree.real & (state.ready[:, None] | (layout.tree.depth == 0)))
        maps = params["projection"]
        rows = Transferred(maps["kernel"], maps["bias"], None, self.layers, len(self.paths) + 1)
        return Draft(layout.tokens(round.root, state.guesses), tree, virtual=rows), state

    def observe(
        self, params: PyTree, target: Target, state: TransferState, outcome: Outcome
    ) -> TransferState:
        logits, _ = self._layout.at(jnp.zeros_like(outcome.accept.count)).under_last(outcome)
        return TransferState(jnp.ones_like(state.ready), jax.lax.top_k(logits[:, :, 0], self._top)[1])

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """Sum over j of KL(p(. | x_<=n+j) || step j at anchor n); the teacher is the model at the true place."""
        anchors, drawn = draw_anchors(ahead(batch, self.steps)[1] > 0, self.anchors, key)
        truth, guesses = self._run(params, teacher.target, batch, anchors)
        terms, metrics = [], {}
        for j in range(1, self.steps + 1):
            logits = guesses[:, j - 1]
            weights = at_anchors(ahead(batch, j)[1], anchors) * drawn
            there = at_anchors(shifted(truth, j), anchors)
            terms.append((1.0, losses.kl(logits, there, weights)))
            metrics[f"agreement_{j}"] = losses.agreement(logits, jnp.argmax(there, axis=-1), weights)
        return {"loss": losses.add(*terms), **metrics}

    def forced(self, params: PyTree, teacher: Teacher, batch: Batch) -> Sequence[Guess]:
        anchors, _ = draw_anchors(batch["segments"] > 0, None, None)
        _, guesses = self._run(params, teacher.target, batch, anchors)
        return [(guesses[:, j - 1], *ahead(batch, j)) for j in range(1, self.steps + 1)]

    def _run(
        self, params: PyTree, target: Target, batch: Batch, anchors: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """-> the frozen model's logits [B, T, V], and those of the pseudo states [B, k, A, V]."""
        maps = params["projection"]
        rows = Transferred(maps["kernel"], maps["bias"], anchors, self.layers, anchors.shape[1])
        target = target.replace(params=jax.lax.stop_gradient(target.params))
        within = np.tri(self.steps, dtype=bool)
        truth, logits = run_anchored(target, batch, anchors, rows, within, range(1, self.steps + 1))
        return jax.lax.stop_gradient(truth), logits
