"""A tiny model, dataset and trainer for the tests of the loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.training.task import LanguageModelling

VOCAB, WIDTH, LENGTH = 16, 8, 4


class Linear(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        return x @ self.param("kernel", nn.initializers.normal(0.2), shape).astype(x.dtype)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Linear(x.shape[-1], name="down")(nn.silu(Linear(2 * x.shape[-1], name="up")(x)))


class Table(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return self.param("table", nn.initializers.normal(1.0), (VOCAB, WIDTH))[tokens]


class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)


class TinyLM(nn.Module):
    """Every token predicts its successor through one MLP; parameters are named as in a decoder."""

    @nn.compact
    def __call__(self, tokens, positions=None, segments=None):
        x = Table(name="embedding")(tokens)
        x = x + Mlp(name="mlp")(Scale(name="mlp_norm")(x))
        return Linear(VOCAB, name="head")(x).astype(jnp.float32)


@dataclass(frozen=True)
class Tokens:
    """Language records made from their number; a third of the targets has weight 0."""

    size: int = 64
    poisoned: int = -1  # the epoch-independent number of a record whose weights are NaN

    def element_spec(self):
        spec = {name: jax.ShapeDtypeStruct((LENGTH,), np.int32) for name in self._record(0)}
        return spec | {"weights": jax.ShapeDtypeStruct((LENGTH,), np.float32)}

    def __len__(self) -> int:
        return self.size

    def _record(self, number: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([7, number // self.size, number % self.size])
        text = random.integers(0, VOCAB, LENGTH + 1).astype(np.int32)
        weights = (random.random(LENGTH) > 0.33).astype(np.float32)
        return {
            "tokens": text[:-1],
            "targets": text[1:],
            "segments": np.ones(LENGTH, np.int32),
            "positions": np.arange(LENGTH, dtype=np.int32),
            "target_bytes": text[1:] % 3,
            "weights": weights * np.float32("nan") if number == self.poisoned else weights,
        }

    def batches(self, start, batch_size, *, rows=None, epochs=None) -> Iterator[dict[str, np.ndarray]]:
        end = None if epochs is None else epochs * self.size
        while end is None or start < end:
            numbers = [start + row for row in (range(batch_size) if rows is None else rows)]
            records = [self._record(min(n, end - 1) if end else n) for n in numbers]
            batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
            if end is not None:
                batch["weights"] *= (np.asarray(numbers) < end)[:, None].astype(np.float32)
            yield batch
            start += batch_size


def stage(**changes) -> Stage:
    fields = dict(name="main", steps=6, batch_size=8, optimizer=adamw(constant(1e-2)))
    return Stage(**{**fields, **changes})


def trainer(**changes) -> Trainer:
    fields = dict(task=LanguageModelling(TinyLM()), data=Tokens(), stages=(stage(),), log_every=1)
    return Trainer(**{**fields, **changes})


def hosts_trainer(data=None) -> Trainer:
    """Eight steps with FSDP over two devices, on one host or on two."""
    return trainer(
        data=data or Tokens(),
        stages=(stage(steps=8),),
        mesh={"fsdp": 2},
        evaluators=(Evaluate("validation", Tokens(20), batch_size=16, every=4),),
        log_every=2,
    )


def bits(tree) -> dict[str, bytes]:
    return {
        jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    return SimpleNamespace(
        TinyLM=TinyLM,
        Tokens=Tokens,
        stage=stage,
        trainer=trainer,
        hosts_trainer=hosts_trainer,
        bits=bits,
        one_device=jax.devices()[:1],
        VOCAB=VOCAB,
        WIDTH=WIDTH,
        LENGTH=LENGTH,
    )
