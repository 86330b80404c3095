"""Trains what a config describes, or goes on with a run that was stopped.

    python -m experiments.train --config=configs/matlm.py:tiny --workdir=runs/matlm
    python -m experiments.train --config=configs/matlm.py:tiny --workdir=runs/a --config.stages.0.steps=200
    python -m experiments.train --config=runs/matlm/config.json --workdir=runs/matlm --baseline=runs/alone

The workdir keeps the config, the checkpoints, `metrics.jsonl`, TensorBoard files and, at the end, figures; with
--baseline they show finished runs of other models beside this one. The same command again continues from the last
checkpoint to the same bits; SIGTERM saves first. Without a workdir nothing is kept. A run that stops because its loss
is NaN or exploded says at which step and on which records.

On a TPU pod, in SLURM and in a Kubernetes job the same command on every host is one run (docs/scale.md); elsewhere
three flags make it one, and here is one run of two processes on one machine:

    for i in 0 1; do python -m experiments.train --config=configs/matlm.py:tiny --workdir=runs/two \\
        --coordinator=localhost:9876 --num_processes=2 --process_id=$i & done; wait
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from pathlib import Path

    from ml_collections import ConfigDict

    from research.training.loop import Trainer

PROGRAM = cli.Program(__doc__)
CONFIG = PROGRAM.config_flag()
WORKDIR = PROGRAM.workdir_flag("Where the run is kept, and continued from if it is there already.")
QUIET = PROGRAM.define(flags.DEFINE_boolean, "quiet", False, "No progress, only the final table.")
COORDINATOR = PROGRAM.define(
    flags.DEFINE_string,
    "coordinator",
    None,
    "One of several processes of a run, where no cluster says so: host:port of process 0.",
)
NUM_PROCESSES = PROGRAM.define(
    flags.DEFINE_integer, "num_processes", None, "How many there are.", lower_bound=1
)
PROCESS_ID = PROGRAM.define(flags.DEFINE_integer, "process_id", None, "Which one this is, from 0 on.")
PATIENCE = PROGRAM.define(
    flags.DEFINE_integer,
    "patience",
    30,
    "Seconds without a sign of life after which a process of the run counts as lost, which ends the others.",
    lower_bound=2,
)
PROFILE = PROGRAM.define(
    flags.DEFINE_string,
    "profile",
    None,
    "Trace FIRST_STEP:STEPS into the workdir's profile/, for Perfetto (ui.perfetto.dev) and XProf.",
)
FIGURES = PROGRAM.define(flags.DEFINE_boolean, "figures", True, "Draw the loss curves at the end.")
BASELINE = PROGRAM.define(
    cli.paths,
    "baseline",
    [],
    "The workdir of a finished run of a model trained alone, drawn into the figure of loss against parameters. "
    "Repeatable.",
)
EXPORT = PROGRAM.define(
    flags.DEFINE_enum,
    "export",
    None,
    "Train only what `experiments.convert` can write in this format: another model is refused, with the reason, before "
    "anything is trained.",
    ["huggingface"],
)


def main(arguments: list[str]) -> None:
    from research.training import hosts

    config = CONFIG.load()
    hosts.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, PATIENCE.value)
    with hosts.ending_together(PATIENCE.value):
        train(config)


def train(config: "ConfigDict") -> None:
    """Builds the experiment, runs it, and shows what came out."""
    import jax

    from research.config import build
    from research.errors import UserError
    from research.training.loop import Trainer
    from research.training.profiling import parse_profile

    profile = None if PROFILE.value is None else parse_profile(PROFILE.value)
    trainer = build(config)
    if not isinstance(trainer, Trainer):
        raise UserError(
            f"{CONFIG.value}: it builds a {type(trainer).__name__}, not a Trainer, so it trains nothing"
        )
    if EXPORT.value is not None:
        check_export(config)
    baselines = read_baselines(trainer)
    if WORKDIR.value is None:
        prepare(trainer)
        metrics = trainer.run(progress=not QUIET.value, profile=profile)
        if jax.process_index() == 0:
            show(metrics)
        return
    from research.training.workdir import open_workdir

    with open_workdir(WORKDIR.value, config, tokenizer_path=tokenizer_path(config, trainer.data)) as workdir:
        prepare(trainer)
        metrics = trainer.run(workdir, progress=not QUIET.value, profile=profile)
        if jax.process_index() != 0:
            return
        show(metrics)
        print(f"run: {workdir.path}")
        if hasattr(trainer.task, "recall"):
            print(f"merge it: python -m experiments.adapter --adapter={WORKDIR.value} --merge=FOLDER")
        if hasattr(trainer.task, "drafter"):
            print(f"use it: python -m experiments.generate --drafter={WORKDIR.value} --prompt='def '")
        if FIGURES.value:
            from research.training.figures import draw_figures

            drawn = draw_figures(workdir.path, baselines)
            drawing = [evaluator for evaluator in trainer.evaluators if hasattr(evaluator, "draw")]
            if drawing:
                from research.training.workdir import load_model

                loaded = load_model(workdir.path, ema=trainer.ema is not None)
                for evaluator in drawing:
                    drawn += evaluator.draw(loaded.model, loaded.params, workdir.path / "figures")
            for path in drawn:
                print(f"figure: {path}")


def check_export(config: "ConfigDict") -> None:
    """Raises UserError where transformers has no family that computes what the model of an experiment does."""
    from research.config import build
    from research.interop.export import expressible
    from research.training.workdir import find_task

    path, task = find_task(config)
    expressible(build(task, path).model)


def read_baselines(trainer: "Trainer") -> dict[str, tuple[int, float]]:
    """{workdir: (parameters, loss)} of the baselines, by the experiment's first evaluator."""
    from research.errors import UserError
    from research.training.figures import read_baseline

    if BASELINE.value and (WORKDIR.value is None or not FIGURES.value or not trainer.evaluators):
        raise UserError("--baseline is drawn into a figure: it needs a --workdir, figures and an evaluator")
    return {path: read_baseline(path, trainer.evaluators[0].name) for path in BASELINE.value}


def prepare(trainer: "Trainer") -> None:
    """Prepares the training data aloud; the loop would do it in silence."""
    import jax

    if hasattr(trainer.data, "prepare") and not QUIET.value and jax.process_index() == 0:
        from research.training.progress import data_progress

        trainer.data.prepare(data_progress)


def tokenizer_path(config: "ConfigDict", data: object) -> "Path | None":
    """The tokenizer.json of the experiment's text, `None` where it reads none."""
    if not hasattr(data, "tokenizer"):
        return None
    from research.data.tokenizer import SHIPPED
    from research.paths import expand

    given = getattr(data, "tokenizer_file", config.data.get("tokenizer"))
    path = SHIPPED if given is None else expand(given)
    return path / "tokenizer.json" if path.is_dir() else path


def show(metrics: dict[str, float]) -> None:
    """Prints the last training loss and a table with a row for every model that was measured."""
    from experiments.evaluate import print_table

    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        model, _, metric = name.rpartition("/")
        if model != "train":
            rows.setdefault(model, {})[metric] = value
    print(f"last training loss: {metrics['train/loss']:.5g}")
    if rows:
        print_table(rows)


if __name__ == "__main__":
    PROGRAM.run(main)
