"""The whole way in one command: train, evaluate, cut and decode a small nested language model.

    python -m experiments.demo --workdir=runs/demo

Trains the tiny MatLM on Python's standard library (about two minutes on two CPU cores), evaluates every granularity and
several Mix'n'Match models on held-out files, saves one submodel as a model of its own, decodes a prompt with the full
model and with the submodel, and leaves a report with figures in the workdir. Run again, it only does what is missing.
"""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from research.training.loop import Trainer
    from research.training.state import State

PROGRAM = cli.Program(__doc__)
WORKDIR = PROGRAM.workdir_flag("Where the run and its report are kept.", default="runs/demo")
CONFIG = PROGRAM.define(cli.path, "config", "configs/matlm.py:tiny", "A MatLM experiment.")
STEPS = PROGRAM.define(flags.DEFINE_integer, "steps", None, "Fewer updates than the config's.", lower_bound=1)
PROMPT = PROGRAM.define(
    flags.DEFINE_string, "prompt", "class Node:\n    def __init__(self, ", "What the models continue."
)
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of the report."""

    name: str
    parameters: int
    loss: float
    bits_per_byte: float
    accuracy: float


def main(arguments: list[str]) -> None:
    from experiments.evaluate import print_table
    from experiments.train import tokenizer_path
    from research.config import build, load_config
    from research.elastic.matformer import MatFormer
    from research.errors import UserError
    from research.training.figures import draw_figures
    from research.training.progress import data_progress
    from research.training.workdir import open_workdir

    start = time.perf_counter()
    config = load_config(CONFIG.value, [] if STEPS.value is None else [f"stages.0.steps={STEPS.value}"])
    trainer = build(config)
    if not isinstance(trainer.task, MatFormer):
        raise UserError(f"--config={CONFIG.value} trains no nested model; configs/matlm.py does")
    check(trainer)
    path = Path(WORKDIR.value)
    with open_workdir(path / "run", config, tokenizer_path=tokenizer_path(config, trainer.data)) as run:
        print("1. data and training")
        trainer.data.prepare(data_progress)
        state, _ = trainer.train(run)
        draw_figures(run.path)
    print("2. granularities and Mix'n'Match on held-out files")
    rows = evaluate(trainer, state)
    print_table({row.name: {k: v for k, v in dataclasses.asdict(row).items() if k != "name"} for row in rows})
    print("3. the submodel M as a model of its own, and a prompt decoded by both")
    texts = cut_and_decode(path)
    write_report(path, rows, texts)
    print(f"report: {path / 'README.md'} ({time.perf_counter() - start:.0f} s in all)")


def check(trainer: "Trainer") -> None:
    """Raises UserError for what would only be found out after training."""
    from research.errors import UserError

    if (count := len(trainer.evaluators)) != 1:
        raise UserError(f"--config={CONFIG.value} has {count} evaluators; the report is of exactly one")
    tokenizer = getattr(trainer.data, "tokenizer", None)
    if tokenizer is None:
        raise UserError(f"--config={CONFIG.value} reads no text; configs/matlm.py does")
    context = trainer.task.model.max_length
    length = len(tokenizer.encode(PROMPT.value, bos=tokenizer.bos_id is not None))
    if not 0 < length < context:
        raise UserError(f"--prompt has {length} tokens; from 1 to {context - 1} fit in the model's context")


def evaluate(trainer: "Trainer", state: "State") -> list[Row]:
    """Every granularity and the mixes between them, smallest first."""
    from research.elastic.matformer import Submodels, mix_n_match
    from research.elastic.slicing import ElasticSpec, mlp_widths, nested_widths
    from research.training.evaluators import Evaluation
    from research.training.partitioning import make_mesh

    task = trainer.task
    layers = task.model.num_layers
    widths = nested_widths(mlp_widths(task.model)[0], task.divisors)
    size = dict(zip(widths, task.names, strict=True))
    specs = {}
    for mix in mix_n_match(layers, widths):
        name = size[mix[0]] if len(set(mix)) == 1 else ",".join(size[width] for width in mix)
        specs[name] = ElasticSpec(tuple(range(layers)), mix)
    (evaluator,) = trainer.evaluators
    evaluation = Evaluation(Submodels(task, specs), make_mesh(trainer.mesh))
    params = state.params if state.ema is None else state.ema
    return [
        Row(name, found["parameters"], found["loss"], found["bits_per_byte"], found["accuracy"])
        for name, found in evaluation.run(evaluator, params).items()
    ]


def cut_and_decode(path: Path) -> dict[str, str]:
    """Saves M in `path`/M, and continues the prompt with the whole model and with M."""
    from research.decoding.generator import Generator
    from research.elastic.loading import load_submodel
    from research.training.model_directory import save_model
    from research.training.workdir import load_model

    submodel, _ = load_submodel(path / "run", "M")
    save_model(path / "M", submodel.config, submodel.params, submodel.tokenizer)
    texts = {}
    for name, place in (("XL", path / "run"), ("M", path / "M")):
        loaded = load_model(place)
        generator = Generator(loaded.model, loaded.params, loaded.tokenizer)
        result = generator.generate([PROMPT.value], max_new_tokens=NEW_TOKENS)
        texts[name] = PROMPT.value + result.samples[0].text
        print(f"--- {name}: {result.stats.tokens_per_second:.0f} tokens/s\n{texts[name]}")
    return texts


def write_report(path: Path, rows: list[Row], texts: dict[str, str]) -> None:
    """README.md with the table, the figures and the decoded text."""
    draw_trade_off(path / "trade_off.png", rows)
    lines = [
        "# One training run, many models",
        "",
        "A MatLM: inside every FFN the first units form a smaller FFN, so one parameter tree holds all these models.",
        "Those with commas mix widths over the layers and were never trained.",
        "",
        "![held-out loss against parameters](trade_off.png)",
        "",
        "| model | parameters | loss (nats per token) | bits per byte | accuracy |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {r.name} | {r.parameters:,} | {r.loss:.3f} | {r.bits_per_byte:.3f} | {r.accuracy:.3f} |"
            for r in rows
        ),
        "",
        "![loss while training](run/figures/loss.png)",
        "",
        "`M/` is the submodel M as a model of its own: `python -m experiments.generate --workdir="
        + str(path / "M")
        + "`.",
        "",
        *(f"Greedy decoding with {name}:\n\n```python\n{text}\n```\n" for name, text in texts.items()),
    ]
    (path / "README.md").write_text("\n".join(lines), encoding="utf-8")


def draw_trade_off(path: Path, rows: list[Row]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes, losses = [row.parameters / 1e6 for row in rows], [row.loss for row in rows]
    axes.plot(sizes, losses, "o-", ms=4, alpha=0.6, label="Mix'n'Match (never trained)")
    trained = [row for row in rows if "," not in row.name]
    axes.plot([r.parameters / 1e6 for r in trained], [r.loss for r in trained], "s", label="granularities")
    for row in trained:
        axes.annotate(row.name, (row.parameters / 1e6, row.loss), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="million parameters", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    PROGRAM.run(main)
