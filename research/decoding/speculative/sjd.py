"""Speculative Jacobi decoding (SJD, arXiv 2410.01699): draft with the model's own last look at the window.

Jacobi decoding scores a window of guesses in every call and replaces them by what the model now says; sampled
tokens never settle under it. SJD keeps, for every token of the window, the distribution q that it was drawn
from, and accepts it against the distribution p of the next call with probability min(1, p / q); the token after
the accepted ones comes from norm(max(p - q, 0)). All later tokens of the window are drawn anew from p, which is
their next q. Nothing is trained, and the law of the output is that of plain sampling: a token is tested once,
in the call after it was drawn, with the very q it came from.

So the state is what to draw from, not tokens: `propose` draws with the call's own keys, which verification never
reads. Images come as tokens in raster order, and what enters the window at its end is guessed, at random or from
its neighbours (`init_rule`).
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.sampling import EXCLUDED, argmax, gumbel
from research.decoding.tree import chain
from research.decoding.verify import Draft
from research.errors import UserError, nearest

InitRule = Literal["random", "repeat_horizontal", "repeat_vertical", "sample_horizontal", "sample_vertical"]


class Window(struct.PyTreeNode):
    """The W tokens after the root, before they are drawn.

    logits float32[B, W, V], processed, to draw them from. guesses int32[B]: how many at the end were never scored;
    they are made by the init rule. recent int32[B, columns]: the tokens before the window, the root last; past
    float32[B, H, V]: the logits of the last H of them. start int32[B]: position where the image begins.
    """

    logits: jax.Array
    guesses: jax.Array
    recent: jax.Array
    past: jax.Array
    start: jax.Array


@dataclasses.dataclass(frozen=True)
class SJD:
    """The proposer; verify with `Sampled`, or with `Greedy` for greedy Jacobi decoding (no draws then).

    Args:
        codes: image tokens are the ids below.
        rows, columns: of the image in tokens; a token that ends a line counts as a column.
        window: drafted tokens W; a call scores W + 1.
        init_rule: what enters the window is a uniform code ("random"), a copy of the neighbour ("repeat") or a draw
            from the neighbour's distribution ("sample"), the one to the left ("horizontal") or above
            ("vertical"). Where that is not known yet it stands for the last one known in its direction;
            where there is none, in the first column or row, the guess is a uniform code.
        header: output tokens before the image. They and what follows the image are decoded one by one.

    Raises:
        UserError: a number outside its range, or an unknown rule.
    """

    codes: int
    rows: int
    columns: int
    window: int = 16
    init_rule: InitRule = "random"
    header: int = 0

    def __post_init__(self) -> None:
        for name in ("codes", "rows", "columns", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"SJD.{name} must be at least 1, not {getattr(self, name)}")
        if self.header < 0:
            raise UserError(f"SJD.header must be at least 0, not {self.header}")
        if self.init_rule not in (rules := get_args(InitRule)):
            close = nearest(self.init_rule, rules)
            hint = f"did you mean {close}?" if close else f"it is one of {', '.join(rules)}"
            raise UserError(f"SJD.init_rule: no rule {self.init_rule!r}; {hint}")

    @property
    def size(self) -> int:
        return self.window + 1

    @property
    def levels(self) -> int:
        return self.window + 1

    def init(self, params: Any, target: Target, prompt: Prompt) -> Window:
        batch, vocab_size = prompt.root.shape[0], target.model.vocab_size
        past = jnp.zeros((batch, self._past, vocab_size))
        if self._past:  # of the root nothing but the token is known
            past = past.at[:, -1].set(_point(prompt.root, vocab_size))
        window = Window(
            logits=jnp.zeros((batch, self.window, vocab_size)),
            guesses=jnp.full((batch,), self.window),
            recent=jnp.zeros((batch, self.columns), jnp.int32).at[:, -1].set(prompt.root),
            past=past,
            start=prompt.lengths + self.header,
        )
        return self._with_neighbours_logits(window)

    def propose(self, params: Any, target: Target, state: Window, round: Round) -> tuple[Draft, Window]:
        split = jax.vmap(lambda key: jax.random.split(key, 2))(round.keys)
        drawn = argmax(state.logits)
        if not round.greedy:
            per_token = jax.vmap(lambda key: jax.random.split(key, self.window))(split[:, 0])
            drawn = argmax(state.logits + gumbel(per_token, state.logits.shape[-1]))
        uniform = jax.vmap(lambda key: jax.random.randint(key, (self.window,), 0, self.codes))(split[:, 1])
        offset = round.length[:, None] + 1 + jnp.arange(self.window) - state.start[:, None]

        guess = uniform
        if self.init_rule != "random":
            neighbour = self._neighbour(state.guesses, self.columns)
            known = jnp.concatenate([state.recent, drawn], axis=1)
            copy = jnp.take_along_axis(known, neighbour, axis=1)
            alone = offset + neighbour - self.columns - jnp.arange(self.window) < 0  # outside the image
            if self._horizontal:
                alone |= offset % self.columns == 0
            guess = jnp.where(alone, uniform, copy if self.init_rule.startswith("repeat") else drawn)

        guessed = self._guessed(state.guesses)
        tokens = jnp.where(guessed, guess, drawn)
        # Once made, a guess is certain: its q is a point mass. Logits are left as they are, because the verifier
        # normalises p and q alike, so that equal ones stay equal to the last bit.
        q = jnp.where(guessed[..., None], _point(tokens, state.logits.shape[-1]), state.logits)
        # In the header nothing is drafted, not even the image behind it.
        inside = (offset[:, :1] >= 0) & (offset < self.rows * self.columns)
        tree = chain(self.size).replace(real=jnp.pad(inside, ((0, 0), (1, 0)), constant_values=True))
        # q[:, i] is the distribution of the child of node i; the last node has none.
        q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
        return Draft(jnp.concatenate([round.root[:, None], tokens], axis=1), tree, q), state

    def observe(self, params: Any, target: Target, state: Window, outcome: Outcome) -> Window:
        """Moves the window behind the new root: behind node i of the call stands p of the token after it, given the
        draft up to it."""
        count = outcome.accept.count[:, None]
        place = jnp.arange(self.columns + self.size)
        tokens = jnp.concatenate([state.recent, outcome.draft.tokens[:, 1:], state.recent[:, :1]], axis=1)
        tokens = jnp.where(place == self.columns - 1 + count, outcome.accept.token[:, None], tokens)
        logits = jnp.concatenate([state.past, outcome.processed], axis=1)
        ahead = jnp.minimum(count + self._past + jnp.arange(self.window), logits.shape[1] - 1)
        state = state.replace(
            logits=jnp.take_along_axis(logits, ahead[..., None], axis=1),
            guesses=jnp.clip(outcome.accept.count - 1, 0, self.window),
            recent=jnp.take_along_axis(tokens, count + jnp.arange(self.columns), axis=1),
            past=jnp.take_along_axis(logits, (count + jnp.arange(self._past))[..., None], axis=1),
        )
        return self._with_neighbours_logits(state)

    @property
    def _horizontal(self) -> bool:
        return self.init_rule.endswith("horizontal")

    @property
    def _past(self) -> int:
        """H: how many past tokens the rule may need the logits of."""
        if not self.init_rule.startswith("sample"):
            return 0
        return 1 if self._horizontal else self.columns

    def _guessed(self, guesses: jax.Array) -> jax.Array:
        """bool[B, W]: the last `guesses` int32[B] places of the window."""
        return jnp.arange(self.window) >= self.window - guesses[:, None]

    def _neighbour(self, guesses: jax.Array, before: int) -> jax.Array:
        """int32[B, W]: where the known neighbour of every guess stands in `before` past places and the window."""
        known = before + self.window - guesses[:, None]
        place = before + jnp.arange(self.window)
        if self._horizontal:
            return jnp.broadcast_to(known - 1, (*guesses.shape, self.window))
        rows_up = jnp.maximum(-(-(place - known + 1) // self.columns), 1)
        return place - rows_up * self.columns

    def _with_neighbours_logits(self, state: Window) -> Window:
        """Guesses that are drawn get the logits of their neighbour."""
        if not self._past:
            return state
        known = jnp.concatenate([state.past, state.logits], axis=1)
        neighbour = self._neighbour(state.guesses, self._past)
        theirs = jnp.take_along_axis(known, neighbour[..., None], axis=1)
        return state.replace(logits=jnp.where(self._guessed(state.guesses)[..., None], theirs, state.logits))


def _point(tokens: jax.Array, vocab_size: int) -> jax.Array:
    """tokens int32[...] -> log-probabilities [..., V] of the distribution that always gives them."""
    return jnp.where(jnp.arange(vocab_size) == tokens[..., None], 0.0, EXCLUDED)
