"""PEARL: the draft model writes while the target verifies (arXiv 2408.11850).

Plain speculation lets each model wait for the other. PEARL runs both at once, in rounds: the draft extends the
text by a block y_1..y_gamma, its first choices or drawn from q, while the target makes one forward over what it
has not read yet (section 3, algorithm 2).

    PRE   nothing is pending. The target tests y_1 (pre-verify). Rejected: its token is replaced, stay in PRE.
          Accepted: the block is taken over, y_2..y_gamma are pending, go to POST.
    POST  gamma - 1 tokens are pending. The target tests them and then y_1 (post-verify). All accepted: the new
          block is taken over, stay in POST. A rejection: cut there, drop the block, go to PRE.

No bonus token is ever drawn, since y_1 is tested in its place, and a run of accepted tokens goes on without a
pause. A round costs max(gamma t_draft, t_target), in place of gamma t_draft + t_target.

In the engine the root is the newest verified token and the tree is the root and what is pending. The block
depends on the state alone, not on the call it is written beside, so `Pearl` writes it before the call: the
same tokens, one after the other; `concurrent` runs both at once on two devices. Tokens are tested with the q
that they were drawn from, and each output position has one key, so that verification is exact.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from research.decoding.engine import Engine, State
from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative.draft_model import DraftModel, check_draft, draw, read_prompt, write
from research.decoding.speculative.training import Teacher
from research.decoding.tree import chain
from research.decoding.verify import Accept, Draft, Greedy, Sampled
from research.errors import UserError
from research.nn.cache import Cache
from research.training.task import Batch, Metrics, PyTree


class Block(struct.PyTreeNode):
    """tokens int32[B, K] and log_q float32[B, K, V], which they were drawn from."""

    tokens: jax.Array
    log_q: jax.Array


class PearlDraft(Draft):
    """A draft and the token that is tested behind its last real node.

    ahead: a Block of K = 1; tested bool[B]: whether there is one; written: the block of this round.
    """

    ahead: Block | None = None
    tested: jax.Array | None = None
    written: Block | None = None


class PearlState(struct.PyTreeNode):
    """cache: the draft's, with all but the last token of the text; pending: drafted and not yet verified, in
    rows that are in POST, `post` bool[B]; rounds int32[B, 2]: how many there were in PRE and in POST."""

    cache: Cache
    pending: Block
    post: jax.Array
    rounds: jax.Array


@dataclasses.dataclass(frozen=True)
class PreVerify:
    """`Sampled`, with the first token of the next block tested in place of a bonus token. Greedy decoding needs no
    such rule: the bonus of `Greedy` is the only token that could be accepted."""

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array) -> Accept:
        if not isinstance(draft, PearlDraft):
            return Sampled()(logits, draft, keys)
        size = draft.tree.size
        nodes = jnp.sum(draft.tree.real, axis=-1, dtype=jnp.int32)  # the root and what is pending
        place = jnp.arange(size + 1)
        behind = place == nodes[:, None]
        tokens = jnp.where(behind, draft.ahead.tokens, _one_more(draft.tokens))
        before = place == nodes[:, None] - 1
        q = jnp.where(before[..., None], draft.ahead.log_q, _one_more(draft.q))
        tree = chain(size + 1).replace(real=(place < nodes[:, None]) | (behind & draft.tested[:, None]))
        # Nothing is drawn behind the token ahead, so the last row of logits and the last key are never used.
        keys = jnp.concatenate([keys, keys[:, -1:]], axis=1)
        accept = Sampled()(_one_more(logits), Draft(tokens, tree, q), keys)
        token = jnp.where(accept.count > nodes, draft.ahead.tokens[:, 0], accept.token)
        return Accept(accept.path[:, :-1], jnp.minimum(accept.count, nodes), token)


def _one_more(x: jax.Array) -> jax.Array:
    """x [B, N, ...] with a row of zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))


