"""Training speed against PyTorch, eager and through torch.compile, with the same weights and the same batch.

What is measured here is what a config trains with: the compiled step of the trainer, with its clipping, its
metrics and its attention inside segments, over `DecoderLM`, `LanguageModelling` and `adamw`. The peer is a
plain decoder with torch's fused attention and fused AdamW, without segments (`torch_decoder.py`). The losses
of both are compared over two updates before anything is timed. Every contender has a process of its own; they
take turns.
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from experiments.bench.contender import PAUSE, Contender
from experiments.bench.shapes import Shape, make_decoder
from research import runtime

LENGTH = 256  # tokens of a row
TOKENS = {"20M": 2048}  # of a batch; 4096 for the others
PEERS = ("eager", "compile")
HYPER = {"rate": 1e-3, "weight_decay": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip": 1.0}
LOSS_TOLERANCE = 1e-4  # nats
TURN = 1.0  # seconds of a turn


@dataclasses.dataclass(frozen=True)
class Row:
    """One size. `seconds`: {contender: seconds a step of every turn}; this project's is called "lathe".

    flops: of one step, 6 for every token and matrix element and attention's own products, causal half only.
    peaks: FLOP/s of each contender's library in a large matrix product, the best of the same turns.
    """

    size: str
    parameters: int
    tokens: int
    flops: float
    peaks: dict[str, float]
    loss: float
    seconds: dict[str, list[float]]

    def tokens_per_second(self, name: str) -> float:
        return self.tokens / statistics.median(self.seconds[name])

    def ratio(self, peer: str) -> float:
        """How many times faster than the peer this project is, medians."""
        return statistics.median(self.seconds[peer]) / statistics.median(self.seconds["lathe"])

    def best_ratio(self, peer: str) -> float:
        """The same of the fastest turns."""
        return min(self.seconds[peer]) / min(self.seconds["lathe"])

    @property
    def peak(self) -> float:
        """The machine's: that of the best library."""
        return max(self.peaks.values())

    def peak_fraction(self, name: str) -> float:
        return self.flops / statistics.median(self.seconds[name]) / self.peak

    def as_dict(self) -> dict[str, Any]:
        peers = [name for name in self.seconds if name != "lathe"]
        return dataclasses.asdict(self) | {
            "tokens_per_second": {name: self.tokens_per_second(name) for name in self.seconds},
            "ratio": {name: self.ratio(name) for name in peers},
            "best_ratio": {name: self.best_ratio(name) for name in peers},
            "peak_fraction": {name: self.peak_fraction(name) for name in self.seconds},
        }


