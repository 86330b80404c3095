"""Hydra: draft heads that know which tokens the heads before them chose (Ankner et al., arXiv 2402.05109).

With g_t from the hidden states up to the last accepted token t, the root x_{t+1} and the tokens x_{t+2} ...
x_{t+k} on a path of the tree, head k = 1..K says

    u_k = [g_t ; e(x_{t+1}) ; ... ; e(x_{t+k})]
    z_k = u_k R_k + c_k + SiLU(u_k W_k + b_k),   p_k(x_{t+1+k}) = softmax(z_k U_k + bias)             (section 3)

where e is the target's embedding, W_k and b_k start at 0, and U_k as a copy of the target's head. So every branch
of the tree gets a continuation of its own, and the tree is drafted level by level.

Hydra takes g_t = h_t, one layer, and the cross-entropy of the text. Hydra++ (section 4) takes more layers, each
z + SiLU(z W + b); the cross-entropy to what the target says after the same tokens; and, as g, the output of one
more layer like the target's own, with a final norm, which attends to all hidden states of accepted tokens and
has a key-value cache of its own.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative import losses
from research.decoding.speculative.follower import (
    Follower,
    Following,
    last_block,
    read_accepted,
    read_prompt,
)
from research.decoding.speculative.heads import at, best, copy_head, head_logits
from research.decoding.speculative.training import Teacher, ahead, shifted
from research.decoding.speculative.trees import Guess, RankTree
from research.decoding.verify import Draft
from research.errors import UserError
from research.nn.linear import Linear
from research.nn.norm import RMSNorm
from research.training.task import Batch, Metrics, PyTree, dropout_rngs


class HydraHead(nn.Module):
    """g [..., D] and the embedded path [..., k, D] -> z [..., D]; dropout before every layer, in training."""

    num_layers: int
    dropout: float

    @nn.compact
    def __call__(self, g: jax.Array, path: jax.Array) -> jax.Array:
        width = g.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        u = drop(jnp.concatenate([g, path.reshape(*path.shape[:-2], -1)], axis=-1))
        z = Linear(width, True, name="projection")(u)
        z = z + nn.silu(Linear(width, True, init_scale=0.0, name="layer_0")(u))
        for i in range(1, self.num_layers):
            z = drop(z)
            z = z + nn.silu(Linear(width, True, init_scale=0.0, name=f"layer_{i}")(z))
        return z


class PrefixLayer(Follower, kw_only=True):
    """A layer like the target's over its hidden states, and a norm: [B, T, D] -> g [B, T, D]."""

    def setup(self) -> None:
        self.make_layers()
        self.norm = RMSNorm()

    def merge(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        return hidden  # tokens come in by the heads alone

    def finish(self, states: jax.Array) -> jax.Array:
        return self.norm(states)


@dataclasses.dataclass(frozen=True)
class Hydra:
    """Hydra; Hydra++ is `num_layers=4, dropout=0.2, prefix_layer=True, teacher="target"`.

    Args:
        tree: which guesses are checked; its depth may be less than the number of heads.
        num_heads: K.
        num_layers: of a head.
        dropout: before every layer of a head.
        prefix_layer: whether the heads read an attention layer over the prefix instead of h_t.
        teacher: whose next token the heads learn: the "text"'s, or the "target"'s own distribution.

    Raises:
        UserError: a tree deeper than there are heads.
    """

    tree: RankTree
    num_heads: int = 4
    num_layers: int = 1
    dropout: float = 0.0
    prefix_layer: bool = False
    teacher: Literal["text", "target"] = "text"

    def __post_init__(self):
        if self.num_heads < self.tree.levels - 1:
            raise UserError(f"the tree is {self.tree.levels - 1} deep and there are {self.num_heads} heads")

    @property
    def size(self) -> int:
        return self.tree.size

    @property
    def levels(self) -> int:
        return self.tree.levels

    @property
    def _head(self) -> HydraHead:
        return HydraHead(self.num_layers, self.dropout)

    # Training

    def create(self, key: jax.Array, target: Target) -> PyTree:
        """{"head_k": {"layers": ..., "output": a copy of the target's head, "bias": [V]}}, and "prefix"."""
        width, vocab = self._shapes(target)
        params = {}
        for k in range(1, self.num_heads + 1):
            g, path = jnp.zeros((1, width)), jnp.zeros((1, k, width))
            layers = self._head.init(jax.random.fold_in(key, k), g, path)["params"]
            params[f"head_{k}"] = {"layers": layers, "output": copy_head(target), "bias": jnp.zeros((vocab,))}
        if self.prefix_layer:
            rows = jnp.zeros((1, 1, width))
            params["prefix"] = _prefix(target).init(jax.random.fold_in(key, 0), rows, rows)["params"]
        return params

    def _shapes(self, target: Target) -> tuple[int, int]:
        embedded = jax.eval_shape(target.embed, jnp.zeros((1,), jnp.int32))
        return embedded.shape[-1], jax.eval_shape(target.logits, embedded).shape[-1]

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """`loss`, and `agreement_k`: how often head k's first guess is right, given the tokens before."""
        terms, metrics = [], {}
        for k, (logits, labels, weights) in enumerate(self._guesses(params, teacher, batch, key), start=1):
            if self.teacher == "target":
                term = losses.soft_cross_entropy(logits, shifted(teacher.logits, k), weights)
            else:
                term = losses.cross_entropy(logits, labels, weights)
            terms.append((1.0, term))
            metrics[f"agreement_{k}"] = losses.agreement(logits, labels, weights)
        return {"loss": losses.add(*terms), **metrics}

    def forced(self, params: PyTree, teacher: Teacher, batch: Batch) -> list[Guess]:
        """What the heads say along a text, given its tokens, as `trees.calibrate` wants it."""
        return self._guesses(params, teacher, batch, None)

    def _guesses(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> list[Guess]:
        target, g = teacher.target, teacher.hidden
        if self.prefix_layer:
            places = batch["positions"], batch["segments"]
            g, _ = _prefix(target).apply({"params": params["prefix"]}, g, g, *places)
        guesses = []
        for k in range(1, self.num_heads + 1):
            path = jnp.stack([shifted(batch["targets"], j) for j in range(k)], axis=-1)  # x_{t+1} ... x_{t+k}
            embedded = jax.lax.stop_gradient(target.embed(path))
            rngs = dropout_rngs(None if key is None else jax.random.fold_in(key, k))
            guesses.append((self._logits(params, target, k, g, embedded, rngs), *ahead(batch, k)))
        return guesses

    def _logits(
        self, params: PyTree, target: Target, k: int, g: jax.Array, path: jax.Array, rngs: Any = None
    ) -> jax.Array:
        """g [..., D] and the embedded path [..., k, D] -> logits of head k float32[..., V]."""
        head = params[f"head_{k}"]
        z = self._head.apply({"params": head["layers"]}, g, path, rngs=rngs)
        return head_logits(target, head["output"], z) + head["bias"]

    # Drafting. The state is g [B, D], or with a prefix layer where that layer is.

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> jax.Array | Following:
        if self.prefix_layer:
            return read_prompt(_prefix(target), params["prefix"], target, prompt, self.levels)
        return at(prompt.hidden, prompt.lengths - 1)

    def propose(
        self, params: PyTree, target: Target, state: jax.Array | Following, round: Round
    ) -> tuple[Draft, jax.Array | Following]:
        prefix = state.state if self.prefix_layer else state
        batch, levels = len(round.root), self.tree.expansions
        tokens = [round.root[:, None]]
        path = target.embed(round.root)[:, None, None]  # [B, expanded nodes, k, D]
        first = 1  # number of the first node of the level
        for k, level in enumerate(levels, start=1):
            g = jnp.broadcast_to(prefix[:, None], (batch, len(level.nodes), prefix.shape[-1]))
            guesses = best(self._logits(params, target, k, g, path), level.width)
            parent, rank = jnp.asarray(level.parent), jnp.asarray(level.rank)
            drafted = guesses[:, parent, rank]  # [B, nodes of the level]
            tokens.append(drafted)
            if k < len(levels):
                expanded = jnp.asarray(levels[k].nodes) - first
                newest = target.embed(drafted[:, expanded])[:, :, None]
                path = jnp.concatenate([path[:, parent[expanded]], newest], axis=2)
            first += len(level.rank)
        return Draft(jnp.concatenate(tokens, axis=1), self.tree.tree), state

    def observe(
        self, params: PyTree, target: Target, state: jax.Array | Following, outcome: Outcome
    ) -> jax.Array | Following:
        if self.prefix_layer:
            return read_accepted(_prefix(target), params["prefix"], target, state, outcome)
        return at(outcome.hidden, outcome.accept.last)


def _prefix(target: Target) -> PrefixLayer:
    return PrefixLayer(blocks=(last_block(target.model),), num_layers=1)
