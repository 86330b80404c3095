"""Clover: a recurrent speculator that passes each drafted token on to the next guess.

Clover (arXiv 2405.00263) adds three parts to a frozen target with embedding e and head U. The *augmenting
block*, decoder layers over the sequence with a cache of their own, turns the hidden state h_t, made for
saying x_{t+1}, into one to speculate from. The *regressive connection* leads from each guess to the next, and
the *attention decoder* A merges into it the token just chosen. With a = cos(query_i, key_i), one gate for every
head i (over a single key a softmax would always be 1),

    A(s, x) = s + concat_i(a_i value_i),   query = RMSNorm(s) W_q + b_q, key = x W_k + b_k, value = x W_v + b_v

The paper's code is not public. The arrangement of the parts is that of the authors' released one, Clover-2
(arXiv 2408.00264), in which the root, too, is merged in, before the augmenting block:

    s_1 = RMSNorm(Layers(A_1(h, e(x_{.+1}))))_t          y_1 = RMSNorm'(s_1 F_1)
    s_k = A_2(s_{k-1}, e(x_{t+k}))                       y_k = RMSNorm'([s_k; e(x_{t+k})] F_2),  k = 2 .. K

    logits_k = y_k U, which speak of x_{t+1+k};  A_2 and F_2 are shared by all k >= 2
    L = sum_k gamma^{k-1} (w_p CE(softmax(h_{t+k} U), logits_k) + w_v SmoothL1(y_k, h_{t+k}))

The layers start as copies of the target's last one, both norms as its final norm, W_q, W_k and F_1 near the
identity, F_2 near [I; 0], W_v near 0. h is the hidden state after the target's final norm, where the released
code takes in the one before it.

The tree is that of the paper, dynamic and small, for large batches: see `Clover`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative import losses
from research.decoding.speculative.dynamic import dynamic_draft
from research.decoding.speculative.follower import (
    Follower,
    Following,
    last_block,
    last_layer,
    read_accepted,
    read_prompt,
)
from research.decoding.speculative.training import Teacher, ahead, shifted
from research.decoding.verify import Draft
from research.errors import UserError
from research.nn.linear import Linear
from research.nn.norm import RMSNorm
from research.training.task import Batch, Metrics, PyTree

_EPSILON = 1e-6  # least length in a cosine


class AttentionDecoder(nn.Module):
    """A(s, x): the state s with the token x merged in; s, x and the result [..., D], `num_heads` gates."""

    num_heads: int

    @nn.compact
    def __call__(self, state: jax.Array, token: jax.Array) -> jax.Array:
        width = state.shape[-1]
        heads = (*state.shape[:-1], self.num_heads, width // self.num_heads)
        query = Linear(width, True, name="query")(RMSNorm(name="norm")(state)).reshape(heads)
        key = Linear(width, True, name="key")(token).reshape(heads)
        value = Linear(width, True, name="value")(token).reshape(heads)
        return state + (cosine(query, key) * value).reshape(state.shape)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of the angle between a and b [..., d] -> [..., 1]; 0 where either is 0."""

    def length(x: jax.Array) -> jax.Array:
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return jnp.sqrt(jnp.maximum(square, _EPSILON**2))

    product = jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1, keepdims=True)
    return (product / (length(a) * length(b))).astype(a.dtype)


