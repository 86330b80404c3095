"""The table of drafters, each on a tiny target where drafts are often accepted; `test_members.py` walks it.

A new drafter adds a line to `MEMBERS`: a function of no argument that returns a `Member`. Trained ones call
`trained(drafter)`.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.config import build, of
from research.decoding.proposers import Proposer, Target
from research.decoding.speculative.aded import ADED, count_trigrams
from research.decoding.speculative.clover import Clover
from research.decoding.speculative.draft_model import DraftModel, Submodel
from research.decoding.speculative.eagle import ConfidenceTree, Eagle
from research.decoding.speculative.hidden_transfer import HiddenTransfer
from research.decoding.speculative.hydra import Hydra
from research.decoding.speculative.iad import IAD
from research.decoding.speculative.lud import LUD
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.pearl import Pearl
from research.decoding.speculative.ppd import PPD, search_trees
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.decoding.speculative.sjd import SJD
from research.decoding.speculative.specdec_pp import SpecDecPP
from research.decoding.speculative.training import DrafterTraining
from research.decoding.speculative.trees import RankTree
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.loop import Trainer
from research.training.model_directory import save_model
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.training.state import init_key
from tests.programs import drawn

VOCAB, WIDTH, CONTEXT = 32, 32, 48
PROMPTS = [[5, 9, 2], [3, 30, 7, 11, 8, 8, 1, 20, 21, 22, 23, 4], [7]]  # unequal lengths


@dataclasses.dataclass(frozen=True)
class TinyTarget:
    """A decoder and its parameters, also saved in `directory`."""

    model: DecoderLM
    params: Any
    directory: str


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a short run of `DrafterTraining` did: all parameters before and after, and the last loss."""

    before: Any
    after: Any
    loss: float


@dataclasses.dataclass(frozen=True)
class Member:
    """A drafter ready to be used.

    lossless: with the exact verifiers its output is that of plain decoding. deterministic: its drafts are a
    function of the context, so that sampled output, too, is that of plain decoding token for token.
    run: how its parameters were trained, where they were.
    """

    proposer: Proposer
    params: Any = ()
    lossless: bool = True
    deterministic: bool = True
    run: Trained | None = None
    target: TinyTarget | None = None  # the tiny decoder
    prompts: tuple[tuple[int, ...], ...] = tuple(map(tuple, PROMPTS))

    def __post_init__(self) -> None:
        if self.target is None:
            object.__setattr__(self, "target", tiny_target())


def successor() -> np.ndarray:
    """int32[V]: what follows each token as a rule, one cycle through all tokens: t -> t + 13 mod 32."""
    return ((np.arange(VOCAB) + 13) % VOCAB).astype(np.int32)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # removed when the process ends


@functools.cache
def basis() -> np.ndarray:
    """Orthogonal: row t stands for token t."""
    return np.asarray(jax.jit(lambda seed: jax.random.orthogonal(jax.random.key(seed), WIDTH))(2))


@functools.cache
def tiny_target() -> TinyTarget:
    """A decoder of two layers made by hand: its head reads the token that it was given from an orthogonal
    embedding and names the successor; its layers are random and disturb that now and then, so that greedy
    output is mostly, and not always, predictable from the last token."""
    config = of(
        DecoderLM,
        blocks=(
            of(
                Block,
                attention=of(Attention, num_heads=2, head_dim=8, rotary=of(Rotary)),
                mlp=of(GatedMLP, hidden_dim=24),
            ),
        ),
        num_layers=2,
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=CONTEXT,
        tied_head=False,
    )
    model = build(config)
    params = drawn(model, np.zeros((1, 1), np.int32), seed=1)
    head = np.zeros((WIDTH, VOCAB), np.float32)
    head[:, successor()] = np.float32(1.3) * basis().T
    params["embedding"] = {"table": jnp.asarray(5 * basis())}  # the layers add vectors of length 2 to 3
    params["head"] = {"kernel": jnp.asarray(head)}
    directory = str(Path(_folder().name) / "target")
    save_model(directory, config, params)
    return TinyTarget(model, params, directory)


@dataclasses.dataclass(frozen=True)
class Walks:
    """Language batches like the target's text: successors, and one time in eight any token."""

    length: int = 24
    size: int = 1024

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in self.rows(np.arange(1)).items()}

    def __len__(self) -> int:
        return self.size

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        text = np.empty((len(numbers), self.length + 1), np.int32)
        for row, number in enumerate(numbers):
            random = np.random.default_rng([11, int(number)])
            anew = np.where(
                random.random(self.length + 1) < 1 / 8, random.integers(0, VOCAB, self.length + 1), -1
            )
            text[row, 0] = number % VOCAB
            for t in range(1, self.length + 1):
                text[row, t] = anew[t] if anew[t] >= 0 else successor()[text[row, t - 1]]
        shape = (len(numbers), self.length)
        return {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segments": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(self.length, dtype=np.int32), shape),
            "target_bytes": np.ones(shape, np.int32),
            "weights": np.ones(shape, np.float32),
        }

    def batches(self, start: int, batch_size: int, *, rows=None, epochs=None):
        while True:
            yield self.rows(np.arange(start, start + batch_size) % self.size)
            start += batch_size


def trained(
    drafter: Any, steps: int = 60, peak: float = 1e-2, trainable: tuple[str, ...] = ("^drafter/",)
) -> Trained:
    """A short training run of `drafter` against the tiny target."""
    task = DrafterTraining(drafter, tiny_target().directory)
    stage = Stage("drafter", steps, 16, adamw(constant(peak)), trainable=trainable)
    trainer = Trainer(task, Walks(), (stage,))
    state, metrics = trainer.train(progress=False, devices=jax.devices()[:1])
    return Trained(task.start(init_key(trainer.seed)), state.params, metrics["train/loss"])


