"""Arcana: modality LoRA on a frozen decoder, and queries that climb a ladder of a frozen tower (arXiv 2410.13733).

MM-LoRA. Every projection W of the decoder has two low-rank terms, of which a token gets the one of its kind:

    y = W x + M s B_V A_V x + (1 - M) s B_L A_L x      ranks R beta and R (1 - beta)

M is 1 for a row of an image, which `slot >= 0` of the prompt says, and 0 for text, as which tokens that are generated
count. The released code takes M = 1 on places 35 to 674 where it is given no mask.

QLadder. X_0 ... X_L are what enters the tower's first layer and what leaves every one. Queries Q climb, rung i reading
X_i, and the image's rows are those of the patches and of the queries, through one projection:

    Q <- Q + Attention(q = LN(Q), kv = LN'(X_i));   Q <- Q + MLP(LN''(Q));   rows = Projection([X_patches; Q])

Rungs begin as copies of the tower's blocks, as in the paper's figure (LN' as LN), and are trained; in the released code
they begin at random. Patches from X_j and queries from below it are of one height: there are j rungs. The tower reads
no query.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.adapters.lora import PROJECTIONS, LoRA, check_rank, chosen_kernels, flat, keys_like, tree
from research.errors import UserError
from research.multimodal.connectors import Projection, Read
from research.multimodal.media import Media
from research.multimodal.model import VLM, Pictures
from research.multimodal.task import VisionLanguage
from research.multimodal.tower import Seen
from research.nn import weights
from research.nn.attention import Context
from research.nn.cache import Fresh
from research.nn.dropout import dropped
from research.nn.linear import parameter
from research.nn.norm import LayerNorm
from research.nn.weights import Kernel, LowRank, Spec, Sum, Wrapped, stored_bits

PyTree = Any

# MM-LoRA


class ModalityLoRA(struct.PyTreeNode):
    """A frozen kernel and the terms of the tokens of images and of text. By itself it multiplies text; `routed` gives
    what multiplies a prompt with images."""

    base: Kernel
    vision: LowRank
    language: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def text(self) -> Sum:
        """The kernel of a token of text."""
        return Sum((self.base, self.language))

    def dot(self, x: jax.Array) -> jax.Array:
        return self.text.dot(x)

    def materialize(self) -> jax.Array:
        return self.text.materialize()

    def narrow(self, inputs: int | None, outputs: int | None) -> "ModalityLoRA":
        return ModalityLoRA(*(weights.narrow(part, inputs, outputs) for part in self._parts))

    def check(self) -> None:
        """Raise `UserError` unless the parts belong together."""
        for term in (self.vision, self.language):
            term.check()
            if tuple(term.shape) != tuple(self.base.shape):
                raise UserError(
                    f"a term of shape {tuple(term.shape)} on a kernel of {tuple(self.base.shape)}"
                )

    @property
    def size(self) -> int:
        return sum(part.size for part in self._parts)

    def stored_bits(self) -> int:
        return stored_bits(self._parts)

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        return Sum(self._parts).leaf_specs(spec)

    @property
    def _parts(self) -> tuple[Kernel, LowRank, LowRank]:
        return self.base, self.vision, self.language


class ModalityRouted(Wrapped):
    """`ModalityLoRA` with the tokens that are multiplied: image bool[B, T], with the leading axes of a stacked kernel
    in front; key, typed [..], and rate of dropout on the terms' inputs, in training. It lives while the model runs."""

    kernel: ModalityLoRA
    image: jax.Array
    key: jax.Array | None = None
    rate: float = struct.field(pytree_node=False, default=0.0)

    def dot(self, x: jax.Array) -> jax.Array:
        z = x if self.key is None else dropped(x, self.rate, self.key)
        image = self.image.reshape(*x.shape[:-1], 1)
        term = jnp.where(image, self.kernel.vision.dot(z), self.kernel.language.dot(z))
        return term + weights.dot(x, self.kernel.base)

    def materialize(self) -> jax.Array:
        raise UserError("a kernel that depends on the token is not multiplied out")

    def narrow(self, inputs: int | None, outputs: int | None) -> "ModalityRouted":
        return self.replace(kernel=self.kernel.narrow(inputs, outputs))


