"""Dynamic-LLaVA: image tokens and generated tokens dropped from all layers but the first few (arXiv 2412.00876).

    model, params = dynamic(model, params, jax.random.key(0), Sparsity(image=(1, 576), image_rate=0.2))
    Generator(model, params).generate(prompts)

A `DynamicLM` is a `DecoderLM` whose prompts have an image in fixed places. What enters layer `layer` decides, once, for
that layer and all above:

    image tokens      a predictor that sees all of them; the int(r_I n) with the greatest log p(keep) stay
    generated tokens  a predictor that sees the token alone; it stays where its logit to keep is greater

Prefill takes the chosen tokens and their positions out of the sequence, and the layers above run on the shorter one.
Behind it a generated token enters the caches of those layers only if it is kept, though it always sees itself;
positions go on with the true count. Without a cache, `recompute` runs those layers on the kept tokens and the last one.

In training nothing is taken out. Keys are weighted by a policy p in {0, 1}, drawn by Gumbel noise straight through:
w_ij = exp(s_ij - max) (p_j + (1 - p_j) [i = j]), A_ij = (w_ij + eps / n) / (sum_j w_ij + eps), and

    loss = CE + lambda mean_b (r_I - mean mask_I)^2 + lambda mean_b (r_OT - mean mask_OT)^2

where answers below `least` tokens are kept whole and add nothing to the last term.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention, Context
from research.nn.attention_kernels import NEGATIVE, AttentionKernel, cap, group_mask, group_queries
from research.nn.cache import Cache, Fresh, LayerCache
from research.nn.linear import Linear
from research.nn.masks import Causal, Full, MaskRule
from research.nn.mlp import ACTIVATIONS, MLP
from research.nn.norm import LayerNorm
from research.nn.reports import apply_reporting
from research.nn.transformer import (
    Block,
    LayerStack,
    Stream,
    VirtualRows,
    run_block,
    tree_places,
    unscan_layers,
)
from research.sparse.pruned_cache import PrunedCache
from research.sparse.tokens import compact, hard_gumbel_keep, keep_best
from research.training.task import (
    Batch,
    LanguageModelling,
    Metrics,
    add_reported,
    cast_floats,
    dropout_rngs,
    language_metrics,
    saved_parameters,
)

PREDICTORS = ("image_predictor", "text_predictor")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """What is dropped, and where.

    Args:
        image: the first image token of every prompt and how many there are.
        layer: l, whose input decides; layers below see everything.
        image_rate: r_I, the share of image tokens that stays.
        width, heads, depth: of the image predictor's transformer; the text predictor has the same width.
        epsilon: of the softmax under a policy; 1e-6 in the authors' code. With 0 it is exactly the shorter sequence's.
    """

    image: tuple[int, int]
    layer: int = 2
    image_rate: float = 0.2
    width: int = 512
    heads: int = 8
    depth: int = 2
    epsilon: float = 0.0

    def __post_init__(self):
        start, count = self.image
        if start < 0 or count < 1 or not 0.0 < self.image_rate <= 1.0 or self.kept < 1:
            raise UserError(
                f"Sparsity: image={self.image}, image_rate={self.image_rate}: a first place, a number of tokens and a "
                "rate in (0, 1] that leaves at least one are expected"
            )
        if self.layer < 1:
            raise UserError(f"Sparsity: layer={self.layer}; at least one layer sees everything")
        if self.width % 4 or self.width % self.heads:
            raise UserError(f"Sparsity: width={self.width} is not a multiple of 4 and of heads={self.heads}")

    @property
    def kept(self) -> int:
        """Image tokens that stay."""
        return int(self.image_rate * self.image[1])

    @property
    def dropped(self) -> int:
        return self.image[1] - self.kept


class ImagePredictor(nn.Module):
    """Hidden states of the image [B, n, d] -> float32 logits [B, n, 2], 0 to keep and 1 to drop."""

    width: int
    heads: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gelu, width = ACTIVATIONS["gelu"], self.width
        x = gelu(Linear(width, True, name="input")(LayerNorm(name="norm")(x)))
        attention = Attention(self.heads, width // self.heads, rule=Full(), output_bias=True)
        context = Context(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
        for i in range(self.depth):
            x, _ = Block(attention, MLP(4 * width), LayerNorm(), name=f"layer_{i}")(x, context)
        local, overall = jnp.split(x, 2, axis=-1)
        overall = jnp.mean(overall.astype(jnp.float32), axis=1, keepdims=True).astype(x.dtype)
        x = jnp.concatenate([local, jnp.broadcast_to(overall, local.shape)], axis=-1)
        x = gelu(Linear(width // 2, True, name="first")(x))
        x = gelu(Linear(width // 4, True, name="second")(x))
        return Linear(2, True, name="output")(x).astype(jnp.float32)


class TextPredictor(nn.Module):
    """The same for generated tokens, each by itself: hidden [..., d] -> logits [..., 2]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gelu = ACTIVATIONS["gelu"]
        x = gelu(Linear(self.width, True, name="input")(LayerNorm(name="norm")(x)))
        x = gelu(Linear(self.width // 2, True, name="first")(x))
        x = gelu(Linear(self.width // 4, True, name="second")(x))
        return Linear(2, True, name="output")(x).astype(jnp.float32)


class PolicyAttention:
    """An `AttentionKernel` under a policy float32 [B, T] on keys; see the head of this file. Made within a trace.

    The eps / n go to the keys that the rule shows, so that none comes from the future.
    """

    def __init__(self, policy: jax.Array, epsilon: float):
        self._policy, self._epsilon = policy, epsilon

    def __call__(self, query, key, value, rule: MaskRule, *, segments, prefix, scale, softcap):
        batch, heads, length, dim = query.shape
        kv_heads = key.shape[1]
        scores = jnp.einsum(
            "bhrd,bhkd->bhrk", group_queries(query, kv_heads), key, preferred_element_type=jnp.float32
        ).reshape(batch, kv_heads, heads // kv_heads, length, length)
        index = jnp.arange(length)[None]
        mask = rule.allowed(index, index, prefix)
        if segments is not None:
            same = segments[:, None, :, None] == segments[:, None, None, :]
            mask = mask & same & (segments[:, None, None, :] > 0)
        mask = group_mask(mask, heads, kv_heads)
        scores = jnp.where(mask, cap(scores * scale, softcap), NEGATIVE)
        seen = jnp.where(jnp.eye(length, dtype=bool), 1.0, self._policy[:, None, None, None])
        # The greatest of all keys, dropped ones too, as nothing depends on it but the rounding.
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(scores - top) * seen, 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights + jnp.where(mask, self._epsilon / length, 0.0)
        weights = weights / jnp.where(total > 0, total + self._epsilon, 1.0)  # padding sees nothing
        out = jnp.einsum(
            "bhgqk,bhkd->bhgqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        return out.astype(query.dtype).reshape(batch, heads, length, dim)


class _Switch:
    """The kernel of the layers above: the model's own, or `PolicyAttention` while there is a policy. One for each
    binding of the model, so that what it holds never outlives a trace."""

    def __init__(self, inner: AttentionKernel):
        self.policed: PolicyAttention | None = None
        self._inner = inner

    def __call__(self, *arrays_and_rule, **options):
        return (self.policed or self._inner)(*arrays_and_rule, **options)


class DynamicLM(DecoderLM, kw_only=True):
    """A `DecoderLM` that drops tokens. Its parameters are a DecoderLM's and those of two predictors.

    `__call__` is dense. Prompts hold the whole image, in the places of `sparsity.image`.
    """

    sparsity: Sparsity

    def setup(self) -> None:
        super().setup()
        s = self.sparsity
        self.image_predictor = ImagePredictor(s.width, s.heads, s.depth)
        self.text_predictor = TextPredictor(s.width)

    def make_layers(self) -> None:
        s, switches = self.sparsity, []
        if self.scan_layers or s.layer >= self.num_layers:
            raise UserError(f"{s}: layer {s.layer} of {self.num_layers} unrolled layers was to decide")

        def layer(i: int) -> nn.Module:
            block, name = self.blocks[i % len(self.blocks)], f"layer_{i}"
            if i < s.layer:
                return block.copy(name=name)
            mixer = block.attention
            if not isinstance(mixer, Attention) or not isinstance(mixer.rule, Causal):
                raise UserError(f"{s}: layer {i} must be causal attention, and is {type(mixer).__name__}")
            switches.append(_Switch(mixer.kernel))
            return block.copy(attention=mixer.copy(kernel=switches[-1]), name=name)

        self.layers = [layer(i) for i in range(self.num_layers)]
        self.switches = tuple(switches)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> jax.Array:
        if self.is_initializing():
            embedded = self.embed(tokens)
            self.image_predictor(embedded)
            self.text_predictor(embedded)
        return super().__call__(tokens, positions, segments, prefix)

    def policy_logits(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        prompt: jax.Array,
        temperature: jax.Array | float = 1.0,
        key: jax.Array | None = None,
        least: int = 0,
        image_keep: jax.Array | None = None,
        text_keep: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """tokens int32[B, T] at full length, prompt int32[B] tokens before the answer -> float32 logits [B, T, V], the
        masks of the image [B, n] and of the text [B, T] (1 outside the answer), before short answers are kept whole.

        With a key the masks are drawn as in training; without, they are those of inference. Answers below `least`
        tokens are kept whole. image_keep, text_keep: masks in place of the predictors'.
        """
        self._check(tokens.shape[1])
        batch, length = tokens.shape
        context = Context(positions, segments)
        stream, _ = self.run_span(self.enter(self.embedding(tokens)), context, None, 0, self.sparsity.layer)
        hidden = stream.x.reshape(batch, length, self.width)
        answer = (jnp.arange(length) >= prompt[:, None]) & (segments > 0)
        keys = (None, None) if key is None else jax.random.split(key)
        if image_keep is None:
            image_keep = self._image_mask(hidden, temperature, keys[0])
        if text_keep is None:
            scores = self.text_predictor(hidden)
            text_keep = _decide(scores) if key is None else hard_gumbel_keep(scores, temperature, keys[1])
        text_keep = jnp.where(answer, text_keep, 1.0)
        long = jnp.sum(answer, axis=1) >= least
        start, count = self.sparsity.image
        policy = jnp.where(long[:, None], text_keep, 1.0)
        policy = policy.at[:, start : start + count].set(image_keep.astype(jnp.float32))
        x, _ = self._above(hidden, context, kernel=PolicyAttention(policy, self.sparsity.epsilon))
        return self.logits(self.final_norm(x)), image_keep, text_keep

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """As `DecoderLM.prefill`; the hidden states of dropped tokens are 0."""
        _, hidden, fresh = self._shortened(tokens, lengths, lengths, tokens.shape[1])
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), hidden, fresh

    def recompute(
        self, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array, budget: int
    ) -> tuple[jax.Array, jax.Array]:
        """Decoding without a cache: tokens int32[B, T], `lengths` of them real and `prompt` of these given ->
        float32 logits [B, V] of the last token, and int32[B] how many tokens the layers above had.

        budget: the most that any row keeps, see `kept_tokens`; a row that keeps more is cut off at its end.
        """
        _, hidden, fresh = self._shortened(tokens, lengths, prompt, budget)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), jnp.sum(fresh[-1][2][:, 0, :, 0] >= 0, axis=1)

    def decisions(self, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array) -> jax.Array:
        """bool [B, T]: the tokens that the layers above see when `lengths` are there and `prompt` of these given."""
        _, keep, _ = self._below(tokens, lengths, prompt)
        return keep

    def extend(
        self,
        tokens: jax.Array,
        cache: Cache,
        tree: jax.Array | None = None,
        depth: jax.Array | None = None,
        virtual: VirtualRows | None = None,
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """As `DecoderLM.extend`: every new token decides for itself and, if dropped, is seen by no other above."""
        if virtual is not None:
            raise UserError("DynamicLM: rows that join between layers have no token to decide about")
        batch, count = tokens.shape
        positions, tree = tree_places(cache.length, count, tree, depth)
        context = Context(positions, length=cache.length, tree=tree)
        stream, below = self.run_span(
            self.enter(self.embedding(tokens)), context, cache.layers, 0, self.sparsity.layer
        )
        hidden = stream.x.reshape(batch, count, self.width)
        keep = _decide(self.text_predictor(hidden)) > 0
        seen = tree & (keep[:, None, :] | jnp.eye(count, dtype=bool))
        x, above = self._above(hidden, context.replace(tree=seen), cache.layers)
        place = jnp.where(keep, positions - cache.length[:, None], -1)[:, None, :, None]
        x = self.final_norm(x)
        return self.logits(x), x, (*below, *((*rows, place) for rows in above))

    def init_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, margin: int = 64
    ) -> Cache:
        """As `DecoderLM.init_cache`; layers above have no slots for the image tokens that never come."""
        self._check(capacity)
        layers = self.init_layer_caches(batch, capacity, margin, dtype)
        layer, dropped = self.sparsity.layer, self.sparsity.dropped
        above = (PrunedCache.of(cache, dropped) for cache in layers[layer:])
        return Cache((*layers[:layer], *above), jnp.zeros((batch,), jnp.int32))

    @nn.nowrap
    def _check(self, length: int) -> None:
        start, count = self.sparsity.image
        if length < start + count:
            raise UserError(
                f"DynamicLM: {length} tokens can't hold an image in places {start} to {start + count - 1}"
            )

    def _image_mask(
        self, hidden: jax.Array, temperature: jax.Array | float, key: jax.Array | None
    ) -> jax.Array:
        """float32 [B, n], drawn with a key and the `kept` best without."""
        start, count = self.sparsity.image
        scores = self.image_predictor(hidden[:, start : start + count])
        if key is not None:
            return hard_gumbel_keep(scores, temperature, key)
        odds = scores[..., 0] - scores[..., 1]  # rises with log p(keep)
        return keep_best(odds, jnp.ones(odds.shape, bool), self.sparsity.kept).astype(jnp.float32)

    def _below(
        self, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array
    ) -> tuple[jax.Array, jax.Array, list[Fresh]]:
        """-> what enters the deciding layer [B, T, D], the tokens that stay bool [B, T], fresh rows below."""
        self._check(tokens.shape[1])
        batch, length = tokens.shape
        number = jnp.arange(length)
        real = number < lengths[:, None]
        context = Context(jnp.broadcast_to(number, tokens.shape), real.astype(jnp.int32))
        stream, fresh = self.run_span(
            self.enter(self.embedding(tokens)), context, None, 0, self.sparsity.layer
        )
        hidden = stream.x.reshape(batch, length, self.width)
        start, count = self.sparsity.image
        given = (number < prompt[:, None]) | (number == lengths[:, None] - 1)
        keep = given | (_decide(self.text_predictor(hidden)) > 0)
        image = self._image_mask(hidden, 1.0, None) > 0
        return hidden, keep.at[:, start : start + count].set(image) & real, fresh

    def _shortened(
        self, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array, budget: int
    ) -> tuple[jax.Array, jax.Array, tuple[Fresh, ...]]:
        """The layers above on the kept tokens alone, at most `budget` and what is left of the image's.

        -> kept bool [B, T], states after the final norm [B, T, D] with 0 where dropped, fresh rows of all layers.
        """
        hidden, keep, below = self._below(tokens, lengths, prompt)
        batch, length = tokens.shape
        index, there = compact(keep, min(budget, length - self.sparsity.dropped))
        taken = jnp.take_along_axis(hidden, index[..., None], axis=1)
        x, above = self._above(taken, Context(index, there.astype(jnp.int32)))
        x = jnp.where(there[..., None], self.final_norm(x), 0.0)
        row = jnp.arange(batch)[:, None]
        states = jnp.zeros((batch, length, self.width), x.dtype).at[row, index].add(x)
        place = jnp.where(there, index, -1)[:, None, :, None]
        return keep, states, (*below, *((*rows, place) for rows in above))

    def _above(
        self,
        hidden: jax.Array,
        context: Context,
        cache: tuple[LayerCache, ...] | None = None,
        kernel: PolicyAttention | None = None,
    ) -> tuple[jax.Array, list[Fresh]]:
        """hidden [B, N, D] through the layers from the deciding one on, under a policy where there is one."""
        for switch in self.switches:
            switch.policed = kernel
        stream, fresh = Stream(self.enter(hidden).x), []
        for i in range(self.sparsity.layer, self.num_layers):
            own = None if cache is None else cache[i]
            stream, rows = run_block(self.layers[i], stream, context, own, self.remat)
            fresh.append(rows)
        return stream.x.reshape(hidden.shape), fresh


def _decide(logits: jax.Array) -> jax.Array:
    """logits [..., 2] -> 1.0 where a token stays."""
    return (logits[..., 0] > logits[..., 1]).astype(jnp.float32)


def dynamic(model: LayerStack, params: Any, key: jax.Array, sparsity: Sparsity) -> tuple[DynamicLM, Any]:
    """A decoder and its parameters with untrained predictors, to be trained as `DynamicTraining`.

    Raises UserError for another model than a DecoderLM, and as `DynamicLM` does.
    """
    if type(model) is not DecoderLM:
        raise UserError(f"{sparsity}: {type(model).__name__} is not a DecoderLM")
    model, params = unscan_layers(model, params)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init}
    made = DynamicLM(**(fields | dict(sparsity=sparsity, parent=None, name=None)))
    drawn = jax.jit(made.init)(key, jnp.zeros((1, 2), jnp.int32))["params"]
    return made, params | {name: drawn[name] for name in PREDICTORS}


@functools.lru_cache(maxsize=16)
def _programs(model: DynamicLM, budget: int | None):
    if budget is None:
        return jax.jit(lambda *inputs: model.apply(*inputs, method="decisions"))
    return jax.jit(lambda *inputs: model.apply(*inputs, budget, method="recompute"))


def decode_without_cache(
    model: DynamicLM, params: Any, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array, bucket: int = 16
) -> tuple[jax.Array, jax.Array]:
    """`DynamicLM.recompute` on as many tokens as the longest row keeps, rounded up to whole buckets.

    The authors' code fills rows that keep fewer with tokens they would drop; here those rows are padded.
    """
    keep = _programs(model, None)({"params": params}, tokens, lengths, prompt)
    most = int(jnp.max(jnp.sum(keep, axis=1)))
    budget = min(-(-most // bucket) * bucket, tokens.shape[1])
    return _programs(model, budget)({"params": params}, tokens, lengths, prompt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicTraining(LanguageModelling):
    """Training of a `DynamicLM` and its predictors together; batches have `prompt` int32[B], tokens before the answer.

    Evaluation is of the sparse model as it decodes. Both report `image_kept` and `text_kept`, shares, the second over
    answers of at least `least` tokens.

    Args:
        text_rate: r_OT.
        weight: lambda.
        least: LEN_OT.
        temperatures: tau of the first and of the last update, geometric between.
        updates: over how many.
    """

    text_rate: float = 0.5
    weight: float = 100.0
    least: int = 50
    temperatures: tuple[float, float] = (1.0, 0.1)
    updates: int

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.text_rate <= 1.0 or min(self.temperatures) <= 0.0 or self.updates < 1:
            raise UserError(
                f"DynamicTraining: text_rate={self.text_rate}, temperatures={self.temperatures}, "
                f"updates={self.updates}: a rate in (0, 1], temperatures above 0 and at least one update are expected"
            )

    def init(self, key: jax.Array) -> Any:
        """The model's parameters and, beside them, how many updates they have had."""
        return {"model": super().init(key), "updates": jnp.zeros((), jnp.int32)}

    @property
    def start(self) -> Callable[[jax.Array], Any]:
        """From the parameters of a decoder without predictors, which are drawn."""
        if self.start_from is None:
            raise AttributeError("start")

        def begin(key: jax.Array) -> Any:
            fresh = self.init(key)
            decoder = {name: x for name, x in fresh["model"].items() if name not in PREDICTORS}
            saved = saved_parameters(self.start_from, jax.eval_shape(lambda: decoder))
            return fresh | {"model": fresh["model"] | saved}

        return begin

    def remember(self, params: Any, metrics: Metrics) -> Any:
        return params | {"updates": params["updates"] + 1}

    def unpack(self, params: Any) -> Any:
        return params["model"]

    def variants(self, params: Any) -> dict[str, Any]:
        return {"": params["model"]}

    def temperature(self, updates: jax.Array) -> jax.Array:
        """tau0 (tau1 / tau0)^(updates / all), float32."""
        first, last = self.temperatures
        share = jnp.minimum(updates.astype(jnp.float32) / self.updates, 1.0)
        return first * (last / first) ** share

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> Metrics:
        tau = self.temperature(params["updates"])
        draw, drop = jax.random.split(key)
        metrics, losses, rates = self._measured(params["model"], batch, tau, draw, drop)
        return add_reported(metrics, losses | {name: self.weight * x for name, x in rates.items()})

    def evaluate(self, params: Any, batch: Batch) -> Metrics:
        return self._measured(params, batch, 1.0, None, None)[0]

    def _measured(
        self,
        params: Any,
        batch: Batch,
        temperature: jax.Array | float,
        draw: jax.Array | None,
        drop: jax.Array | None,
    ) -> tuple[Metrics, dict[str, jax.Array], dict[str, jax.Array]]:
        """-> metrics, the losses that layers report, the two terms of the rates."""
        (logits, image, text), losses, measured = apply_reporting(
            self.model,
            {"params": cast_floats(params, self.compute_dtype)},
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            batch["prompt"],
            temperature,
            draw,
            self.least,
            method="policy_logits",
            rngs=dropout_rngs(drop),
        )
        length = batch["tokens"].shape[1]
        answer = (jnp.arange(length) >= batch["prompt"][:, None]) & (batch["segments"] > 0)
        count = jnp.sum(answer, axis=1)
        long = (count >= self.least) & (count > 0)
        share = jnp.sum(text * answer, axis=1) / jnp.maximum(count, 1)
        image_share = jnp.mean(image, axis=1)
        rates = {
            "image_rate": jnp.mean(jnp.square(self.model.sparsity.image_rate - image_share)),
            "text_rate": jnp.mean(jnp.where(long, jnp.square(self.text_rate - share), 0.0)),
        }
        rows = jnp.float32(answer.shape[0])
        own = {
            "image_kept": (jnp.sum(jax.lax.stop_gradient(image_share)), rows),
            "text_kept": (
                jax.lax.stop_gradient(jnp.sum(jnp.where(long[:, None] & answer, text, 0.0))),
                jnp.sum(jnp.where(long, count, 0)).astype(jnp.float32),
            ),
        }
        return language_metrics(logits, batch)[0] | measured | own, losses, rates
