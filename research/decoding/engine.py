"""The decoding loop: propose, score in one call, verify, commit; one `lax.while_loop`, static shapes.

`prefill` and `decode` are compiled once for every shape bucket and every static choice (model, proposer,
verifier, which processors); numbers such as the temperature, the seed, lengths and end tokens are arguments.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.correction import Correction
from research.decoding.proposers import Outcome, Prompt, Proposer, Round, Target
from research.decoding.sampling import Chain, apply_chain, position_keys
from research.decoding.tree import Tree, chain
from research.decoding.verify import Draft, Greedy, Verifier
from research.nn.cache import Cache


class State(struct.PyTreeNode):
    """A batch in the middle of decoding, a row for every sequence.

    cache holds the prompt and all output tokens but the newest; root int32[B] is the newest. tokens int32[B,
    capacity] is the output, count int32[B] its length, limit int32[B] its greatest length. done bool[B] rows
    are frozen. keys [B] decide every draw of a row. histogram int32[B, levels]: in how many calls the row
    gained 1, 2, ... tokens; drafted int32[B]: tokens offered to the verifier. processors and proposer are
    their states.
    """

    cache: Cache
    root: jax.Array
    tokens: jax.Array
    count: jax.Array
    limit: jax.Array
    done: jax.Array
    keys: jax.Array
    histogram: jax.Array
    drafted: jax.Array
    processors: tuple[Any, ...]
    proposer: Any


class Weights(struct.PyTreeNode):
    """The parameters of the target model and of the proposer, and the processors' numbers."""

    target: Any
    proposer: Any
    processors: Chain


