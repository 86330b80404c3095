"""SpecDec++: a draft model that stops when a rejection has become likely (arXiv 2405.19715).

A head on the draft's hidden states predicts whether the target will accept each drafted token. Drafting stops
as soon as the chance that one of them will be rejected exceeds a threshold, the form that the optimal policy
has (section 3.2, theorem 3.1):

    stop after Y_i if  1 - prod_{j < i} P(Y_j is accepted) > h,  with min <= i <= max

The head reads a token's own place, so Y_i, which costs nothing once Y_{i-1} has been read, is judged by the
next forward: the last drafted token is always unjudged, as in the authors' code. The rule looks at drafts
alone, so verification stays exact.

Training (section 3.3): Y_t ~ q(. | x_<t) at every place of a text, with label a_t = min(1, p(Y_t) / q(Y_t)). The
head reads a mixture, as it will when drafting: x_t with probability r, which has no loss, else Y_t. The loss is

    - sum_t [a_t log P_accept + w_rej (1 - a_t) log P_reject] / sum_t [a_t + w_rej (1 - a_t)]

The blocks of the head have parameters of their own each; the authors' code applies one block three times.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative.draft_model import (
    DraftModel,
    DraftState,
    draw,
    last_accepted,
    put,
    write,
)
from research.decoding.speculative.training import Teacher, ahead
from research.decoding.tree import chain
from research.decoding.verify import Draft
from research.errors import UserError
from research.nn.cache import Cache
from research.nn.linear import Linear
from research.training.task import Batch, Metrics, PyTree


class AcceptanceHead(nn.Module):
    """Hidden states [..., D] -> float32 logits [..., 2] of rejection and acceptance, through `blocks` residual
    blocks x + SiLU(x W + b)."""

    blocks: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        x = hidden
        for i in range(self.blocks):
            x = x + nn.silu(Linear(x.shape[-1], use_bias=True, name=f"block_{i}")(x))
        return Linear(2, use_bias=True, name="output")(x).astype(jnp.float32)


class AdaptiveState(DraftState):
    """finished bool[B]: rows that need no drafts any more."""

    finished: jax.Array


@dataclasses.dataclass(frozen=True)
class SpecDecPP:
    """A draft model and its acceptance head; parameters `draft/...` and `head/...`.

    The draft is trained first, in a stage with trainable=("^drafter/draft/",) and loss_weights={"kl": 1.0}, and
    its head after it, with trainable=("^drafter/head/",).

    Args:
        model: the draft, a decoder with the target's vocabulary and at least its context.
        threshold: h, of the chance of a rejection. The weight of rejections shifts what the head predicts, so
            h is tuned.
        shortest, longest: bounds of the number of drafted tokens; `longest` decides the size of every call.
        blocks: of the head.
        rejection_weight: w_rej.
        mixing: r.

    Raises:
        UserError: a value outside its range; when it is used, a model that can't draft for the target.
    """

    model: nn.Module
    threshold: float = 0.5
    shortest: int = 2
    longest: int = 20
    blocks: int = 3
    rejection_weight: float = 6.0
    mixing: float = 0.15

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise UserError(
                f"SpecDecPP drafts from shortest={self.shortest} to longest={self.longest} tokens: at least 1, "
                "and in this order"
            )
        if not self.threshold >= 0:
            raise UserError(f"SpecDecPP.threshold must be at least 0, not {self.threshold}")
        if not self.rejection_weight > 0:
            raise UserError(f"SpecDecPP.rejection_weight must be above 0, not {self.rejection_weight}")
        if not 0 <= self.mixing < 1:
            raise UserError(f"SpecDecPP.mixing must be from 0 to less than 1, not {self.mixing}")

    @property
    def size(self) -> int:
        return self.longest + 1

    @property
    def levels(self) -> int:
        return self.longest + 1

    @property
    def head(self) -> AcceptanceHead:
        return AcceptanceHead(self.blocks)

    def create(self, key: jax.Array, target: Target) -> PyTree:
        draft_key, head_key = jax.random.split(key)
        draft = DraftModel(self.model).create(draft_key, target)
        hidden = jnp.zeros((1, self.model.width))
        return {"draft": draft, "head": self.head.init(head_key, hidden)["params"]}

    # Training

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """`loss` is the head's, which gives the draft no gradient; `kl`, `acceptance` and `agreement` are the
        draft's (see `DraftModel`); `label` is the mean a_t."""
        key = jax.random.key(0) if key is None else key  # evaluation draws the same candidates every time
        draft = DraftModel(self.model).loss(params["draft"], teacher, batch, key)
        total, weight, label = self._head_loss(params, teacher, batch, key)
        return {"loss": (total, weight), "label": label, "kl": draft.pop("loss"), **draft}

    def _head_loss(
        self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """-> sum of the weighted cross-entropies, sum of their weights, (sum of a_t, places)."""
        variables = {"params": jax.lax.stop_gradient(params["draft"])}
        places = batch["positions"], batch["segments"]
        draw_key, mix_key = jax.random.split(key)
        log_q = jax.nn.log_softmax(self.model.apply(variables, batch["tokens"], *places))
        candidate = jax.random.categorical(draw_key, log_q).astype(jnp.int32)
        ratio = at(jax.nn.log_softmax(teacher.logits), candidate) - at(log_q, candidate)
        label = jnp.exp(jnp.minimum(ratio, 0.0))
        # All of this was known one place before the candidate's own.
        candidate, label, weights = (delayed(x) for x in (candidate, label, ahead(batch, 0)[1]))
        drafted = (weights > 0) & ~jax.random.bernoulli(mix_key, self.mixing, weights.shape)
        mixture = jnp.where(drafted, candidate, batch["tokens"])
        hidden, _ = self.model.apply(variables, mixture, *places, method="features")
        log_s = jax.nn.log_softmax(self.head.apply({"params": params["head"]}, hidden))
        weights = weights * drafted
        accept, reject = weights * label, weights * self.rejection_weight * (1 - label)
        total = -jnp.sum(accept * log_s[..., 1] + reject * log_s[..., 0])
        return total, jnp.sum(accept + reject), (jnp.sum(weights * label), jnp.sum(weights))

    # Drafting

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> AdaptiveState:
        state = DraftModel(self.model, self.longest).init(params["draft"], target, prompt)
        return AdaptiveState(state.cache, state.last, jnp.zeros(state.last.shape, bool))

    def propose(
        self, params: PyTree, target: Target, state: AdaptiveState, round: Round
    ) -> tuple[Draft, AdaptiveState]:
        batch = len(round.root)
        tokens = jnp.zeros((batch, self.size), jnp.int32).at[:, 0].set(round.root)
        q = jnp.zeros((batch, self.size, self.model.vocab_size))

        def forward(
            cache: Cache, tokens: jax.Array, q: jax.Array, fed: jax.Array, depth: jax.Array, active: jax.Array
        ) -> tuple:
            """Draws the child of node `depth`; also log P(the last token fed is accepted), float32[B]."""
            choose = lambda logits: draw(round, logits, tokens, depth, depth)  # noqa: E731
            token, log_q, hidden, cache = write(self.model, params["draft"], cache, fed, choose, active)
            judged = jax.nn.log_softmax(self.head.apply({"params": params["head"]}, hidden))[:, 1]
            q = jax.lax.dynamic_update_slice_in_dim(q, log_q[:, None], depth, axis=1)
            return cache, put(tokens, depth + 1, token), q, judged

        active = ~state.finished
        cache, fed = state.cache.rollback(round.length - 1), jnp.stack([state.last, round.root], axis=1)
        cache, tokens, q, _ = forward(cache, tokens, q, fed, jnp.int32(0), active)

        def drafting(carry: tuple) -> jax.Array:
            depth, active = carry[:2]
            return (depth < self.longest) & jnp.any(active)

        def step(carry: tuple) -> tuple:
            depth, active, length, chance, cache, tokens, q = carry
            fed = jax.lax.dynamic_index_in_dim(tokens, depth, axis=1)
            cache, tokens, q, judged = forward(cache, tokens, q, fed, depth, active)
            chance = chance + judged
            length = length + active
            active = active & ((length < self.shortest) | (-jnp.expm1(chance) <= self.threshold))
            return depth + 1, active, length, chance, cache, tokens, q

        start = jnp.int32(1), active, active.astype(jnp.int32), jnp.zeros((batch,)), cache, tokens, q
        _, _, length, _, cache, tokens, q = jax.lax.while_loop(drafting, step, start)
        tree = chain(self.size).replace(real=jnp.arange(self.size) <= length[:, None])
        return Draft(tokens, tree, None if round.greedy else q), state.replace(cache=cache)

    def observe(
        self, params: PyTree, target: Target, state: AdaptiveState, outcome: Outcome
    ) -> AdaptiveState:
        finished = outcome.accept.count == 0
        return state.replace(last=last_accepted(outcome, state.last), finished=finished)


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [..., V] at index int32[...]."""
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def delayed(x: jax.Array) -> jax.Array:
    """x [B, T] -> y with y[:, t] = x[:, t - 1], zero at the beginning."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