def route(params: PyTree, image: jax.Array, key: jax.Array | None = None, rate: float = 0.0) -> PyTree:
    """Parameters whose `ModalityLoRA` know which tokens are of images, bool[B, T]. key: of dropout, None for none."""
    nodes, structure = jax.tree.flatten(params, is_leaf=lambda node: isinstance(node, ModalityLoRA))
    for number, node in enumerate(nodes):
        if isinstance(node, ModalityLoRA):
            stacked = jnp.broadcast_to(image, (*node.shape[:-2], *image.shape))
            own = None if key is None else keys_like(key, number, node.shape)
            nodes[number] = ModalityRouted(node, stacked, own, rate)
    return jax.tree.unflatten(structure, nodes)


@dataclasses.dataclass(frozen=True)
class MMLoRA:
    """The adapter as it begins: A uniform in +-1 / sqrt(in), B 0, so that the model is what it was.

    Args:
        vision_rank, language_rank: R beta and R (1 - beta).
        scale: s.
        targets: patterns of the decoder's kernels.
    """

    vision_rank: int = 64
    language_rank: int = 192
    scale: float = 2.0
    targets: tuple[str, ...] = PROJECTIONS

    def install(self, params: PyTree, key: jax.Array) -> PyTree:
        """A decoder's parameters with `ModalityLoRA` in the place of its kernels. Raises `UserError` for a pattern or a
        rank that fits no kernel."""
        kernels = chosen_kernels(params, self.targets)
        terms = []
        for rank in (self.vision_rank, self.language_rank):
            check_rank(rank, kernels)
            key, own = jax.random.split(key)
            lora = LoRA(rank, alpha=self.scale * rank)
            terms.append([lora.drawn(kernel, i, own) for i, kernel in enumerate(kernels.values())])
        made = {
            path: ModalityLoRA(kernels[path], *pair)
            for path, pair in zip(kernels, zip(*terms, strict=True), strict=True)
        }
        return tree({**flat(params), **made})


class Arcana(VLM):
    """A VLM whose decoder's kernels may be `ModalityLoRA`. dropout: rate on the inputs of their terms, in training."""

    dropout: float = 0.05

    def features(
        self,
        tokens: jax.Array,
        pictures: Pictures | None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Fresh, ...]]:
        if pictures is None:
            return super().features(tokens, pictures, segments, prefix)
        x, seen, positions = self.enter(tokens, pictures)
        context = Context(positions, segments, prefix)
        key = self.make_rng("dropout") if self.dropout and self.has_rng("dropout") else None

        def routed(variables: PyTree) -> PyTree:
            return route(variables, pictures.slot >= 0, key, self.dropout)

        run = nn.map_variables(
            lambda module, x: module.run(x, context, seen),
            "params",
            trans_in_fn=routed,
            init=self.is_initializing(),
        )
        return run(self, x)


# QLadder


