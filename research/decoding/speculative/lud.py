"""Lexical unit decoding: a model tuned to say, in one call, as much as it is sure of.

Sun et al., "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs",
arXiv 2405.15208. A lexical unit is a run of tokens each of which, after the first, the model before tuning
(M_0) predicts with at least probability alpha. The model is tuned to say a whole unit from the place before it,
with placeholders where the unit's own tokens would stand. In decoding, placeholders follow the newest token;
their tokens are taken as long as each is given at least probability beta, and read as real tokens in the next
call.

Lossy by design: with `Unchecked` nobody looks at the tokens again. With an exact verifier the same drafts are
checked, and the output is that of the tuned model. Alpha, beta, the layout of the training rows and the
repetition rule are reconstructions: the paper's code was never released.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.sampling import argmax, gumbel
from research.decoding.speculative import losses
from research.decoding.speculative.training import Teacher, ahead, shifted
from research.decoding.speculative.trees import chain_paths
from research.decoding.speculative.virtual import (
    Chains,
    Inserted,
    Layout,
    at_anchors,
    draw_anchors,
    lay_out,
    run_anchored,
)
from research.decoding.verify import Accept, Draft, follow
from research.errors import UserError
from research.training.task import Batch, Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class Unchecked:
    """The verifier of LUD: every drafted token is kept, and the token after them is chosen as in plain
    decoding, drawn where `sampled`. The output is not that of the model alone."""

    sampled: bool = False

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array) -> Accept:
        if self.sampled:
            noise = gumbel(keys, logits.shape[-1])  # one for each depth, as in `Sampled`
            depth = jnp.broadcast_to(draft.tree.depth, draft.tokens.shape)
            depth = jnp.minimum(depth, keys.shape[1] - 1)  # virtual nodes lie deeper
            logits = logits + jnp.take_along_axis(noise, depth[..., None], axis=1)
        return follow(jnp.ones(draft.tokens.shape, bool), argmax(logits), draft.tree)


class LUDState(struct.PyTreeNode):
    """pending int32[B, k - 1], tokens that follow the newest, of which count int32[B] are drafted; recent
    int32[B, R], the last tokens, the newest included; before the text begins numbers that are no tokens."""

    pending: jax.Array
    count: jax.Array
    recent: jax.Array


@dataclasses.dataclass(frozen=True)
class LUD:
    """The drafter. Its parameters are {"placeholder": f32[D], "model": the tuned model's, at first M_0's}.

    The target of the training is M_0, which stays as it is and marks the units; what is decoded is `tuned`.

    Args:
        length: k, the longest unit; k - 1 placeholders follow the newest token.
        alpha: how sure M_0 must be of a token that continues a unit. 0 makes every run of k tokens a unit.
        beta: how sure the tuned model must be of a token that it says at a placeholder. Above 1 nothing is
            said in parallel.
        repetition: a token that would end an immediate repetition of a group of up to this many tokens is not
            said in parallel, nor is what follows it; 0 allows all.
        checked: placeholders follow every drafted token, so that there are new ones wherever a verifier stops.
            Without, they follow only the last one, where `Unchecked` always stops: k - 1 rows instead of
            k (k - 1).
        anchors: beginnings of units, drawn anew in every step, that are trained in each row; None is all.

    Raises:
        UserError: a length below 2, or a negative repetition.
    """

    length: int = 4
    alpha: float = 0.9
    beta: float = 0.9
    repetition: int = 2
    checked: bool = False
    anchors: int | None = None

    def __post_init__(self):
        if self.length < 2:
            raise UserError(f"LUD: units of up to {self.length} tokens leave nothing to say in parallel")
        if self.repetition < 0:
            raise UserError(f"LUD: repetition is {self.repetition}; 0 turns its control off")

    @functools.cached_property
    def _layout(self) -> Layout:
        """State s: the newest token, s drafted ones after it, placeholders behind all or the last."""
        blanks = self.length - 1
        above = blanks if self.checked else 0
        trees = [Chains(chain_paths(s), (above,) * s + (blanks,)) for s in range(self.length)]
        return lay_out(trees, top=1)

    @property
    def size(self) -> int:
        return self._layout.tree.size

    @property
    def levels(self) -> int:
        return self._layout.tree.levels

    def create(self, key: jax.Array, target: Target) -> PyTree:
        token = jax.random.randint(key, (), 0, target.model.vocab_size)
        return {
            "placeholder": target.embed(token).astype(jnp.float32),
            "model": jax.tree.map(jnp.array, target.params),
        }

    def tuned(self, params: PyTree, target: Target) -> PyTree:
        """The parameters that the placeholder was trained with: the tuned model's."""
        return params["model"]

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> LUDState:
        rows = len(prompt.root)
        size = max(1, 2 * self.repetition)
        # Different negative numbers: nothing before the text repeats anything.
        before = jnp.broadcast_to(-1 - jnp.arange(size), (rows, size))
        recent = _append(before, prompt.tokens, prompt.lengths)
        recent = _append(recent, prompt.root[:, None], jnp.ones((rows,), jnp.int32))
        return LUDState(jnp.zeros((rows, self.length - 1), jnp.int32), jnp.zeros((rows,), jnp.int32), recent)

    def propose(
        self, params: PyTree, target: Target, state: LUDState, round: Round
    ) -> tuple[Draft, LUDState]:
        layout = self._layout.at(state.count)
        rows = Inserted(jnp.broadcast_to(params["placeholder"], (1, layout.virtual, target.model.width)))
        tokens = layout.tokens(round.root, state.pending[..., None])
        return Draft(tokens, layout.tree, virtual=rows), state

    def observe(self, params: PyTree, target: Target, state: LUDState, outcome: Outcome) -> LUDState:
        accept = outcome.accept
        logits, blanks = self._layout.at(state.count).under_last(outcome)
        logits = logits[:, :, 0]
        guesses = argmax(logits)
        sure = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1) >= self.beta
        # What the output gained: the drafted tokens kept, and the newest.
        drafted = jnp.take_along_axis(outcome.draft.tokens, accept.path, axis=1)[:, 1:]
        recent = _append(state.recent, drafted, jnp.maximum(accept.count - 1, 0))
        recent = _append(recent, accept.token[:, None], jnp.minimum(accept.count, 1))
        said = sure & ~repeats(recent, guesses, self.repetition) & (blanks > 0)[:, None]
        count = jnp.sum(jnp.cumprod(said.astype(jnp.int32), axis=1), axis=1)
        return LUDState(guesses, count, recent)

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """Cross-entropy at all labelled places: every token after real ones, as ever, and the rest of the
        drawn units at placeholders."""
        place = self._units(teacher, batch)
        begins = (place == 0) & (shifted(place, 1) == 1)
        anchors, drawn = draw_anchors(begins, self.anchors, key)
        labels, weights = unit_labels(batch, place, anchors, self.length)
        weights = weights * drawn[:, None]
        blanks, count = self.length - 1, anchors.shape[1]
        width = teacher.target.model.width
        rows = Inserted(jnp.broadcast_to(params["placeholder"], (1, blanks * count, width)))
        within = np.tri(blanks, dtype=bool)
        tuned = teacher.target.replace(params=params["model"])
        real, guesses = run_anchored(tuned, batch, anchors, rows, within, range(1, self.length))
        language = losses.cross_entropy(real, batch["targets"], batch["weights"])
        units = losses.cross_entropy(guesses, labels, weights)
        continues = place > 0
        return {
            "loss": (language[0] + units[0], language[1] + units[1]),
            "language": language,
            "units": units,
            "agreement": losses.agreement(guesses, labels, weights),
            # Share of the tokens that continue a unit.
            "continued": (jnp.sum(continues * batch["weights"]), jnp.sum(batch["weights"])),
        }

    def _units(self, teacher: Teacher, batch: Batch) -> jax.Array:
        """`mark_units` of the batch's targets by M_0."""
        log_p = jax.nn.log_softmax(teacher.logits, axis=-1)
        chosen = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        return mark_units(jnp.exp(chosen), batch, self.alpha, self.length)


