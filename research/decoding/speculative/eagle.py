"""EAGLE: extrapolate the target's hidden states with one decoder layer, and draft trees from them.

EAGLE (arXiv 2401.15077): at place t the drafter takes in the hidden state h_t and the token x_{t+1} that was
chosen after it, which h_t alone leaves open, and predicts the next hidden state:

    f_t = Layer(W [e(x_{t+1}); h_t] + b)  ~  h_{t+1},    logits_t = head(f_t), which speak of x_{t+2}

with the target's frozen embedding e and head. Below the first level f stands for the h that the target has
not computed yet. Training regresses f and matches the target's distributions (sections 3.1 and 3.2):

    L = w_feature SmoothL1(f_t, h_{t+1}) + w_token CE(softmax(head(h_{t+1})), head(f_t))

with uniform noise on the h that is taken in. EAGLE-1 drafts a static tree (`RankTree`), EAGLE-2 (arXiv
2406.16858, section 4) one that the drafter's confidence shapes (`ConfidenceTree`).

Hidden states are those after the final norm. The layer is of the target's own kind; the released code leaves
out the norm before its attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative import losses
from research.decoding.speculative.dynamic import dynamic_draft
from research.decoding.speculative.follower import (
    Follower,
    Following,
    last_block,
    read_accepted,
    read_prompt,
)
from research.decoding.speculative.training import Teacher, ahead, shifted
from research.decoding.speculative.trees import Guess, RankTree
from research.decoding.verify import Draft
from research.errors import UserError
from research.nn.cache import Cache
from research.nn.linear import Linear
from research.training.task import Batch, Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class ConfidenceTree:
    """EAGLE-2's tree: `depth` levels, on each of which the `width` best nodes by the product of the
    drafter's probabilities get `width` children; of all these the best `budget` are verified.

    Raises:
        UserError: more nodes than there are candidates, or none.
    """

    depth: int = 6
    width: int = 10
    budget: int = 59

    def __post_init__(self):
        for name in ("depth", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; a tree has at least one level of one node")
        candidates = self.width + (self.depth - 1) * self.width**2
        if not 1 <= self.budget <= candidates:
            raise UserError(
                f"depth {self.depth} and width {self.width} give {candidates} candidates: "
                f"budget is 1 to {candidates}, not {self.budget}"
            )

    @property
    def size(self) -> int:
        return self.budget + 1

    @property
    def levels(self) -> int:
        return min(self.depth, self.budget) + 1


class Extrapolator(Follower, kw_only=True):
    """W [e; h] + b, then one decoder layer."""

    width: int

    def setup(self) -> None:
        self.make_layers()
        self.projection = Linear(self.width, use_bias=True)

    def merge(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        return self.projection(jnp.concatenate([embedded, hidden], axis=-1))


@dataclasses.dataclass(frozen=True)
class Eagle:
    """Drafts with a trained extrapolator.

    Args:
        tree: which nodes are drafted.
        feature_weight, token_weight: of the two terms of the loss.
        noise: greatest absolute value of what is added to the hidden states taken in during training.
    """

    tree: ConfidenceTree | RankTree = ConfidenceTree()
    feature_weight: float = 1.0
    token_weight: float = 0.1
    noise: float = 0.1

    @property
    def size(self) -> int:
        return self.tree.size

    @property
    def levels(self) -> int:
        return self.tree.levels

    def network(self, target: Target) -> Extrapolator:
        model = target.model
        return Extrapolator((last_block(model),), 1, token_layout=model.token_layout, width=model.width)

    def create(self, key: jax.Array, target: Target) -> PyTree:
        places = jnp.zeros((1, 2, target.model.width))
        return self.network(target).init(key, places, places)["params"]

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """loss, and agreement: how often the guess for x_{t+2} is the target's own."""
        target, hidden = teacher.target, teacher.hidden
        if key is not None:
            hidden += jax.random.uniform(key, hidden.shape, hidden.dtype, -self.noise, self.noise)
        target = target.replace(params=jax.lax.stop_gradient(target.params))
        states = self._states(params, target, hidden, batch)
        _, weights = ahead(batch, 1)
        logits, expected = target.logits(states), shifted(teacher.logits, 1)
        return {
            "loss": losses.add(
                (self.feature_weight, losses.smooth_l1(states, shifted(teacher.hidden, 1), weights)),
                (self.token_weight, losses.soft_cross_entropy(logits, expected, weights)),
            ),
            "agreement": losses.agreement(logits, jnp.argmax(expected, axis=-1), weights),
        }

    def forced(self, params: PyTree, teacher: Teacher, batch: Batch) -> list[Guess]:
        """What is guessed at every level along a text, as `trees.calibrate` wants it, from the target's hidden
        states at all levels: below the first, drafts are a little worse."""
        logits = teacher.target.logits(self._states(params, teacher.target, teacher.hidden, batch))
        return [(shifted(logits, k - 1), *ahead(batch, k)) for k in range(1, self.tree.levels)]

    def _states(self, params: PyTree, target: Target, hidden: jax.Array, batch: Batch) -> jax.Array:
        """f [B, T, D] along a text."""
        embedded, places = target.embed(batch["targets"]), (batch["positions"], batch["segments"])
        return self.network(target).apply({"params": params}, hidden, embedded, *places)[0]

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> Following:
        return read_prompt(self.network(target), params, target, prompt, self.levels)

    def propose(
        self, params: PyTree, target: Target, state: Following, round: Round
    ) -> tuple[Draft, Following]:
        branch = _Branch(self.network(target), params, target, state.cache)
        draft = _draft_ranks if isinstance(self.tree, RankTree) else _draft_confident
        return draft(self.tree, branch, state.state, round.root), state

    def observe(self, params: PyTree, target: Target, state: Following, outcome: Outcome) -> Following:
        return read_accepted(self.network(target), params, target, state, outcome)


