"""What a compression method is, and chains of them.

A method is a pure function from parameter tree to parameter tree, of one model: kernels become structured weights
(`research/nn/weights.py`), everything else stays or is tuned. Methods are applied from left to right, each to what the
one before it left, and each is also told the parameters of the beginning: what is to be kept.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import numpy as np

from research.compression.blocks import plain
from research.data.text import TokenDataset
from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.nn.transformer import LayerStack, unscan_layers
from research.training.observe import Batch

PyTree = Any
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What a method compresses.

    Args:
        model: its layers unrolled.
        original: the parameters that are to be approximated, arrays.
        params: those of the chain so far, arrays and structured weights.
        batches: language batches, on the host; empty where the method needs none.
        key: of whatever is drawn; None where the method draws nothing.
        tell: prints a line about progress.
    """

    model: nn.Module
    original: PyTree
    params: PyTree
    batches: Sequence[Batch] = ()
    key: jax.Array | None = None
    tell: Tell = lambda line: None  # noqa: E731


class Method(Protocol):
    """A compression method. Implementations are frozen dataclasses, whose fields are its options.

    needs_data: whether it reads the calibration batches. needs_compressed: whether it repairs what is compressed
    already, so that it can't come first.
    """

    needs_data: ClassVar[bool]
    needs_compressed: ClassVar[bool]

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        """The compressed parameters, and notes for the user.

        Raises:
            UserError: whatever can't be done, naming the kernel and the option.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One method of a chain, done. seconds: of the host's clock, compilation included."""

    method: Method
    params: PyTree
    notes: list[str]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Chain:
    """Methods, applied from left to right, and the text that they observe.

    Args:
        methods: at least one.
        sources: what `research.data.text.TokenDataset` reads; its split `train` is calibrated on.
        tokens: how many tokens, in whole rows.
        length: tokens of a row; None: the model's context, up to 2048.
        batch_size: rows that go through a block together.
        seed: of the rows that are chosen, and of all that methods draw.
    """

    methods: tuple[Method, ...]
    sources: str | tuple[tuple[str, float], ...] = "builtin"
    tokens: int = 32768
    length: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("a compression chain has at least one method")
        for name in ("tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1")

    @property
    def needs_data(self) -> bool:
        """Whether any of its methods reads calibration text."""
        return any(method.needs_data for method in self.methods)

    def batches(self, model: nn.Module, tokenizer: Tokenizer | None) -> list[Batch]:
        """The calibration batches, all of one shape but the last. Raises `UserError` where the text is too short or has
        tokens that the model doesn't know."""
        length = self.length or min(getattr(model, "max_length", 2048), 2048)
        data = TokenDataset(self.sources, "train", length, tokenizer, seed=self.seed)
        rows = max(self.tokens // length, 1)
        if rows > len(data):
            raise UserError(
                f"calibration data too short: {self.sources} has {len(data)} rows of {length} tokens, and {rows} are "
                f"asked for; ask for at most {len(data) * length} tokens"
            )
        starts = range(0, rows, self.batch_size)
        found = [data.take(np.arange(at, min(at + self.batch_size, rows))) for at in starts]
        known = getattr(model, "vocab_size", None)
        most = max(int(batch["tokens"].max()) for batch in found)
        if known is not None and most >= known:
            raise UserError(
                f"calibration data has token {most}, and the model knows {known}: whose tokenizer is it?"
            )
        return found

    def run(
        self,
        model: nn.Module,
        params: PyTree,
        batches: Sequence[Batch],
        original: PyTree | None = None,
        tell: Tell = lambda line: None,
    ) -> Iterator[Step]:
        """What each method leaves. The parameters are those of `unrolled(model, params)`.

        original: the parameters to approximate, where `params` are compressed already; default `params`.

        Raises `UserError` as the methods do; where the first one repairs what nothing has compressed; for data that is
        needed and not given.
        """
        model, params = unrolled(model, params)
        original = plain(params if original is None else original)
        if self.methods[0].needs_compressed and jax.tree.structure(plain(params)) == jax.tree.structure(
            params
        ):
            raise UserError(
                f"{name_of(self.methods[0])} repairs what was compressed before, and nothing was: name another method "
                "first"
            )
        if self.needs_data and not batches:
            raise UserError("the calibration data is empty: it has no batch")
        keys = jax.random.split(jax.random.key(self.seed), len(self.methods))
        for method, key in zip(self.methods, keys, strict=True):
            begun = time.perf_counter()
            own = batches if method.needs_data else ()
            params, notes = method.compress(Subject(model, original, params, own, key, tell))
            jax.block_until_ready(params)
            yield Step(method, params, notes, time.perf_counter() - begun)


def unrolled(model: nn.Module, params: PyTree) -> tuple[nn.Module, PyTree]:
    """The model with its layers unrolled, since each gets weights of a structure of its own."""
    return unscan_layers(model, params) if isinstance(model, LayerStack) else (model, params)


def name_of(method: Method) -> str:
    """How a method is called: `research.compression.methods` says."""
    return getattr(method, "name", type(method).__name__.lower())