class Rung(nn.Module):
    """q [N, Q, dv] reads x [N, S, dv] where mask bool[N, 1, S] -> [N, Q, dv]: shaped as a block of the tower.

    Args: num_heads and mlp of the tower's blocks, norm a template of theirs.
    """

    num_heads: int
    mlp: nn.Module
    norm: nn.Module = LayerNorm()

    @nn.compact
    def __call__(self, q: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        keys = self.norm.copy(name="key_norm")(x)
        queries = self.norm.copy(name="query_norm")(q)
        q = q + Read(self.num_heads, name="attention")(queries, keys, keys, mask)
        return q + self.mlp(self.norm.copy(name="mlp_norm")(q))


class QLadder(nn.Module):
    """What a tower sees -> queries [B, I, Q, dv] behind the last rung.

    Args:
        rung: a template.
        rungs: how many; rung i reads tap i.
        queries: Q.
        class_token: whether the tower has one, which is read too.

    Parameters: queries, and layer_i/{query_norm, key_norm, attention, mlp_norm, mlp}.
    """

    rung: Rung
    rungs: int
    queries: int
    class_token: bool = False

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        taps, batch, images, views, places, dim = seen.taps.shape
        if not 0 < self.rungs < taps:
            raise UserError(
                f"QLadder: rungs={self.rungs}, and a tower of {taps - 1} layers has 1 to {taps - 1}"
            )
        # What stands for a class token that there is not is no key.
        first = seen.mask.any(-1, keepdims=True) & self.class_token
        mask = jnp.concatenate([first, seen.mask], axis=-1).reshape(batch * images, 1, views * places)
        table = parameter(self, "queries", nn.initializers.normal(1.0), (self.queries, dim))
        q = jnp.broadcast_to(table.astype(seen.taps.dtype), (batch * images, *table.shape))
        for i in range(self.rungs):
            x = seen.taps[i].reshape(batch * images, views * places, dim)
            q = self.rung.copy(name=f"layer_{i}")(q, x, mask)
        return q.reshape(batch, images, self.queries, dim)


class LadderProjection(nn.Module):
    """Patches and then queries, through two layers: [B, I, V * P + Q, width]. Its planner has as many rows."""

    ladder: QLadder
    width: int

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        patches = seen.tokens.reshape(*seen.tokens.shape[:2], -1, seen.tokens.shape[-1])
        both = jnp.concatenate([patches, self.ladder(seen, media)], axis=2)
        return Projection(self.width, name="projection")(both)


def copy_rungs(params: PyTree) -> PyTree:
    """Parameters of a VLM with a ladder -> the same, each rung a copy of the tower's block of its number.

    Raises:
        UserError: the tower's parameters are no `Tower`'s, or of other shapes.
    """
    connector, tower = params["connector"], params["tower"]
    ladder = dict(connector["ladder"])
    for name in ladder.keys() - {"queries"}:
        block = tower.get(name, {})
        if not {"attention_norm", "attention", "mlp_norm", "mlp"} <= block.keys():
            raise UserError(f"a ladder's {name} is a copy of the tower's, which has none")
        copied = {part: block[part] for part in ("attention", "mlp_norm", "mlp")}
        copied |= {"query_norm": block["attention_norm"], "key_norm": block["attention_norm"]}
        if jax.tree.map(jnp.shape, copied) != jax.tree.map(jnp.shape, dict(ladder[name])):
            raise UserError(
                f"a ladder's {name} and the tower's differ in shape: take num_heads and mlp of its blocks"
            )
        ladder[name] = copied
    return params | {"connector": connector | {"ladder": ladder}}


@dataclasses.dataclass(frozen=True)
class ArcanaTuning(VisionLanguage):
    """Training of an `Arcana` with a `LadderProjection`: what is drawn, or read from `parts`, gets rungs that are
    copies and the adapter. `start_from` is a run of this task.

    What is trained: "^connector/" and "/kernel/(vision|language)/".
    """

    adapter: MMLoRA = MMLoRA()

    def init(self, key: jax.Array) -> PyTree:
        return self._begin(super().init(key), key)

    @property
    def start(self) -> Callable[[jax.Array], PyTree]:
        if not self.parts:
            return super().start
        # Parts are of plain kernels.
        read = VisionLanguage(self.model, start_from=self.start_from, parts=self.parts).start
        return lambda key: self._begin(read(key), key)

    def _begin(self, params: PyTree, key: jax.Array) -> PyTree:
        decoder = self.adapter.install(params["decoder"], jax.random.fold_in(key, 1))
        return copy_rungs(params) | {"decoder": decoder}
