"""Runs tasks of EleutherAI's lm-evaluation-harness on a model of the project.

    python -m experiments.lm_eval --tasks=lambada_openai,hellaswag --limit=200
    python -m experiments.lm_eval --workdir=runs/matlm --widths=M --tasks=arc_easy --num_fewshot=5
    python -m experiments.lm_eval --hf=Qwen3-0.6B --tasks=gsm8k --dtype=bfloat16 --output=gsm8k.json
    python -m experiments.lm_eval --include_path=my_tasks --tasks=my_task

Needs the package lm_eval (pip install 'lm_eval>=0.4.13'). The tasks and their prompts, few-shot examples,
filters and measures are the harness's own; docs/lm_eval.md says how a task with local data is written. Most
tasks fetch their data from the Hugging Face Hub on first use; with HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1
nothing goes over the network, and a task whose data is not here says so.

Without --workdir and --hf it evaluates the model that ships. The table goes to standard output, and with
--output all results, with the tasks' configs and versions, as JSON.
"""

import math
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli
from research.paths import expand

if TYPE_CHECKING:
    from pathlib import Path

    from lm_eval.tasks import TaskManager

    from research.interop.lm_eval import HarnessModel

PROGRAM = cli.Program(__doc__)
TASKS = PROGRAM.define(
    flags.DEFINE_list, "tasks", None, "Tasks, groups, tags or YAML files; * matches names.", required=True
)
WORKDIR = PROGRAM.workdir_flag("A run or a model directory; the model that ships by default.")
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(flags.DEFINE_boolean, "ema", False, "Take the run's moving average of the parameters.")
HF = PROGRAM.define(flags.DEFINE_string, "hf", None, "A directory that Hugging Face transformers wrote.")
WIDTHS = PROGRAM.define(
    flags.DEFINE_string,
    "widths",
    None,
    "A submodel of a nested model: S, M, L, XL, or one width or name a layer (S,S,L,XL; - skips the layer). "
    "The granularities are those of its config; a model directory has them where it holds experiment.json.",
)
INCLUDE = PROGRAM.define(flags.DEFINE_string, "include_path", None, "A folder with task YAML files of yours.")
LIMIT = PROGRAM.define(
    flags.DEFINE_float, "limit", None, "Documents of each task: a number, or a fraction below 1."
)
FEWSHOT = PROGRAM.define(
    flags.DEFINE_integer,
    "num_fewshot",
    None,
    "Examples in the prompt; as the task says by default.",
    lower_bound=0,
)
BATCH_SIZE = PROGRAM.define(flags.DEFINE_integer, "batch_size", 8, "Sequences at a time.", lower_bound=1)
DTYPE = PROGRAM.define(
    flags.DEFINE_enum, "dtype", "float32", "Precision of parameters and cache.", ["float32", "bfloat16"]
)
OUTPUT = PROGRAM.define(flags.DEFINE_string, "output", None, "A JSON file for all results.")
UNSAFE = PROGRAM.define(
    flags.DEFINE_boolean,
    "confirm_run_unsafe_code",
    False,
    "Allow tasks such as humaneval, which run the code that the model writes, on this machine.",
)


def main(arguments: list[str]) -> None:
    limit = checked_limit(LIMIT.value)
    output = None if OUTPUT.value is None else expand(OUTPUT.value)
    if output is not None:
        check_output(output)

    import research.interop.lm_eval  # noqa: F401 (first: it tells when the harness is not installed)

    manager = task_manager(INCLUDE.value, TASKS.value)
    run(manager, find_tasks(manager, TASKS.value), load(), limit, output)


def run(
    manager: "TaskManager",
    tasks: list[str],
    model: "HarnessModel",
    limit: float | int | None,
    output: "Path | None",
) -> None:
    """Evaluates, prints the table and writes the results."""
    import json
    import sys

    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    # PyTorch, where it is installed, computes nothing here and needs no seed.
    results = simple_evaluate(
        model,
        tasks=tasks,
        num_fewshot=FEWSHOT.value,
        batch_size=BATCH_SIZE.value,
        limit=limit,
        log_samples=False,
        torch_random_seed=None,
        task_manager=manager,
        confirm_run_unsafe_code=UNSAFE.value,
    )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if output is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
        print(f"results: {output}", file=sys.stderr)