class _Branch:
    """The nodes that were expanded so far in a call, behind the committed places.

    All of them go through the layer again at every level, a few rows each time the weights are read, so that
    nothing has to be kept and a level's mask is that of an ordinary tree.
    """

    def __init__(self, network: Extrapolator, params: PyTree, target: Target, cache: Cache):
        self._network, self._params, self._target, self._cache = network, params, target, cache
        self._hidden, self._embedded, self._mask, self._newest = None, None, None, 0
        self._depth = np.zeros((0,), np.int32)

    def grow(self, above: jax.Array | None, states: jax.Array, tokens: jax.Array) -> jax.Array:
        """Expands tokens int32[B, n], drafted from the states [B, n, D] of their parents.

        above int32[B, n]: the parents' places among the newest nodes; None below the root.
        Returns the tokens' states [B, n, D].
        """
        (batch, count), embedded = tokens.shape, self._target.embed(tokens)
        own = jnp.broadcast_to(jnp.eye(count, dtype=bool), (batch, count, count))
        if above is None:
            self._hidden, self._embedded, self._mask = states, embedded, own
        else:
            newest = self._mask[:, -self._newest :]
            seen = jnp.take_along_axis(newest, above[..., None], axis=1)  # what the parents see
            blind = jnp.zeros((batch, newest.shape[-1], count), bool)
            self._mask = jnp.concatenate(
                [jnp.concatenate([self._mask, blind], axis=2), jnp.concatenate([seen, own], axis=2)], axis=1
            )
            self._hidden = jnp.concatenate([self._hidden, states], axis=1)
            self._embedded = jnp.concatenate([self._embedded, embedded], axis=1)
        level = self._depth[-1] + 1 if len(self._depth) else 0
        self._depth = np.concatenate([self._depth, np.full((count,), level, np.int32)])
        self._newest = count
        result, _ = self._network.apply(
            {"params": self._params},
            self._hidden,
            self._embedded,
            self._cache,
            self._mask,
            self._depth,
            method="extend",
        )
        return result[:, -count:]

    def guesses(self, states: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """The best tokens after states [B, n, D]: log-probabilities and ids, [B, n, count]."""
        logits = self._target.logits(states)
        if count > logits.shape[-1]:
            raise UserError(f"a tree {count} wide is wider than the vocabulary of {logits.shape[-1]} tokens")
        best, tokens = jax.lax.top_k(logits, count)
        return best - jax.nn.logsumexp(logits, axis=-1, keepdims=True), tokens


def _draft_confident(shape: ConfidenceTree, branch: _Branch, state: jax.Array, root: jax.Array) -> Draft:
    """EAGLE-2: a table of candidates, of which the best are kept."""
    batch, width = len(root), shape.width
    states, above = state[:, None], None
    score, place = jnp.zeros((batch, 1)), jnp.full((batch, 1), -1)  # of the nodes that are expanded
    scores, tokens, parents, filled = [], [], [], 0
    for level in range(1, shape.depth + 1):
        gained, guesses = branch.guesses(states, width)
        scores.append((score[..., None] + gained).reshape(batch, -1))
        tokens.append(guesses.reshape(batch, -1))
        parents.append(jnp.repeat(place, width, axis=1))
        if level < shape.depth:
            score, child = jax.lax.top_k(scores[-1], width)
            above = child // width
            from_states = jnp.take_along_axis(states, above[..., None], axis=1)
            from_root = None if level == 1 else above
            states = branch.grow(from_root, from_states, jnp.take_along_axis(tokens[-1], child, axis=1))
            place = filled + child
            filled += scores[-1].shape[1]
    table = (jnp.concatenate(x, axis=1) for x in (tokens, scores, parents))
    return dynamic_draft(root, *table, shape.budget, levels=shape.levels, width=width)


def _draft_ranks(shape: RankTree, branch: _Branch, state: jax.Array, root: jax.Array) -> Draft:
    """EAGLE-1: the guesses that a static tree names."""
    states, drafted, first = state[:, None], [root[:, None]], 1
    for level, expansion in enumerate(shape.expansions):
        _, guesses = branch.guesses(states, expansion.width)
        drafted.append(guesses[:, expansion.parent, expansion.rank])
        if level + 1 < len(shape.expansions):
            going_on = np.asarray(shape.expansions[level + 1].nodes) - first
            above = np.asarray(expansion.parent)[going_on]
            rows = None if level == 0 else jnp.broadcast_to(above, (len(root), len(above)))
            states = branch.grow(rows, states[:, above], drafted[-1][:, going_on])
        first += len(expansion.parent)
    return Draft(jnp.concatenate(drafted, axis=1), shape.tree)