def trained_member(drafter: Any, **fields: Any) -> Member:
    """The member of a drafter after the default training."""
    run = trained(drafter)
    return Member(drafter, run.after["drafter"], run=run, **fields)


def walk(start: int, length: int) -> tuple[int, ...]:
    """Successors from `start` on."""
    found = [start]
    while len(found) < length:
        found.append(int(successor()[found[-1]]))
    return tuple(found)


# Text that begins again: what is looked up is in the prompt.
REPEATING = tuple((*walk(start, length), start) for start, length in ((5, 12), (30, 8), (17, 15)))


# Two guesses of the first head, two below the better of them, one more below each of those.
BUSHY = RankTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 1, 0)))


def small_draft() -> DecoderLM:
    """A draft model for the tiny target: one layer of half its width."""
    block = Block(Attention(num_heads=2, head_dim=8, rotary=Rotary()), GatedMLP(24))
    return DecoderLM(blocks=(block,), num_layers=1, vocab_size=VOCAB, width=16, max_length=CONTEXT)


def submodel() -> Member:
    target, drafter = tiny_target(), Submodel(divisor=4, gamma=3)
    cut = drafter.create(jax.random.key(0), Target(target.params, target.model))
    return Member(drafter, cut, deterministic=False)


def adaptive() -> Member:
    """The draft of `draft_model`, with a head that was trained beside another."""
    drafter = SpecDecPP(small_draft(), longest=4, blocks=1)
    run = trained(drafter)
    params = {"draft": member("draft_model").params, "head": run.after["drafter"]["head"]}
    return Member(drafter, params, deterministic=False, run=run)


def lexical_units() -> Member:
    """Checked, with the model that was tuned to say whole units."""
    drafter = LUD(length=4, alpha=0.5, beta=0.3, checked=True)
    params = trained(drafter).after["drafter"]
    tuned = dataclasses.replace(tiny_target(), params=params["model"])
    return Member(drafter, {"placeholder": params["placeholder"]}, target=tuned)


def prompted() -> Member:
    """A model that answers to placeholders answers to prompts: LUD's, and its placeholder three times."""
    found = member("lud")
    accuracy = [[0.6, 0.1, 0.05], [0.5, 0.1, 0.05], [0.4, 0.1, 0.05]]
    drafter = PPD(prompts=3, top=3, trees=search_trees(accuracy, 20).trees)
    prompts = np.tile(found.params["placeholder"], (3, 1, 1))
    return Member(drafter, {"prompts": jnp.asarray(prompts)}, target=found.target)


def jacobi() -> Member:
    """SJD on a target whose head names the token it was given and whose layers speak up against it: tokens repeat
    for a while. Where each token is a function of the last one, Jacobi decoding can gain nothing."""
    tiny = tiny_target()
    params = {
        name: jax.tree.map(lambda x: np.float32(1.08) * np.asarray(x), value)
        if name.startswith("layer")
        else value
        for name, value in tiny.params.items()
    }
    params |= {"embedding": {"table": basis()}, "head": {"kernel": basis().T}}
    target = TinyTarget(tiny.model, jax.tree.map(jnp.asarray, params), tiny.directory)
    drafter = SJD(codes=VOCAB, rows=CONTEXT, columns=5, window=4, init_rule="repeat_horizontal")
    prompts = ((18, 29, 31), *map(tuple, PROMPTS[1:]))  # the first brings new tokens inside accepted paths
    return Member(drafter, deterministic=False, target=target, prompts=prompts)


def adaptive_trigrams() -> Member:
    """ADED with the trigrams of the walks that drafters are trained on."""
    table = count_trigrams([Walks().rows(np.arange(64))], VOCAB, successors=3)
    return Member(ADED(iterations=12, paths=3, nodes=8, successors=3), table)


MEMBERS: dict[str, Callable[[], Member]] = {
    "prompt_lookup": lambda: Member(PromptLookup(num_tokens=4), prompts=REPEATING),
    "aded": adaptive_trigrams,
    "iad": lambda: Member(IAD(window=4), prompts=REPEATING),
    "medusa": lambda: trained_member(Medusa(BUSHY, num_heads=3)),
    "hydra": lambda: trained_member(Hydra(BUSHY, num_heads=3)),
    "hydra_pp": lambda: trained_member(
        Hydra(BUSHY, num_heads=3, num_layers=2, dropout=0.1, prefix_layer=True, teacher="target")
    ),
    "clover": lambda: trained_member(Clover(depth=3, layers=1, num_heads=2)),
    "eagle": lambda: trained_member(Eagle(ConfidenceTree(depth=3, width=3, budget=6))),
    "eagle_static": lambda: Member(Eagle(BUSHY), member("eagle").params, run=member("eagle").run),
    "draft_model": lambda: trained_member(DraftModel(small_draft(), gamma=3), deterministic=False),
    "submodel": submodel,
    "specdec_pp": adaptive,
    "pearl": lambda: Member(Pearl(small_draft(), gamma=3), member("draft_model").params, deterministic=False),
    "hidden_transfer": lambda: trained_member(HiddenTransfer((1, 1, 2), BUSHY.paths)),
    "lud": lexical_units,
    "ppd": prompted,
    "sjd": jacobi,
}


@functools.cache
def member(name: str) -> Member:
    return MEMBERS[name]()