class Head(nn.Module):
    """x F + b, the product before the norm and U; the result is `width` wide."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Linear(self.width, True, name="projection")(x)


class Speculator(Follower, kw_only=True):
    """The network. `norm` is the template of the target's final norm."""

    width: int
    num_heads: int
    norm: nn.Module

    def setup(self) -> None:
        self.make_layers()
        self.first_decoder = AttentionDecoder(self.num_heads)
        self.next_decoder = AttentionDecoder(self.num_heads)
        self.first_head = Head(self.width)
        self.next_head = Head(self.width)
        self.augment_norm = self.norm.copy()
        self.head_norm = self.norm.copy()

    def merge(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        return self.first_decoder(hidden, embedded)

    def finish(self, states: jax.Array) -> jax.Array:
        return self.augment_norm(states)

    def first(self, states: jax.Array) -> jax.Array:
        """s_1 [..., D] -> y_1 [..., D]."""
        return self.head_norm(self.first_head(states))

    def next(self, states: jax.Array, embedded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """s_{k-1} and e(x_{t+k}) [..., D] -> s_k and y_k, for k >= 2."""
        states = self.next_decoder(states, embedded)
        return states, self.head_norm(self.next_head(jnp.concatenate([states, embedded], axis=-1)))

    def forced(
        self, hidden: jax.Array, tokens: list[jax.Array], positions: jax.Array, segments: jax.Array
    ) -> list[jax.Array]:
        """y_1 .. y_K [B, T, D] along a given text: hidden [B, T, D], tokens[k - 1] = e(x_{t+k}) [B, T, D]."""
        states, _ = self(hidden, tokens[0], positions, segments)
        result = [self.first(states)]
        for embedded in tokens[1:]:
            states, y = self.next(states, embedded)
            result.append(y)
        return result


@dataclasses.dataclass(frozen=True)
class Clover:
    """Drafts a dynamic tree of `budget` tokens, of which each level takes what it needs.

    At every kept node the best token is a candidate, and so are the next ones while the probability of them
    all together stays within `top_p` and each has at least `floor` of the best one's. A level keeps those of
    its candidates with the greatest product of probabilities along their paths, as many as the budget has
    left, and what it leaves is the budget of the next level. With `top_p` 0 that is a chain.

    Args:
        depth: K, the most levels, and the guesses that training unrolls.
        budget: B, tokens drafted in a call at most.
        layers: of the augmenting block.
        num_heads: of the attention decoders.
        top_p, floor: which candidates a node offers.
        token_weight, state_weight, decay: w_p, w_v and gamma of the loss.
    """

    depth: int = 5
    budget: int = 4
    layers: int = 2
    num_heads: int = 4
    top_p: float = 0.95
    floor: float = 0.25
    token_weight: float = 1.0
    state_weight: float = 10.0
    decay: float = 0.7

    def __post_init__(self):
        for name in ("depth", "budget", "layers", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("top_p", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1")

    @property
    def size(self) -> int:
        return self.budget + 1

    @property
    def levels(self) -> int:
        return min(self.depth, self.budget) + 1  # every level keeps a node at least

    def network(self, target: Target) -> Speculator:
        model = target.model
        return Speculator(
            (last_block(model),),
            self.layers,
            token_layout=model.token_layout,
            width=model.width,
            num_heads=self.num_heads,
            norm=model.final_norm,
        )

    def create(self, key: jax.Array, target: Target) -> PyTree:
        """Raises a UserError where the heads do not divide the target's width."""
        width = target.model.width
        if width % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide the target's width {width}")
        ordinary, *keys = jax.random.split(key, 9)
        places, integers = jnp.zeros((1, 1, width)), jnp.zeros((1, 1), jnp.int32)
        params = self.network(target).init(
            ordinary, places, [places, places], integers, integers, method="forced"
        )["params"]
        for layer in range(self.layers):
            params[f"layer_{layer}"] = last_layer(target)
        for norm in ("augment_norm", "head_norm"):
            params[norm] = jax.tree.map(lambda x: x.astype(jnp.float32), target.params["final_norm"])

        def near(start: jax.Array, key: jax.Array) -> jax.Array:
            return start + jax.random.uniform(key, start.shape, maxval=0.01)

        identity, nothing = jnp.eye(width), jnp.zeros((width, width))
        for decoder, (query, key_, value) in (
            ("first_decoder", keys[:3]),
            ("next_decoder", keys[3:6]),
        ):
            params[decoder]["query"]["kernel"] = near(identity, query)
            params[decoder]["key"]["kernel"] = near(identity, key_)
            params[decoder]["value"]["kernel"] = near(nothing, value)
        params["first_head"]["projection"]["kernel"] = near(identity, keys[6])
        params["next_head"]["projection"]["kernel"] = near(jnp.concatenate([identity, nothing]), keys[7])
        return params

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """loss, and agreement_k: how often guess k, given the text before, is the target's own."""
        target = teacher.target.replace(params=jax.lax.stop_gradient(teacher.target.params))
        guesses = self.network(target).apply(
            {"params": params},
            teacher.hidden,
            [target.embed(shifted(batch["targets"], k)) for k in range(self.depth)],
            batch["positions"],
            batch["segments"],
            method="forced",
        )
        terms, metrics = [], {}
        for k, y in enumerate(guesses, 1):
            _, weights = ahead(batch, k)
            logits, expected = target.logits(y), shifted(teacher.logits, k)
            token = losses.soft_cross_entropy(logits, expected, weights)
            state = losses.smooth_l1(y, shifted(teacher.hidden, k), weights)
            scale = self.decay ** (k - 1)
            terms += [(scale * self.token_weight, token), (scale * self.state_weight, state)]
            metrics[f"agreement_{k}"] = losses.agreement(logits, jnp.argmax(expected, axis=-1), weights)
        return {"loss": losses.add(*terms), **metrics}

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> Following:
        return read_prompt(self.network(target), params, target, prompt, self.levels)

    def observe(self, params: PyTree, target: Target, state: Following, outcome: Outcome) -> Following:
        return read_accepted(self.network(target), params, target, state, outcome)

    def propose(
        self, params: PyTree, target: Target, state: Following, round: Round
    ) -> tuple[Draft, Following]:
        network, variables, batch = self.network(target), {"params": params}, len(round.root)
        states = state.state[:, None]
        y = network.apply(variables, states, method="first")
        # Of the nodes above: the score of their paths and their places in the table of candidates.
        score, place = jnp.zeros((batch, 1)), jnp.full((batch, 1), -1)
        left = jnp.full((batch, 1), self.budget)
        tokens, scores, parents, filled = [], [], [], 0
        for level in range(1, self.levels):
            room = self.budget - level + 1  # the levels above took a node each, or more
            offered, guesses = self._offers(target.logits(y), room)
            offered = (score[..., None] + offered).reshape(batch, -1)
            score, child = jax.lax.top_k(offered, min(room, offered.shape[1]))
            score = jnp.where(jnp.arange(score.shape[1]) < left, score, -jnp.inf)
            left -= jnp.sum(score > -jnp.inf, axis=1, keepdims=True)
            above = child // guesses.shape[-1]
            scores.append(score)
            tokens.append(jnp.take_along_axis(guesses.reshape(batch, -1), child, axis=1))
            parents.append(jnp.take_along_axis(place, above, axis=1))
            place = jnp.broadcast_to(filled + jnp.arange(score.shape[1]), score.shape)
            filled += score.shape[1]
            if level + 1 < self.levels:
                states = jnp.take_along_axis(states, above[..., None], axis=1)
                states, y = network.apply(variables, states, target.embed(tokens[-1]), method="next")
        table = (jnp.concatenate(x, axis=1) for x in (tokens, scores, parents))
        return dynamic_draft(round.root, *table, self.budget, levels=self.levels, width=self.budget), state

    def _offers(self, logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """float32[B, n, V] -> log-probabilities, -inf where a token is not offered, and ids of the best
        `count` tokens [B, n, count]."""
        best, tokens = jax.lax.top_k(logits, min(count, logits.shape[-1]))
        log_p = best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        p = jnp.exp(log_p)
        offered = (jnp.cumsum(p, axis=-1) <= self.top_p) & (p >= self.floor * p[..., :1])
        return jnp.where(offered.at[..., 0].set(True), log_p, -jnp.inf), tokens
