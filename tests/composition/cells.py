"""What a cell of docs/composition.md is, and what the cells share: tiny models, a step of training, drafters."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.generator import Generator
from research.decoding.prepare import prepare
from research.decoding.proposers import Target
from research.decoding.speculative.aded import ADED, count_trigrams
from research.decoding.speculative.eagle import ConfidenceTree, Eagle
from research.decoding.speculative.hidden_transfer import HiddenTransfer
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.trees import RankTree
from research.elastic.matformer import MatFormer, extract, parse_widths
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Causal
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.nn.weights import LowRank
from research.training.optimizers import constant, sgd
from research.training.partitioning import batch_sharding, make_mesh, parameter_shardings
from research.training.stages import Stage
from research.training.state import initial_state
from research.training.step import make_step
from research.training.task import LanguageModelling
from tests.programs import drawn, drawn_like, scaled

PAGE = Path(__file__).resolve().parents[2] / "docs" / "composition.md"
VOCAB, WIDTH, HIDDEN, LENGTH, ROWS = 32, 8, 16, 6, 8
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the page. `check` is given an empty directory; `because` is part of the error it must raise."""

    system: str
    part: str
    how: str
    because: str | None
    check: Callable[[Path], None]


CELLS: list[Cell] = []


def runs(system: str, part: str, how: str) -> Callable:
    """`system` with `part` works; `how` says what exactly is checked."""

    def add(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CELLS.append(Cell(system, part, how, None, check))
        return check

    return add


def refused(system: str, part: str, because: str) -> Callable:
    """`system` with `part` is a UserError that says `because`."""

    def add(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CELLS.append(Cell(system, part, "", because, check))
        return check

    return add


def page() -> str:
    """docs/composition.md."""
    lines = [
        "# What works with what",
        "",
        "Written from tests/composition/, where every line below is a test.",
        "",
        "| System | With | |",
        "| --- | --- | --- |",
    ]
    for cell in CELLS:
        result = f"runs: {cell.how}" if cell.because is None else f"refused, because {cell.because}"
        lines.append(f"| {cell.system} | {cell.part} | {result} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Writes the page; run it after a change of the cells."""
    PAGE.write_text(page(), encoding="utf-8")


def decoder(
    rules=(Causal(),),  # noqa: B008
    *,
    num_layers=None,
    norm=RMSNorm(),  # noqa: B008
    post_norms=False,
    attention=None,
    **fields,
):
    """One layer a block by default: most of a cell's time is compilation."""
    layer = dict(num_heads=2, head_dim=4, rotary=Rotary(), **(attention or {}))
    blocks = tuple(Block(Attention(**layer, rule=r), GatedMLP(HIDDEN), norm, post_norms) for r in rules)
    sizes = dict(vocab_size=VOCAB, width=WIDTH, max_length=32, blocks=blocks)
    sizes |= fields
    return DecoderLM(num_layers=num_layers or len(sizes["blocks"]), **sizes)


def make_batch() -> dict[str, jax.Array]:
    text = jax.random.randint(jax.random.key(1), (ROWS, LENGTH + 1), 0, VOCAB)
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segments": jnp.ones((ROWS, LENGTH), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
        "target_bytes": jnp.ones((ROWS, LENGTH), jnp.int32),
        "weights": jnp.ones((ROWS, LENGTH)).at[0, 3:].set(0.0),
    }


@functools.lru_cache(maxsize=4)
def init(model):
    return drawn(model, jnp.zeros((1, 2), jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply({"params": params}, make_batch()["tokens"])


def train(task, params, steps=1, *, mesh=None, ema=None, **stage):
    """State after, and metrics of `steps` steps of gradient descent, whose updates are proportional to the gradient,
    so that rounding stays rounding."""
    stage = Stage("main", steps=steps, batch_size=ROWS, optimizer=sgd(constant(0.05)), **stage)
    batch = make_batch()
    if mesh is None:
        mesh = make_mesh({}, jax.devices()[:1])
    else:
        params = jax.device_put(params, parameter_shardings(params, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    rule = stage.optimizer.transformation(steps, params, "stage")
    options = dict(first_step=0, clip=1.0, ema=ema)
    step = jax.jit(make_step(task, stage, rule, stage.mask(params), mesh, **options))
    state = initial_state(params, rule.init(params), 0, ema=ema is not None)
    rows = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        rows.append(metrics)
    return state, rows


def mean(metrics):
    return float(metrics["loss"][0] / metrics["loss"][1])


def close(a, b, rtol=1e-5, atol=1e-6):
    """Float32 rounding of sums of at most 50 terms of order 1."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


NESTED = (
    "three joint steps lower the loss; the smallest model gives units beyond it no gradient and, extracted, has "
    "the same logits"
)


def nested(model, params=None, task=LanguageModelling):
    """What `NESTED` says."""
    mat = MatFormer(task(model), divisors=(8, 1))
    params = init(model) if params is None else params
    _, rows = train(mat, params, 3)
    assert mean(rows[2]) < mean(rows[0])
    small = jax.jit(jax.grad(lambda p: mat.task.loss(mat.granularity(p, 0), make_batch(), KEY)["loss"][0]))(
        params
    )
    for name, layer in small.items():
        if name.startswith("layer"):
            for mlp in [layer["mlp"]] if "mlp" in layer else [part["mlp"] for part in layer.values()]:
                mlp = mlp.get("experts", mlp)
                up, down = materialize_up(mlp["up"]["kernel"]), mlp["down"]["kernel"]
                assert (up[..., HIDDEN // 8 :] == 0).all() and (up[..., : HIDDEN // 8] != 0).any()
                assert isinstance(down, LowRank) or (down[..., HIDDEN // 8 :, :] == 0).all()
    cut_model, cut = extract(model, params, parse_widths("1/8", mat))
    np.testing.assert_array_equal(logits(cut_model, cut), logits(model, mat.granularity(params, 0)))
    return cut_model, cut


def materialize_up(kernel):
    """The columns of a gradient with respect to an up kernel: of a low-rank one those of its second factor."""
    return kernel.up if isinstance(kernel, LowRank) else kernel


# MatFormer


# Drafters whose ways into the target differ: heads on its output, rows between its layers, a layer with a cache of its
# own, a search in the text. Parameters are drawn: exactness does not depend on good guesses.
TREE = RankTree(((0,), (1,), (0, 0), (0, 1)))
DRAFTERS = {
    "Medusa": Medusa(TREE, num_heads=2),
    "Hidden Transfer": HiddenTransfer((1, 1), TREE.paths),
    "EAGLE-2": Eagle(ConfidenceTree(depth=2, width=2, budget=4)),
    "ADED": ADED(iterations=8, paths=2, nodes=4, successors=2),
}


def drafted_as_plain(name: str, model, params, **options) -> None:
    """The drafter's output is that of plain decoding, for prompts of unequal lengths."""
    drafter, target = DRAFTERS[name], Target(*reversed(prepare(model, params)))
    own = drawn_like(lambda: drafter.create(KEY, target)) if name != "ADED" else text_table()
    drafted = Generator(model, params, proposer=drafter, proposer_params=own)
    options = dict(max_new_tokens=20) | options
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]
    expected = Generator(model, params).generate(prompts, **options)
    assert drafted.generate(prompts, **options).samples == expected.samples


def text_table():
    text = np.arange(64, dtype=np.int32)[None] * 5 % VOCAB
    return count_trigrams([{"tokens": text, "segments": np.ones_like(text)}], VOCAB, successors=2)


def louder(params):
    """Larger kernels, so that greedy output is not one token for ever."""
    return scaled(params, 3.0)
