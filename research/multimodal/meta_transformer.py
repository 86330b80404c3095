"""Meta-Transformer: one frozen encoder for any modality, each with its own tokenizer and head (arXiv 2307.10802).

    z_m = [class_m, Tok_m(x)] + positions_m        Tok_m(x) [B, S_m, D], of data of the modality m
    h   = Blocks(z_m)                              of a ViT, the same for all m
    y_m = Head_m(Norm_m(h))                        and the loss is that of the task

"Frozen" trains what has the index m: tokenizer, class token, positions, last norm, head; "tuned" everything. Which one
it is a stage says (`frozen=("^encoder/",)`), as everywhere. Nothing is paired: a batch holds records of several
modalities side by side (`research.data.together`). While the encoder is frozen their gradients never meet, so that each
learns as it would alone.

Parameters: encoder/layer_i/..., and of every modality <name>/{tokenizer/..., class_token, positions or class_place,
final_norm, head}. The blocks are those of `research.multimodal.tower.Tower`; of a trained tower they alone are taken.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from research.errors import UserError, nearest
from research.multimodal.task import saved_part, with_part
from research.multimodal.tokenize.contract import Tokenizer
from research.nn.attention import Context
from research.nn.cache import LayerCache
from research.nn.linear import parameter
from research.nn.norm import LayerNorm
from research.nn.reports import apply_reporting
from research.nn.transformer import LayerStack
from research.training.task import (
    Batch,
    FromDirectory,
    Metrics,
    add_reported,
    cast_floats,
    check_compute_dtype,
    dropout_rngs,
)


class Encoder(LayerStack):
    """The blocks that all modalities share. Parameters: layer_i."""

    def setup(self) -> None:
        self.make_layers()

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, places: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D]; mask bool[B, T] or None; places [B, T, D] or None, added before every block -> [B, T, D]."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        context = Context(positions, None if mask is None else mask.astype(jnp.int32))
        if places is None:
            return self.run_layers(x, context)[0]

        def add(x: jax.Array, context: Context, cache: LayerCache | None) -> tuple[jax.Array, Context, None]:
            return x + places.astype(x.dtype), context, None

        return self.run_hooked(x, context, {layer: (add,) for layer in range(self.num_layers)})[0]


class Modality(nn.Module):
    """What a modality has of its own.

    Args:
        tokenizer: a `research.multimodal.tokenize.contract.Tokenizer`.
        head: of `research.multimodal.heads`.
        positions: "learned", a table for the class token and the tokens; "none" where the tokenizer says where tokens
            are. The class token has a learned place of its own where the tokenizer gives places.
        norm: template of the last norm.
    """

    tokenizer: Tokenizer
    head: nn.Module
    positions: Literal["learned", "none"] = "learned"
    norm: nn.Module = LayerNorm()

    @nn.compact
    def __call__(self, record: Mapping[str, jax.Array], encoder: Encoder) -> jax.Array:
        """One modality's arrays of a batch -> what the head says."""
        for name, spec in self.tokenizer.spec.items():
            if name not in record or record[name].shape[1:] != spec.shape:
                found = f"is {list(record[name].shape[1:])}" if name in record else "is missing"
                raise UserError(f"{self.name}: {name} {found}; {list(spec.shape)} is expected")
        tokens = self.tokenizer(record)
        batch, _, width = tokens.x.shape
        normal = nn.initializers.normal(0.02)

        def in_front(one: jax.Array, x: jax.Array) -> jax.Array:
            # Records are float32, and so are most tokens of them: parameters say in what the encoder computes.
            return jnp.concatenate([jnp.broadcast_to(one, (batch, 1, width)), x.astype(one.dtype)], axis=1)

        x = in_front(parameter(self, "class_token", normal, (1, width)), tokens.x)
        places = tokens.places
        if places is not None:
            places = in_front(parameter(self, "class_place", normal, (1, width)), places)
        if self.positions == "learned":
            x = x + parameter(self, "positions", normal, (x.shape[1], width)).astype(x.dtype)
        mask = tokens.mask
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        x = self.norm.copy(name="final_norm")(encoder(x, mask, places))
        return self.head(x, mask)