@dataclasses.dataclass(frozen=True)
class Engine:
    """What is static in decoding.

    Args:
        model: a module with `init_cache`, `prefill` and `extend`.
        proposer, verifier: how tokens are drafted and kept.
        capacity: cache slots and output tokens a row.
        samples: sequences for every prompt.
        dtype: of the cache.
        correction: what makes the cache exact again where `extend` is approximate, or None.
    """

    model: Any
    proposer: Proposer
    verifier: Verifier
    capacity: int
    samples: int = 1
    dtype: str = "float32"
    correction: Correction | None = None

    def prefill(
        self,
        weights: Weights,
        tokens: jax.Array,
        lengths: jax.Array,
        limit: jax.Array,
        keys: jax.Array,
        ends: jax.Array,
        beside: tuple[Any, ...] = (),
    ) -> State:
        """Read the prompts, int32[B, T] padded on the right to `lengths`, and choose the first token of each
        sample.

        limit int32[B] output tokens allowed, keys [B * samples], ends int32[E] tokens that end a row, beside: what the
        model's `prefill` takes beside tokens (images).
        The rows of the state are samples of prompt 0, then of prompt 1, ...
        """
        batch = tokens.shape[0]
        variables = {"params": weights.target}
        logits, hidden, fresh = self.model.apply(variables, tokens, lengths, *beside, method="prefill")
        margin = self.proposer.levels
        if self.correction is not None:
            margin += self.correction.every * margin
        cache = self.model.init_cache(batch, self.capacity, jnp.dtype(self.dtype), margin=margin)
        cache = cache.commit(fresh, None, lengths)
        if self.samples > 1:
            rows = jnp.repeat(jnp.arange(batch), self.samples)
            cache = cache.select(rows)
            logits, hidden, tokens, lengths, limit = (
                x[rows] for x in (logits, hidden, tokens, lengths, limit)
            )
        states = tuple(p.init(tokens, lengths, logits.shape[-1]) for p in weights.processors)
        processed = apply_chain(
            weights.processors, logits[:, None], jax.tree.map(lambda x: x[:, None], states)
        )
        nothing = Draft(jnp.zeros((logits.shape[0], 1), jnp.int32), chain(1))
        count = jnp.zeros_like(lengths)
        root = self.verifier(processed, nothing, _position_keys(keys, count, 1)).token
        prompt = Prompt(tokens, lengths, hidden, root, self.capacity)
        return State(
            cache=cache,
            root=root,
            tokens=jnp.zeros((logits.shape[0], self.capacity), jnp.int32).at[:, 0].set(root),
            count=count + 1,
            limit=limit,
            done=(limit <= 1) | _is_end(root, ends),
            keys=keys,
            histogram=jnp.zeros((logits.shape[0], self.proposer.levels), jnp.int32),
            drafted=jnp.zeros_like(lengths),
            processors=states,
            proposer=self.proposer.init(weights.proposer, Target(weights.target, self.model), prompt),
        )

    def decode(
        self, weights: Weights, state: State, stopped: jax.Array, calls: jax.Array, ends: jax.Array
    ) -> State:
        """Up to `calls` int32[] model calls more, fewer when every row is done; rows `stopped` bool[B] end
        first."""
        state = state.replace(done=state.done | stopped)

        def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
            return (carry[0] < calls) & ~jnp.all(carry[1].done)

        def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            return carry[0] + 1, self._call(weights, carry[1], ends)

        return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]

    def correct(self, weights: Weights, state: State, since: jax.Array) -> tuple[State, jax.Array]:
        """Computes the cached rows from position since[b] on anew, those of at most `correction.every` calls.

        -> the state, and from where on rows will have to be corrected next time, int32[B].
        """
        length = state.cache.length
        # The cache holds the prompt and the output but for its newest token.
        prompt = length - (state.count - 1)
        place = (since - prompt)[:, None] + jnp.arange(self.correction.every * self.proposer.levels)
        tokens = jnp.take_along_axis(state.tokens, jnp.clip(place, 0, self.capacity - 1), axis=1)
        clean = state.cache.rollback(since)
        variables = {"params": weights.target}
        _, _, fresh = self.correction.model.apply(variables, tokens, clean, method="extend")
        return state.replace(cache=clean.commit(fresh, None, length - since)), length

    def _call(self, weights: Weights, state: State, ends: jax.Array) -> State:
        def warp(logits: jax.Array, tokens: jax.Array, tree: Tree) -> jax.Array:
            along = tuple(
                p.along(s, tokens, tree) for p, s in zip(weights.processors, state.processors, strict=True)
            )
            return apply_chain(weights.processors, logits, along)

        greedy = isinstance(self.verifier, Greedy)
        round_ = Round(state.root, state.cache.length, _call_keys(state), warp, greedy)
        target = Target(weights.target, self.model)
        draft, proposer_state = self.proposer.propose(weights.proposer, target, state.proposer, round_)
        tree = draft.tree
        virtual = 0 if draft.virtual is None else draft.virtual.size
        if tree.size != self.proposer.size or tree.levels != self.proposer.levels:
            raise ValueError(
                f"{self.proposer} drafted {tree.size} nodes on {tree.levels} levels, not the "
                f"{self.proposer.size} on {self.proposer.levels} that it declares"
            )
        variables = {"params": weights.target}
        logits, hidden, fresh = self.model.apply(
            variables,
            draft.tokens[:, : tree.size - virtual],
            state.cache,
            jnp.asarray(tree.mask),
            jnp.asarray(tree.depth),
            *(() if draft.virtual is None else (draft.virtual,)),
            method="extend",
        )
        keys = _position_keys(state.keys, state.count, tree.levels)
        processed = warp(logits, draft.tokens, tree)
        accept = self.verifier(processed, draft, keys)

        along_path = jnp.take_along_axis(draft.tokens, accept.path, axis=1)  # the root and accepted drafts
        place = jnp.arange(tree.levels)
        gained = jnp.where(
            place == accept.count[:, None] - 1, accept.token[:, None], jnp.roll(along_path, -1, axis=1)
        )
        kept = jnp.minimum(accept.count, state.limit - state.count)
        end = _is_end(gained, ends) & (place < kept[:, None])
        ended = jnp.any(end, axis=1)
        kept = jnp.where(ended, jnp.argmax(end, axis=1).astype(jnp.int32) + 1, kept)
        # Tokens are never negative. That the count depends on them orders the cache's update after its reads,
        # so that it happens in place: without it every call copies the whole cache, twice.
        kept = jnp.where(state.done, 0, kept) + jnp.minimum(accept.token, 0)
        # The cache takes as many rows as the output gains: the new root stays outside.
        accept = accept.replace(count=kept)
        count = state.count + kept
        newest = jnp.take_along_axis(gained, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
        return State(
            cache=state.cache.commit(fresh, None if tree.size == 1 else accept.path, kept),
            root=jnp.where(kept > 0, newest, state.root),
            tokens=_write(state.tokens, gained, state.count, kept),
            count=count,
            limit=state.limit,
            done=state.done | ended | (count >= state.limit),
            keys=state.keys,
            histogram=state.histogram + (place == kept[:, None] - 1),
            drafted=state.drafted + jnp.where(state.done, 0, jnp.sum(tree.real, -1, dtype=jnp.int32) - 1),
            processors=tuple(
                p.update(s, along_path, kept)
                for p, s in zip(weights.processors, state.processors, strict=True)
            ),
            proposer=self.proposer.observe(
                weights.proposer, target, proposer_state, Outcome(draft, accept, logits, processed, hidden)
            ),
        )


@functools.partial(jax.jit, static_argnums=2)
def row_keys(seed: jax.Array, ids: jax.Array, samples: int) -> jax.Array:
    """Keys [B * samples]: that of sample s of the prompt with id int32[B] depends on seed, id and s alone."""
    base = jax.random.key(seed)

    def of_prompt(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(base, number)
        return jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(samples))

    return jax.vmap(of_prompt)(ids).reshape(-1)


# Two families of keys for a row: one for each output position, which verifies, and one for each call, which
# drafts.
def _position_keys(keys: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return position_keys(jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys), start, count)


def _call_keys(state: State) -> jax.Array:
    calls = jnp.sum(state.histogram, axis=1)
    return jax.vmap(lambda key, call: jax.random.fold_in(jax.random.fold_in(key, 1), call))(state.keys, calls)


def _is_end(tokens: jax.Array, ends: jax.Array) -> jax.Array:
    return jnp.any(tokens[..., None] == ends, axis=-1)


def _write(buffer: jax.Array, values: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """buffer [B, S] with values[b, :count[b]] at start[b]; a select, because scatters are loops on CPU."""
    offset = jnp.arange(buffer.shape[1]) - start[:, None]
    chosen = jnp.take_along_axis(values, jnp.clip(offset, 0, values.shape[1] - 1), axis=1)
    return jnp.where((offset >= 0) & (offset < count[:, None]), chosen, buffer)


@functools.lru_cache(maxsize=64)
def _program(engine: Engine, method: str, treedef: Any, shapes: tuple) -> jax.stages.Compiled:
    args = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes])
    donate = () if method == "prefill" else (1,)
    return jax.jit(getattr(engine, method), donate_argnums=donate).lower(*args).compile()


def compiled(engine: Engine, method: str, *args: Any) -> jax.stages.Compiled:
    """The program of `engine.prefill`, `engine.decode` or `engine.correct` for arguments of these shapes, compiled
    on first use.

    The latter two give their state's memory to the next state.
    """
    leaves, treedef = jax.tree.flatten(args)
    return _program(engine, method, treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))


def programs() -> int:
    """How many programs have been compiled in this process."""
    return _program.cache_info().misses