def load() -> "HarnessModel":
    """The model that the flags name."""
    import sys

    import jax

    from research.errors import UserError
    from research.interop.lm_eval import HarnessModel, adds_bos
    from research.language import BASE
    from research.training.workdir import load_model

    options = {"batch_size": BATCH_SIZE.value, "dtype": DTYPE.value}
    if HF.value is not None:
        from research.interop import huggingface

        for flag in (WORKDIR, STEP, WIDTHS):
            if flag.value is not None:
                raise UserError(f"--{flag.name} does not go with --hf")
        if EMA.value:
            raise UserError("--ema does not go with --hf")
        model, variables, tokenizer = huggingface.load(HF.value, dtype=DTYPE.value)
        if tokenizer is None:
            raise UserError(f"{HF.value} has no tokenizer.json, so its model can't read the tasks")
        return HarnessModel(
            model, variables["params"], tokenizer, bos=adds_bos(tokenizer), name=HF.value, **options
        )
    path = WORKDIR.value or BASE
    name = str(path)
    if WIDTHS.value is None:
        loaded = load_model(path, STEP.value, EMA.value)
    else:
        from research.elastic.loading import load_submodel

        loaded, spec = load_submodel(path, WIDTHS.value, STEP.value, EMA.value)
        name = f"{path} cut to {WIDTHS.value}"
        layers = ", ".join(
            f"{layer}: {width}" for layer, width in zip(spec.keep_layers, spec.widths, strict=True)
        )
        print(f"submodel of {path} with FFN widths by layer {layers}", file=sys.stderr)
    model, params = loaded.model, loaded.params
    params = jax.tree.map(lambda leaf: leaf.astype(DTYPE.value), params)
    return HarnessModel(model, params, loaded.tokenizer, name=name, **options)


def checked_limit(limit: float | None) -> float | int | None:
    """The harness's form of --limit. Raises UserError if it is neither a count nor a fraction."""
    from research.errors import UserError

    if limit is None or 0 < limit < 1:
        return limit
    if not 1 <= limit < math.inf or limit != int(limit):
        raise UserError(f"--limit={limit:g}: a whole number of documents, or a fraction between 0 and 1")
    return int(limit)


def check_output(path: "Path") -> None:
    """Raises UserError if `path` can't become a file; better now than after hours of evaluation."""
    from research.errors import UserError

    if path.is_dir():
        raise UserError(f"--output={path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: there is no folder {path.parent}")


def task_manager(include: str | None, wanted: list[str]) -> "TaskManager":
    """The harness's index of tasks, with the folder `include`; what fails while loading is a UserError."""

    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from research.errors import UserError

    class Manager(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                loaded = super().load(task_list)
            # Bad data, a bad YAML file, or no network: libraries below raise what they like.
            except Exception as error:
                raise UserError(f"tasks {', '.join(task_list)} cannot be loaded: {error}") from error
            for name, task in loaded["tasks"].items():
                check_task(name, task)
            return loaded

    if include is None:
        return Manager()
    folder = expand(include)
    if not folder.is_dir():
        raise UserError(f"--include_path={include} is not a folder")
    for file in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(file, resolve_func=False, recursive=True)
        except Exception as error:  # whatever the YAML library raises; the harness would skip the file
            raise UserError(f"{file} is not a task: {error}") from error
    own = Manager(include_path=str(folder), include_defaults=False)
    # Indexing the harness's thousands of tasks takes seconds.
    if all(name in own.task_index for name in wanted):
        return own
    return Manager(include_path=str(folder))


def check_task(name: str, task: Any) -> None:
    """Raises UserError for a task that this model or these flags can't run."""
    from research.errors import UserError

    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} shows images or sound, and this model reads text only")
    if getattr(task, "UNSAFE_CODE", False) and not UNSAFE.value:
        raise UserError(
            f"task {name} runs code that the model writes: allow it with --confirm_run_unsafe_code"
        )
    if FEWSHOT.value and task.get_config("num_fewshot") == 0:
        raise UserError(
            f"--num_fewshot={FEWSHOT.value}: task {name} is defined without examples (num_fewshot: 0)"
        )


def find_tasks(manager: "TaskManager", wanted: list[str]) -> list[str]:
    """Names and YAML files that the harness can load. Raises UserError for an unknown one."""
    from pathlib import Path

    from research.errors import UserError, nearest

    names = []
    for word in wanted:
        matches = manager.match_tasks([word])
        if not matches and not (word.endswith(".yaml") and Path(word).is_file()):
            close = nearest(word, manager.all_tasks)
            hint = f"did you mean {close}?" if close else "lm_eval ls tasks lists the harness's own"
            raise UserError(f"unknown task {word}; {hint}")
        names += matches or [word]
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    PROGRAM.run(main)
