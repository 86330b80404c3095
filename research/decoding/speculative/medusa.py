"""Medusa: several heads on the last hidden state guess the tokens ahead, a sparse tree of them is checked in
one call (Cai et al., arXiv 2401.10774).

At the last accepted token t, with hidden state h and the root x_{t+1} chosen by the target, head k = 1..K says

    z_k = h + SiLU(h W_k + b_k),   p_k(x_{t+1+k}) = softmax(z_k U_k)                              (section 2.1.1)

for every path alike: a head does not know which tokens the heads before it chose. W_k and b_k start at 0 and U_k
as a copy of the target's head, so every head starts as the target itself.

`Medusa` trains the heads alone, on a frozen target: sum_k 0.8^k CE_k (Medusa-1, equation 1). `Medusa2` tunes the
target too, through low-rank branches beside its projections: L_LM + 0.2 sum_k 0.8^k CE_k (equation 2), where for
self-distillation L_LM is KL(original || tuned) and the original is the same network with the branches off
(section 2.3.2). The decoder then runs the tuned target, and its output is that of the tuned target.

With more than one residual layer, the layers have parameters of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.speculative import losses
from research.decoding.speculative.heads import at, best, copy_head, head_logits
from research.decoding.speculative.training import Teacher, ahead
from research.decoding.speculative.trees import Guess, RankTree
from research.decoding.verify import Draft
from research.errors import UserError
from research.nn.dropout import Dropping
from research.nn.linear import Linear
from research.nn.weights import LowRank, Sum, materialize
from research.training.task import Batch, Metrics, PyTree


class Residual(nn.Module):
    """hidden [..., D] -> z [..., D]: `num_layers` times z + SiLU(z W + b), each beginning as the identity."""

    num_layers: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            z = z + nn.silu(Linear(z.shape[-1], True, init_scale=0.0, name=f"layer_{i}")(z))
        return z


@dataclasses.dataclass(frozen=True)
class Medusa:
    """Medusa-1.

    Args:
        tree: which guesses are checked; its depth may be less than the number of heads.
        num_heads: K.
        num_layers: residual layers of a head.
        decay: the loss of head k counts decay^k.

    Raises:
        UserError: a tree deeper than there are heads.
    """

    tree: RankTree
    num_heads: int = 5
    num_layers: int = 1
    decay: float = 0.8

    def __post_init__(self):
        if self.num_heads < self.tree.levels - 1:
            raise UserError(f"the tree is {self.tree.levels - 1} deep and there are {self.num_heads} heads")

    @property
    def size(self) -> int:
        return self.tree.size

    @property
    def levels(self) -> int:
        return self.tree.levels

    # Training

    def create(self, key: jax.Array, target: Target) -> PyTree:
        """{"head_k": {"residual": ..., "output": a copy of the target's head}}."""
        width = jax.eval_shape(target.embed, jnp.zeros((1,), jnp.int32)).shape[-1]
        keys = jax.random.split(key, self.num_heads)
        return {
            f"head_{k}": {
                "residual": Residual(self.num_layers).init(keys[k - 1], jnp.zeros((1, width)))["params"],
                "output": copy_head(target),
            }
            for k in range(1, self.num_heads + 1)
        }

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """`loss`, and `agreement_k`: how often head k's first guess is right."""
        loss, metrics = self._heads(params, teacher.target, teacher.hidden, batch)
        return {"loss": loss, **metrics}

    def forced(self, params: PyTree, teacher: Teacher, batch: Batch) -> list[Guess]:
        """What the heads say along a text, as `trees.calibrate` wants it."""
        return self._guesses(params, teacher.target, teacher.hidden, batch)

    def _guesses(self, params: PyTree, target: Target, hidden: jax.Array, batch: Batch) -> list[Guess]:
        heads = range(1, self.num_heads + 1)
        return [(self._logits(params, target, hidden, k), *ahead(batch, k)) for k in heads]

    def _heads(
        self, params: PyTree, target: Target, hidden: jax.Array, batch: Batch
    ) -> tuple[losses.Term, Metrics]:
        guesses = self._guesses(params, target, hidden, batch)
        terms = [(self.decay**k, losses.cross_entropy(*guess)) for k, guess in enumerate(guesses, start=1)]
        agreement = {f"agreement_{k}": losses.agreement(*guess) for k, guess in enumerate(guesses, start=1)}
        return losses.add(*terms), agreement

    def _logits(self, params: PyTree, target: Target, hidden: jax.Array, k: int) -> jax.Array:
        """hidden [..., D] -> logits of head k float32[..., V]."""
        head = params[f"head_{k}"]
        z = Residual(self.num_layers).apply({"params": head["residual"]}, hidden)
        return head_logits(target, head["output"], z)

    # Drafting. The state is the hidden state [B, D] of the last accepted token.

    def init(self, params: PyTree, target: Target, prompt: Prompt) -> jax.Array:
        return at(prompt.hidden, prompt.lengths - 1)

    def propose(
        self, params: PyTree, target: Target, state: jax.Array, round: Round
    ) -> tuple[Draft, jax.Array]:
        guesses = [
            best(self._logits(params, target, state, k), self.tree.top) for k in range(1, self.tree.levels)
        ]
        return self.tree.draft(round.root, jnp.stack(guesses, axis=1)), state

    def observe(self, params: PyTree, target: Target, state: jax.Array, outcome: Outcome) -> jax.Array:
        return at(outcome.hidden, outcome.accept.last)


@dataclasses.dataclass(frozen=True)
class Medusa2(Medusa):
    """Medusa-2: heads and target are tuned together; decode with the target `tuned(params, target)`.

    Stages say when: the heads alone first (`trainable=("^drafter/head_",)` and `loss_weights={"heads": 1.0}`),
    then all of `^drafter/`, the heads at four times the rate.

    Args:
        reference: what the tuned target keeps to: "text", the next token of the data, or "self", what the
            target said before it was tuned.
        head_weight: of the heads' loss beside that of the target.
        rank, alpha, dropout: of the branches, (alpha / rank) dropout(x) A B with B = 0 at first, beside every
            kernel. A head tied to the embedding has none.
    """

    reference: Literal["text", "self"] = "text"
    head_weight: float = 0.2
    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.05

    def create(self, key: jax.Array, target: Target) -> PyTree:
        """The heads, and `branches`: {"down", "up"} in the place of every kernel of the target."""
        head_key, branch_key = jax.random.split(key)
        kernels = _kernels(target.params)
        draw = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +-1 / sqrt(in), LoRA's own
        branches = {}
        for path, one in zip(kernels, jax.random.split(branch_key, len(kernels)), strict=True):
            *stack, inputs, outputs = kernels[path].shape
            branches[path] = {
                "down": draw(one, (*stack, inputs, self.rank), jnp.float32),
                "up": jnp.zeros((*stack, self.rank, outputs)),
            }
        return super().create(head_key, target) | {"branches": traverse_util.unflatten_dict(branches)}

    def loss(self, params: PyTree, teacher: Teacher, batch: Batch, key: jax.Array | None) -> Metrics:
        """`loss`, its parts `target` and `heads`, and `agreement_k`."""
        tuned = self._tuned(params, teacher.target, key)
        places = batch["positions"], batch["segments"]
        hidden, _ = tuned.model.apply({"params": tuned.params}, batch["tokens"], *places, method="features")
        labels, weights = ahead(batch, 0)
        if self.reference == "self":
            target = losses.kl(tuned.logits(hidden), teacher.logits, weights)
        else:
            target = losses.cross_entropy(tuned.logits(hidden), labels, weights)
        heads, metrics = self._heads(params, tuned, hidden, batch)
        loss = losses.add((1.0, target), (self.head_weight, heads))
        return {"loss": loss, "target": target, "heads": heads, **metrics}

    def tuned(self, params: PyTree, target: Target) -> PyTree:
        """The parameters of the target with its branches added in: what the heads were trained for."""
        branched = self._tuned(params, target, None).params
        return jax.tree.map(materialize, branched, is_leaf=lambda leaf: isinstance(leaf, Sum))

    def _tuned(self, params: PyTree, target: Target, key: jax.Array | None) -> Target:
        flat = traverse_util.flatten_dict(target.params)
        branches = traverse_util.flatten_dict(params["branches"])
        for number, (path, kernel) in enumerate(_kernels(target.params).items()):
            term: Any = LowRank(branches[*path, "down"], self.alpha / self.rank * branches[*path, "up"])
            if self.dropout and key is not None:
                keys = jax.random.split(jax.random.fold_in(key, number), kernel.shape[:-2])
                term = Dropping(term, keys, self.dropout)
            flat[path] = Sum((kernel, term))
        return target.replace(params=traverse_util.unflatten_dict(flat))


def _kernels(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """{path: kernel} of every projection."""
    return {path: leaf for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "kernel"}
