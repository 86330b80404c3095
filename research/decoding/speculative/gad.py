"""Generalized aggressive decoding: a non-autoregressive drafter fills a block of tokens at once.

Lossless Acceleration for Seq2seq Generation with Aggressive Decoding (arXiv 2205.10350, section 3.2; first in
arXiv 2203.16487). The drafter is an encoder-decoder of its own whose decoder sees in both directions. It reads
the source, the accepted output and k mask tokens, and names all k tokens in one pass; the target, which is
autoregressive, verifies them. With the exact verifiers the output is the target's own. GAD++ accepts by
`verify.TopBeta`, and is not lossless.

Training ("block mask", "glancing"): of a target of L tokens the first r = L - (floor(u L) + 1) are given, u
uniform on [0, 1), and k masks follow. A first pass, without gradient, counts the wrong tokens; floor(f wrong)
of the masked places, drawn at random, are shown, f falling from 0.5 to 0.3; the loss of a second pass is taken
on the places that stayed masked. The targets are the teacher's own greedy output (distillation).
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.decoding.engine import Engine, Weights
from research.decoding.proposers import Outcome, Plain, Prompt, Round, Target
from research.decoding.sampling import argmax
from research.decoding.speculative.losses import agreement, cross_entropy
from research.decoding.speculative.training import Teacher
from research.decoding.tree import chain
from research.decoding.verify import Draft, Greedy
from research.errors import UserError
from research.nn.transformer import unscan_layers
from research.nn.weights import Weight, materialize
from research.training.task import Batch, Metrics, PyTree, dropout_rngs

GLANCING = (0.5, 0.3)  # share of the wrong tokens that is shown, at the beginning and the end of training


class Reading(struct.PyTreeNode):
    """What the drafter has read: `memory`, its cache with the encoded source and no token of the target;
    tokens int32[B, S], the start token and the output, the root included; count int32[B] of them."""

    memory: Any
    tokens: jax.Array
    count: jax.Array


@dataclass(frozen=True)
class GAD:
    """Drafts `block` tokens in one pass of `model`.

    Args:
        model: an encoder-decoder whose decoder has the mask rule `Full` and one token more than the target,
            the mask. Its encoder and embedding have the target's shapes, and start as copies of them.
        block: k, tokens of a draft; what the drafter writes behind an end is not drafted.
        eos: the token that ends a target.
        records: of training, over which `GLANCING` falls; batches say in `record` where they are. None: no
            glancing, all masked places are learned from the first pass.
        distilled: the targets are the teacher's greedy output, decoded in every step, instead of the data's.
        label_smoothing: share of the uniform distribution in the loss.
    """

    model: nn.Module
    block: int = 25
    eos: int = 2
    records: int | None = None
    distilled: bool = True
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"GAD.block: {self.block}; it must be at least 1")
        if self.records is not None and self.records < 1:
            raise UserError(f"GAD.records: {self.records}; at least 1, or None for no glancing")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"GAD.label_smoothing: {self.label_smoothing} is not in [0, 1)")

    @property
    def size(self) -> int:
        return self.block + 1

    @property
    def levels(self) -> int:
        return self.block + 1

    @property
    def mask(self) -> int:
        """The mask token, the last of the drafter's vocabulary."""
        return self.model.vocab_size - 1

    # Drafting.

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> Reading:
        batch = prompt.root.shape[0]
        variables = {"params": params}
        _, states, fresh = self.model.apply(variables, prompt.tokens, prompt.lengths, method="prefill")
        empty = self.model.init_cache(batch, 1, states.dtype)
        memory = empty.commit(fresh, None, prompt.lengths).rollback(jnp.zeros_like(prompt.lengths))
        room = min(prompt.capacity, target.model.max_length) + self.block
        tokens = jnp.full((batch, room), self.mask, jnp.int32)
        start = Reading(memory, tokens.at[:, 0].set(self.model.bos), jnp.ones_like(prompt.lengths))
        return _append(start, prompt.root[:, None], jnp.ones_like(prompt.lengths))

    def propose(self, params: PyTree, target: Target, state: Reading, round: Round) -> tuple[Draft, Reading]:
        drafted = self.fill(params, state)
        tokens = jnp.concatenate([round.root[:, None], drafted], axis=1)
        ended = jnp.cumsum(drafted == self.eos, axis=1) - (drafted == self.eos) > 0
        real = jnp.concatenate([jnp.ones_like(ended[:, :1]), ~ended], axis=1)
        return Draft(tokens, chain(self.size).replace(real=real)), state

    def fill(self, params: PyTree, state: Reading) -> jax.Array:
        """What the drafter puts in the place of the masks behind the output, int32[B, block]."""
        count, room = state.count[:, None], state.tokens.shape[1]
        place = jnp.arange(room)
        tokens = jnp.where(place < count, state.tokens, self.mask)
        seen = jnp.broadcast_to((place < count + self.block)[:, None], (tokens.shape[0], room, room))
        _, hidden, _ = self.model.apply({"params": params}, tokens, state.memory, seen, method="extend")
        masked = jnp.minimum(count + jnp.arange(self.block), room - 1)
        hidden = jnp.take_along_axis(hidden, masked[..., None], axis=1)
        return argmax(self._named(params, hidden))

    def observe(self, params: PyTree, target: Target, state: Reading, outcome: Outcome) -> Reading:
        accept = outcome.accept
        place = jnp.arange(self.levels)
        drafted = jnp.roll(outcome.draft.tokens, -1, axis=1)  # a chain: accepted are nodes 1 .. count - 1
        gained = jnp.where(place == accept.count[:, None] - 1, accept.token[:, None], drafted)
        return _append(state, gained, accept.count)

    def _named(self, params: PyTree, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits of every token but the mask [..., V]."""
        return self.model.apply({"params": params}, hidden, method="logits")[..., : self.mask]

    # Training.

    def create(self, key: jax.Array, target: Target) -> PyTree:
        params = self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        if "encoder" not in target.params:
            raise UserError("GAD drafts for an encoder-decoder, and the target has no encoder")
        table = params["embedding"]["table"]
        own = {"encoder": params["encoder"], "embedding": table[:-1]}  # the mask has no counterpart
        known = {"encoder": target.params["encoder"], "embedding": target.params["embedding"]["table"]}
        known = jax.tree.map(materialize, known, is_leaf=lambda leaf: isinstance(leaf, Weight))
        if jax.tree.map(jnp.shape, own) != jax.tree.map(jnp.shape, known):
            raise UserError(
                "GAD.model: its encoder or embedding differ in shape from the target's; give it the target's "
                f"encoder and width, and vocab_size={known['embedding'].shape[0] + 1}"
            )
        known = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), known)
        table = jnp.concatenate([known["embedding"], table[-1:]])
        return {**params, "encoder": known["encoder"], "embedding": {"table": table}}

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """On batches of `SequenceToSequence`, with `record` int32[B] where there is glancing. In evaluation
        nothing is shown, nothing smoothed, and the places are the same every time.

        Metrics: loss; accuracy, of the first pass, so of what is drafted.
        """
        targets, weights = batch["targets"], batch["weights"]
        if self.distilled:
            targets, weights = distil(teacher.target, batch, self.eos)
        fixed = jax.random.key(0)
        cut_key, glance_key, dropout_key = jax.random.split(fixed if key is None else key, 3)
        lengths = jnp.sum(weights, axis=1).astype(jnp.int32)
        given = cut(cut_key, lengths)
        # Place 0 is the start token, and place i the token i of the target.
        behind = jnp.full((targets.shape[0], self.block), self.mask, jnp.int32)
        gold = jnp.concatenate([jnp.full_like(targets[:, :1], self.model.bos), targets, behind], axis=1)
        places = 1 + given[:, None] + jnp.arange(self.block)  # of the masks
        labels = jnp.take_along_axis(gold, places, axis=1)
        labelled = places <= lengths[:, None]
        rngs = dropout_rngs(None if key is None else dropout_key)  # one key: both passes drop the same units

        def read(params: PyTree, shown: jax.Array) -> jax.Array:
            """Logits [B, k, V] at the masked places, `shown` bool[B, k] of which hold their token."""
            hidden = (jnp.arange(gold.shape[1])[:, None] == places[:, None, :]) & ~shown[:, None]  # [B, S, k]
            tokens = jnp.where(jnp.any(hidden, axis=-1), self.mask, gold)
            apply = functools.partial(self.model.apply, {"params": params}, rngs=rngs)
            source = apply(batch["source"], batch["source_lengths"], method="encode")
            states, _ = apply(tokens, places[:, -1] + 1, *source, method="features")
            return self._named(params, jnp.take_along_axis(states, places[..., None], axis=1))

        learned, none = labelled, jnp.zeros_like(labelled)
        if self.records is None or key is None:
            logits = first = read(params, none)
        else:
            first = read(jax.lax.stop_gradient(params), none)
            shown = glance(first, labels, labelled, self.ratio(batch["record"]), glance_key)
            logits, learned = read(params, shown), labelled & ~shown
        learned = learned.astype(jnp.float32)
        total, weight = cross_entropy(logits, labels, learned)
        if self.label_smoothing and key is not None:
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            total = (1 - self.label_smoothing) * total + self.label_smoothing * jnp.sum(learned * uniform)
        accuracy = agreement(first, labels, labelled.astype(jnp.float32))
        return {"loss": (total, weight), "accuracy": accuracy}

    def ratio(self, record: jax.Array) -> jax.Array:
        """f float32[B] of the records int32[B] of the run: linear over `records` from `GLANCING[0]` to
        `GLANCING[1]`."""
        begin, end = GLANCING
        return begin + (end - begin) * jnp.minimum(record / self.records, 1.0)


def cut(key: jax.Array, lengths: jax.Array) -> jax.Array:
    """How many tokens of targets of lengths int32[B] are given: r = L - (floor(u L) + 1), 0 to L - 1."""
    u = jax.random.uniform(key, lengths.shape)
    return jnp.maximum(lengths - (jnp.floor(u * lengths).astype(jnp.int32) + 1), 0)


def glance(
    logits: jax.Array, labels: jax.Array, labelled: jax.Array, ratio: jax.Array, key: jax.Array
) -> jax.Array:
    """Which places are shown, bool[B, k]: floor(ratio[b] * wrong) of the labelled ones, drawn at random.

    logits float32[B, k, V] and labels int32[B, k] at the places; wrong counts the labelled places where the
    most probable token is not the label.
    """
    wrong = jnp.sum(labelled & (argmax(logits) != labels), axis=1)
    count = jnp.floor(ratio * wrong).astype(jnp.int32)
    order = jnp.where(labelled, jax.random.uniform(key, labels.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
    return labelled & (rank < count[:, None])


def distil(target: Target, batch: Batch, eos: int) -> tuple[jax.Array, jax.Array]:
    """The target's greedy output for the batch's sources, up to its end or the batch's length: tokens int32[B,
    T] and weights f32[B, T]. Constants, whatever is trained; rows of padding stay without weight."""
    model, params = unscan_layers(target.model, jax.lax.stop_gradient(target.params))
    count, length = batch["targets"].shape
    engine = Engine(model, Plain(), Greedy(), capacity=length + 1)
    weights, ends = Weights(params, (), ()), jnp.asarray([eos])
    keys = jax.random.split(jax.random.key(0), count)  # greedy decoding draws nothing
    limit = jnp.full((count,), length)
    state = engine.prefill(weights, batch["source"], batch["source_lengths"], limit, keys, ends)
    state = engine.decode(weights, state, jnp.zeros((count,), bool), jnp.int32(length), ends)
    real = (jnp.arange(length) < state.count[:, None]) & (batch["source_lengths"] > 0)[:, None]
    return jnp.where(real, state.tokens[:, :length], 0), real.astype(jnp.float32)


def _append(state: Reading, values: jax.Array, count: jax.Array) -> Reading:
    """values[b, :count[b]] behind the output; a select, because scatters are loops on CPU."""
    offset = jnp.arange(state.tokens.shape[1]) - state.count[:, None]
    chosen = jnp.take_along_axis(values, jnp.clip(offset, 0, values.shape[1] - 1), axis=1)
    tokens = jnp.where((offset >= 0) & (offset < count[:, None]), chosen, state.tokens)
    return state.replace(tokens=tokens, count=state.count + count)