@dataclasses.dataclass(frozen=True)
class Pearl:
    """The proposer and, for its draft, a drafter: parameters and training are those of `DraftModel`.

    Sampling wants `PreVerify` as the verifier; with another exact one the output is as exact, and y_1 is kept
    less often.

    Args:
        model: the draft, a decoder with the target's vocabulary and at least its context.
        gamma: tokens of a block; t_target / t_draft keeps both models busy.
        pre_verify: False leaves it out (the paper's ablation): after a rejection a block is drafted while the
            target waits, and from then on whole blocks are pending.
        post_verify: False leaves it out: the draft waits while pending tokens are verified, after which the
            target's own token follows, as in plain speculation.

    Raises:
        UserError: a gamma below 2; neither kind of verification; when it is used, a model that can't draft for
            the target.
    """

    model: nn.Module
    gamma: int = 4
    pre_verify: bool = True
    post_verify: bool = True

    def __post_init__(self) -> None:
        if self.gamma < 2:
            raise UserError(
                f"Pearl.gamma must be at least 2, not {self.gamma}: a block of 1 leaves nothing pending"
            )
        if not (self.pre_verify or self.post_verify):
            raise UserError("Pearl without pre_verify and post_verify is plain speculation: use DraftModel")

    @property
    def size(self) -> int:
        return self.gamma

    @property
    def levels(self) -> int:
        return self.gamma

    def create(self, key: jax.Array, target: Target) -> PyTree:
        return DraftModel(self.model).create(key, target)

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        return DraftModel(self.model).loss(params, teacher, batch, key)

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> PearlState:
        check_draft(self.model, target)
        # The draft runs up to 2 gamma tokens ahead of what is verified, gamma of them beyond the target's margin.
        cache = read_prompt(self.model, params, prompt, margin=2 * self.gamma + 1, room=self.gamma)
        batch, vocab = len(prompt.root), self.model.vocab_size
        count = self.gamma - 1 if self.pre_verify else self.gamma
        nothing = Block(jnp.zeros((batch, count), jnp.int32), jnp.zeros((batch, count, vocab)))
        return PearlState(cache, nothing, jnp.zeros((batch,), bool), jnp.zeros((batch, 2), jnp.int32))

    def propose(
        self, params: PyTree, target: Target, state: PearlState, round: Round
    ) -> tuple[Draft, PearlState]:
        post, pending, cache = state.post, state.pending, state.cache
        everyone = jnp.ones_like(post)
        if not self.pre_verify:
            # Rows without pending tokens write a block while the target waits.
            text, root = self._text(round, pending), jnp.zeros_like(round.root)
            first, cache = self.write_block(params, cache, round, text, root, 0, ~post)
            pending = jax.tree.map(lambda old, new: _rows(post, old, new), pending, first)
        going = post if self.pre_verify else everyone
        # Where the text's last token is, counted from the root.
        start = jnp.where(going, pending.tokens.shape[1], 0)
        # Without post-verify the block written in POST is dropped; its first forward reads the last pending token.
        text = self._text(round, pending)
        written, cache = self.write_block(params, cache, round, text, start, self.gamma, everyone)

        tokens = jnp.concatenate([round.root[:, None], pending.tokens], axis=1)[:, : self.gamma]
        q = _one_more(pending.log_q)[:, : self.gamma]
        if self.pre_verify:
            real = (jnp.arange(self.gamma) == 0) | post[:, None]
            ahead, tested = _part(written, 0, 1), everyone if self.post_verify else ~post
        else:
            real = jnp.ones(tokens.shape, bool)
            ahead, tested = _part(pending, self.gamma - 1, self.gamma), everyone
        draft = PearlDraft(
            tokens,
            chain(self.gamma).replace(real=real),
            None if round.greedy else q,
            ahead=ahead,
            tested=tested,
            written=written,
        )
        return draft, state.replace(cache=cache)

    def observe(self, params: PyTree, target: Target, state: PearlState, outcome: Outcome) -> PearlState:
        draft, accept = outcome.draft, outcome.accept
        nodes = jnp.sum(draft.tree.real, axis=-1, dtype=jnp.int32)
        whole = draft.tested & (accept.count == nodes) & (accept.token == draft.ahead.tokens[:, 0])
        pending = _part(draft.written, 1, self.gamma) if self.pre_verify else draft.written
        going = accept.count > 0
        rounds = state.rounds + going[:, None] * jnp.stack([~state.post, state.post], axis=1)
        return state.replace(pending=pending, post=whole, rounds=rounds)

    def _text(self, round: Round, pending: Block) -> jax.Array:
        """int32[B, 2 gamma + 1]: the root, the pending tokens, and room for a block."""
        text = jnp.concatenate([round.root[:, None], pending.tokens], axis=1)
        return jnp.pad(text, ((0, 0), (0, 2 * self.gamma + 1 - text.shape[1])))

    def write_block(
        self,
        params: PyTree,
        cache: Cache,
        round: Round,
        text: jax.Array,
        start: jax.Array,
        number: int,
        active: jax.Array,
    ) -> tuple[Block, Cache]:
        """gamma tokens behind node start int32[B] of the chain `text`, in gamma forwards; the draws have the
        numbers from `number` on. Rows that are not active bool[B] keep their cache."""
        rolled = cache.rollback(round.length + start)
        cache = cache.replace(length=jnp.where(active, rolled.length, cache.length))
        place = jnp.arange(text.shape[1])

        def step(carry: tuple, i: jax.Array) -> tuple:
            cache, text = carry
            node = start + i
            fed = jnp.take_along_axis(text, node[:, None], axis=1)
            choose = lambda logits: draw(round, logits, text, node, number + i)  # noqa: E731
            token, log_q, _, cache = write(self.model, params, cache, fed, choose, active)
            text = jnp.where(place == node[:, None] + 1, token[:, None], text)
            return (cache, text), (token, log_q)

        (cache, _), (tokens, log_q) = jax.lax.scan(step, (cache, text), jnp.arange(self.gamma))
        return Block(tokens.T, jnp.moveaxis(log_q, 0, 1)), cache

    def seconds(self, rounds: Sequence[float], draft: float, target: float) -> float:
        """What `rounds` (in PRE, in POST) take on two devices, where a forward of the draft takes `draft`
        seconds and one of the target `target`."""
        pre, post = rounds
        block = self.gamma * draft
        together = max(block, target)
        if not self.pre_verify:
            return pre * (block + together) + post * together
        return pre * together + post * (together if self.post_verify else target)