def mark_units(confidence: jax.Array, batch: Batch, alpha: float, length: int) -> jax.Array:
    """The place of every target in its unit, int32[B, T], 0 where one begins.

    confidence f32[B, T], what M_0 gives each target. A unit goes on while that is at least alpha, within a
    document, over targets that count, and for at most `length` tokens; then another begins.
    """
    segments, weights = batch["segments"], batch["weights"]
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    begins = ~(same & (confidence >= alpha) & (weights > 0))
    index = jnp.arange(segments.shape[1])
    run = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return run % length


def unit_labels(
    batch: Batch, place: jax.Array, anchors: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """What the placeholders behind anchors int32[B, A] should say: labels int32[B, k - 1, A] and weights,
    0 beyond the end of the unit that begins with the anchor's target."""
    labels, weights = [], []
    for j in range(1, length):
        label, weight = ahead(batch, j)
        inside = shifted(place, j) == j  # so many places on, the target is that far into a unit
        labels.append(at_anchors(label, anchors))
        weights.append(at_anchors(weight * inside * (place == 0), anchors))
    return jnp.stack(labels, axis=1), jnp.stack(weights, axis=1)


def repeats(recent: jax.Array, guesses: jax.Array, longest: int) -> jax.Array:
    """bool[B, M]: each of guesses int32[B, M], after recent int32[B, R] and those before it, ends a group of up
    to `longest` tokens that stood right before already. R >= 2 * longest."""
    text = jnp.concatenate([recent, guesses], axis=1)
    found = jnp.zeros(guesses.shape, bool)
    for size in range(1, longest + 1):
        same = text[:, size:] == text[:, :-size]
        # `size` equal pairs in a row, the last of them at the guess.
        ends = [
            same[:, same.shape[1] - guesses.shape[1] - back :][:, : guesses.shape[1]] for back in range(size)
        ]
        found |= functools.reduce(jnp.logical_and, ends)
    return found


def _append(recent: jax.Array, tokens: jax.Array, count: jax.Array) -> jax.Array:
    """The last R of recent int32[B, R] followed by the first count[b] of tokens int32[B, P]."""
    text = jnp.concatenate([recent, tokens], axis=1)
    places = count[:, None] + jnp.arange(recent.shape[1])
    return jnp.take_along_axis(text, places, axis=1)