class MetaTransformer(nn.Module):
    """Args:
    encoder: shared by all.
    modalities: by name.
    """

    encoder: Encoder
    modalities: Mapping[str, Modality]

    def __post_init__(self) -> None:
        # Modules are static arguments of jit: they must have a hash.
        object.__setattr__(self, "modalities", FrozenDict(self.modalities))
        super().__post_init__()

    def setup(self) -> None:
        if taken := {"encoder", "modalities", "parts", "name", "parent", "scope"} & set(self.modalities):
            raise UserError(f"MetaTransformer: a modality can't be called {taken.pop()!r}")
        self.parts = {name: modality.copy(name=name) for name, modality in self.modalities.items()}

    def __call__(self, records: Any) -> dict[str, jax.Array]:
        """{modality: {array: [B, ...]}} -> {modality: what its head says}, of those that are given.

        `init` makes the parameters of all modalities, whatever it is given.
        """
        if self.is_initializing():
            records = {name: example(modality) for name, modality in self.modalities.items()}
        for name in records:
            if name not in self.modalities:
                close = nearest(name, self.modalities)
                hint = f"; did you mean {close}?" if close else ""
                raise UserError(f"MetaTransformer has no modality {name!r}{hint}")
        return {name: self.parts[name](record, self.encoder) for name, record in records.items()}


def example(modality: Modality) -> dict[str, jax.Array]:
    """A batch of one record of zeros."""
    return {name: jnp.zeros((1, *spec.shape), spec.dtype) for name, spec in modality.tokenizer.spec.items()}


@dataclasses.dataclass(frozen=True)
class Transfer(FromDirectory):
    """Batches of `research.data.together.SideBySide`, named as the modalities of the model; any may be missing.

    Metrics: those of every head below the modality's name, and `loss`, their mean over all records. For stages
    `loss_weights={"image/loss": 1.0, ...}` is the sum of the modalities' means.

    Args:
        encoder: a run or model directory whose blocks the encoder begins with; nothing else of it is taken.
        inside: the path of the subtree there that has them as `layer_i`, such as "tower"; "" is all of it.
        compute_dtype, start_from: as of `LanguageModelling`.
    """

    model: MetaTransformer
    encoder: str | None = None
    inside: str = "tower"
    compute_dtype: str = "float32"
    start_from: str | None = None

    def __post_init__(self):
        check_compute_dtype(self.compute_dtype, "Transfer")

    @property
    def start(self) -> Callable[[jax.Array], Any]:
        if self.encoder is None:
            return super().start
        if self.start_from is not None:
            raise UserError("Transfer: encoder and start_from are both given")
        return lambda key: with_blocks(
            jax.jit(self.init)(key), saved_part(self.encoder, self.inside, "Transfer")
        )

    def init(self, key: jax.Array) -> Any:
        return self.model.init(key, {})["params"]

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> Metrics:
        metrics, losses = self._metrics(params, batch, key)
        return add_reported(metrics, losses)

    def evaluate(self, params: Any, batch: Batch) -> Metrics:
        return self._metrics(params, batch, None)[0]

    def variants(self, params: Any) -> dict[str, Any]:
        return {"": params}

    def _metrics(
        self, params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        records: dict[str, Batch] = {}
        for path, array in batch.items():
            name, _, key_ = path.partition("/")
            records.setdefault(name, {})[key_] = array
        outputs, losses, measured = apply_reporting(
            self.model, {"params": cast_floats(params, self.compute_dtype)}, records, rngs=dropout_rngs(key)
        )
        found = {
            f"{name}/{metric}": value
            for name, said in outputs.items()
            for metric, value in self.model.modalities[name]
            .head.measure(said.astype(jnp.float32), records[name])
            .items()
        }
        sums, weights = zip(*(found[f"{name}/loss"] for name in outputs), strict=True)
        return {"loss": (sum(sums), sum(weights))} | found | measured, losses


def with_blocks(params: Any, stack: Mapping[str, Any]) -> Any:
    """Parameters whose encoder has the blocks `layer_i` of a tree, and nothing else of it.

    Raises `UserError` unless there are as many, of the same shapes.
    """
    blocks = {name: block for name, block in stack.items() if re.fullmatch(r"layer_\d+", name)}
    return with_part(params, ["encoder"], blocks, "encoder", "Transfer.encoder")