def _rows(mask: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """Rows [B, ...] of `yes` where mask bool[B]."""
    return jnp.where(mask.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)


def _part(block: Block, begin: int, end: int) -> Block:
    return Block(block.tokens[:, begin:end], block.log_q[:, begin:end])


def expected_tokens(alpha: float, gamma: int) -> float:
    """Mean tokens a round where each test succeeds with probability alpha < 1, independently of the others.

    From PRE to POST with probability alpha, from POST to PRE with 1 - alpha^gamma, so that a share
    (1 - alpha^gamma) / (1 + alpha - alpha^gamma) of the rounds is in PRE, with one token each; a round in POST
    has (1 - alpha^gamma) / (1 - alpha): the sum of alpha^k over k < gamma.
    """
    stay = alpha**gamma
    pre = pre_share(alpha, gamma)
    return pre + (1 - pre) * (1 - stay) / (1 - alpha)


def pre_share(alpha: float, gamma: int) -> float:
    """The share of rounds in PRE: see `expected_tokens`."""
    stay = alpha**gamma
    return (1 - stay) / (1 + alpha - stay)


# Both models at once: one program on two devices, whose branches differ.

_AXIS = "pearl"
_TARGET, _DRAFT = 0, 1  # places on the axis


def concurrent(engine: Engine, devices: Sequence[jax.Device]) -> Callable[..., State]:
    """`engine.decode` on two devices: the first runs the target's forward while the second writes the block.

    Both hold all arguments and go through the same loop; once a round they exchange the logits and the block,
    from which both reach the same verdict. The result is that of `engine.decode`.

    Args:
        engine: with a `Pearl` that pre- and post-verifies, and `Greedy` or `PreVerify`.
        devices: two.

    Returns:
        a compiled (weights, state, stopped, calls, ends) -> state; see `Engine.decode`.

    Raises:
        UserError: another engine, or another number of devices.
    """
    proposer, verifier = engine.proposer, engine.verifier
    if type(proposer) is not Pearl or not (proposer.pre_verify and proposer.post_verify):
        raise UserError("concurrent decoding needs a Pearl with pre_verify and post_verify")
    if type(verifier) not in _EXCHANGING:
        raise UserError(f"concurrent decoding needs Greedy or PreVerify, not {type(verifier).__name__}")
    if len(set(devices)) != 2:
        raise UserError(f"concurrent decoding needs 2 devices, not {len(set(devices))}")
    mesh = Mesh(np.asarray(devices), (_AXIS,))
    both = dataclasses.replace(
        engine,
        model=_ModelOnTarget(engine.model),
        proposer=_PearlOnDraft(proposer.model, proposer.gamma),
        verifier=_EXCHANGING[type(verifier)](),
    )

    def on_each(*args: Any) -> State:
        return jax.tree.map(lambda x: x[None], both.decode(*args))

    spread = jax.shard_map(
        on_each, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(_AXIS), check_vma=False
    )

    @jax.jit
    def decode(*args: Any) -> State:
        states = spread(*args)
        # Each device has kept the cache of its own model.
        state = jax.tree.map(lambda x: x[_TARGET], states)
        cache = jax.tree.map(lambda x: x[_DRAFT], states.proposer.cache)
        return state.replace(proposer=state.proposer.replace(cache=cache))

    return decode


def _only_on(place: int, compute: Callable[[], PyTree], otherwise: Callable[[PyTree], PyTree]) -> PyTree:
    """`compute()` on one device; on the other `otherwise` of its shapes."""
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(jax.lax.axis_index(_AXIS) == place, compute, lambda: otherwise(shapes))


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@dataclasses.dataclass(frozen=True)
class _ModelOnTarget:
    """A model whose `extend` gives zeros on the draft's device."""

    model: Any

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_length(self) -> int:
        return self.model.max_length

    def apply(self, variables: PyTree, *args: Any, method: str) -> PyTree:
        forward = lambda: self.model.apply(variables, *args, method=method)  # noqa: E731
        return _only_on(_TARGET, forward, _zeros) if method == "extend" else forward()


@dataclasses.dataclass(frozen=True)
class _PearlOnDraft(Pearl):
    """A Pearl that writes zeros on the target's device, and learns what was written from the exchange."""

    def write_block(self, params: PyTree, cache: Cache, *args: Any) -> tuple[Block, Cache]:
        write = lambda: Pearl.write_block(self, params, cache, *args)  # noqa: E731
        return _only_on(_DRAFT, write, lambda shapes: (_zeros(shapes[0]), cache))

    def observe(self, params: PyTree, target: Target, state: PearlState, outcome: Outcome) -> PearlState:
        written = outcome.accept.written
        draft = outcome.draft.replace(written=written, ahead=_part(written, 0, 1))
        outcome = outcome.replace(draft=draft)
        return super().observe(params, target, state, outcome)


class _Exchanged(Accept):
    """What was accepted, and the block of the round."""

    written: Block | None = None


def _exchange(logits: jax.Array, block: Block) -> tuple[jax.Array, Block]:
    """Both, from the devices that have them; the other has zeros. As one array, so that neither device waits
    before its own work is done."""
    parts = [logits, block.log_q, block.tokens.astype(jnp.float32)]  # exact below 2 ** 24
    flat = jnp.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)
    flat = jax.lax.psum(flat, _AXIS)
    cuts = np.cumsum([x[0].size for x in parts])[:-1]
    found = [x.reshape(part.shape) for x, part in zip(jnp.split(flat, cuts, axis=1), parts, strict=True)]
    return found[0], Block(found[2].astype(jnp.int32), found[1])


class _Exchanging:
    """Mixed into a verifier: exchange first."""

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array) -> Accept:
        logits, written = _exchange(logits, draft.written)
        draft = draft.replace(written=written, ahead=_part(written, 0, 1))
        accept = super().__call__(logits, draft, keys)
        return _Exchanged(accept.path, accept.count, accept.token, written)


class _ExchangeGreedy(_Exchanging, Greedy):
    pass


class _ExchangePreVerify(_Exchanging, PreVerify):
    pass


_EXCHANGING = {Greedy: _ExchangeGreedy, PreVerify: _ExchangePreVerify}