def run(
    shapes: Sequence[Shape],
    peers: Sequence[str] = PEERS,
    rounds: int = 5,
    threads: int = 2,
    length: int = LENGTH,
    turn: float = TURN,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measures every shape, reports a few lines for each.

    Raises RuntimeError where the losses of two contenders differ: the comparison would not be one.
    """
    if peers and importlib.util.find_spec("torch") is None:
        report("no comparison with PyTorch: torch is not installed; pip install -e '.[parity]' installs it")
        peers = ()
    report(f"training, float32, AdamW, rows of {length} tokens, {threads} threads, {rounds} rounds")
    rows = []
    for shape in shapes:
        row = _measure(shape, peers, rounds, threads, length, turn)
        rows.append(row)
        report(
            f"{shape.name:>4} ({row.parameters / 1e6:.2f}M parameters, {row.tokens} tokens a step): "
            f"{row.tokens_per_second('lathe'):.0f} tokens/s, "
            f"{row.peak_fraction('lathe'):.0%} of the {row.peak / 1e9:.0f} GFLOP/s of the best matrix product"
        )
        for peer in peers:
            report(
                f"     PyTorch {peer:8} {row.tokens_per_second(peer):8.0f} tokens/s: {row.ratio(peer):.2f}x "
                f"(best turns {row.best_ratio(peer):.2f}x), {row.peak_fraction(peer):.0%} of that peak; "
                f"its own matrix product: {row.peaks[peer] / 1e9:.0f} GFLOP/s"
            )
    return rows


def _measure(shape: Shape, peers: Sequence[str], rounds: int, threads: int, length: int, turn: float) -> Row:
    tokens = TOKENS.get(shape.name, 4096)
    batch = random_batch(shape.vocab, tokens // length, length)
    with ExitStack() as stack:
        ours = stack.enter_context(Contender(make_ours, shape, batch))
        params = ours("params")
        contenders = {"lathe": ours}
        for peer in peers:
            made = Contender(make_peer, shape, params, batch, HYPER, threads, peer == "compile")
            contenders[peer] = stack.enter_context(made)
        losses = {name: contender("losses", 2) for name, contender in contenders.items()}
        check_losses(losses)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        steps = max(1, round(turn / ours("turn", 1)))
        peaks = dict.fromkeys(contenders, 0.0)
        for _ in range(rounds):
            for name, contender in contenders.items():
                time.sleep(PAUSE)
                seconds[name].append(contender("turn", steps))
                peaks[name] = max(peaks[name], contender("peak"))
        matrices = ours("matrix_elements")
    # Forward, a query meets (length + 1) / 2 keys on average, twice (scores and values), 2 FLOP a product.
    attention = 2 * (length + 1) * shape.width * shape.layers
    return Row(
        size=shape.name,
        parameters=sum(array.size for array in params.values()),
        tokens=tokens,
        flops=tokens * (6.0 * matrices + 3.0 * attention),
        peaks=peaks,
        loss=losses["lathe"][0],
        seconds=seconds,
    )


def check_losses(losses: dict[str, list[float]]) -> None:
    """Raises RuntimeError unless every contender's losses are those of "lathe" to LOSS_TOLERANCE."""
    for name, theirs in losses.items():
        if not np.allclose(theirs, losses["lathe"], rtol=0, atol=LOSS_TOLERANCE):
            raise RuntimeError(f"{name} has losses {theirs}, lathe {losses['lathe']}: not the same training")


def random_batch(vocab: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """A language batch of random tokens, every row one document (see docs/architecture.md, Batches)."""
    stream = np.random.default_rng(0).integers(0, vocab, (rows, length + 1), dtype=np.int32)
    ones = np.ones((rows, length), np.int32)
    return {
        "tokens": stream[:, :-1].copy(),
        "targets": stream[:, 1:].copy(),
        "segments": ones,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape).copy(),
        "target_bytes": ones,
        "weights": ones.astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A dataset of one batch, over and over."""

    batch: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.batch["tokens"])

    def element_spec(self) -> dict[str, Any]:
        import jax

        return {name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in self.batch.items()}

    def batches(
        self, start: int, batch_size: int, *, rows: Sequence[int] | None = None, epochs: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield self.batch


class Ours:
    """The trainer's own step."""

    def __init__(self, shape: Shape, batch: dict[str, np.ndarray]):
        import jax

        from research.training.feed import batch_spec, feed
        from research.training.loop import Trainer
        from research.training.optimizers import adamw, constant
        from research.training.stages import Stage
        from research.training.task import LanguageModelling

        rows, length = batch["tokens"].shape
        decay, betas = HYPER["weight_decay"], (HYPER["b1"], HYPER["b2"])
        optimizer = adamw(constant(HYPER["rate"]), decay, *betas, HYPER["eps"])
        data = Repeated(batch)
        trainer = Trainer(
            task=LanguageModelling(make_decoder(shape, length, tied_head=True)),
            data=data,
            stages=(Stage("bench", steps=1_000_000, batch_size=rows, optimizer=optimizer),),
            clip=HYPER["clip"],
        )
        self._step, self._state, mesh = trainer.compile_first_stage(devices=jax.devices()[:1])
        self._batch = next(feed(data, 0, rows, mesh, batch_spec(data, rows)))

    def params(self) -> dict[str, np.ndarray]:
        """{path: array}."""
        from research.training.paths import named_leaves

        return {path: np.array(leaf) for path, leaf in named_leaves(self._state.params).items()}

    def matrix_elements(self) -> int:
        from research.training.clock import matrix_elements

        return matrix_elements(self._state.params)

    def losses(self, steps: int) -> list[float]:
        """The losses of the next `steps` updates."""
        return [self._read(self._advance()) for _ in range(steps)]

    def turn(self, steps: int) -> float:
        """Seconds a step, over `steps` updates after one that is not timed."""
        self._read(self._advance())
        start = time.perf_counter()
        for _ in range(steps):
            metrics = self._advance()
        self._read(metrics)
        return (time.perf_counter() - start) / steps

    def peak(self) -> float:
        from experiments.bench.peak import matmul_flops

        return matmul_flops()

    def _advance(self) -> Any:
        self._state, metrics = self._step(self._state, self._batch)
        return metrics

    @staticmethod
    def _read(metrics: Any) -> float:
        total, weight = metrics["loss"]
        return float(total) / float(weight)


def make_ours(shape: Shape, batch: dict[str, np.ndarray]) -> Ours:
    runtime.prepare()  # as every program does, before jax is imported
    return Ours(shape, batch)


def make_peer(*args: Any) -> Any:
    runtime.tune_allocator()  # the same for both, though it changes little for torch
    from experiments.bench.torch_decoder import Peer

    return Peer(*args)
