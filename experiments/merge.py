r"""Merges fine-tuned models of one base, each difference from it sparsified by DARE first.

    python -m experiments.merge --models=runs/sums,runs/code --method=task --scale=0.7 --output=runs/both
    python -m experiments.merge --models=runs/sums,runs/code --method=ties --drop=0.9 --output=runs/both \
        --data=arithmetic,builtin
    python -m experiments.merge --models=runs/sums --drop=0.9 --output=runs/sparse

configs/dare.py says how these two are trained. The result is a model directory that every program takes like any
other; evaluate also needs --like=RUN, as it does not say what it was trained on. --base is the model that all were
fine-tuned from, by default the one that ships. With one model, --method=average gives that model with a share of its
difference dropped. --data names a source of text for every model, in their order (docs/data.md): a table then says
what the base, every model and the merged one lose on their validation splits, and fisher and regmean, which need it,
observe the training splits. Choose --drop and --scale by that table, not by a test split.
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from research.training.model_directory import Loaded

PROGRAM = cli.Program(__doc__)
BASE = PROGRAM.define(
    flags.DEFINE_string, "base", None, "What all were fine-tuned from; the model that ships by default."
)
MODELS = PROGRAM.define(
    flags.DEFINE_list, "models", None, "Runs or model directories, with commas between.", required=True
)
METHOD = PROGRAM.define(
    flags.DEFINE_enum,
    "method",
    "average",
    "How differences are merged.",
    ["average", "task", "ties", "fisher", "regmean"],
)
DROP = PROGRAM.define(flags.DEFINE_float, "drop", 0.0, "Share of every difference that is dropped first.")
HOW = PROGRAM.define(
    flags.DEFINE_enum,
    "drop_how",
    "random",
    "random is DARE; random_unscaled does not make up for it; magnitude drops the smallest.",
    ["random", "random_unscaled", "magnitude"],
)
SCALE = PROGRAM.define(flags.DEFINE_float, "scale", 1.0, "Factor of the merged difference, of task and ties.")
TRIM = PROGRAM.define(flags.DEFINE_float, "trim", 0.8, "Share that ties trims from every model.")
EXCLUDE = PROGRAM.define(
    flags.DEFINE_multi_string, "exclude", [], "Parameters that stay the base's, by a pattern. Repeatable."
)
SEED = PROGRAM.define(flags.DEFINE_integer, "seed", 0, "Of what is dropped.")
DATA = PROGRAM.define(flags.DEFINE_list, "data", [], "A source of text for each model, with commas between.")
ROWS = PROGRAM.define(
    flags.DEFINE_integer,
    "rows",
    64,
    "Rows of 256 tokens of each source that are measured, or observed.",
    lower_bound=8,
)
OUTPUT = PROGRAM.define(flags.DEFINE_string, "output", None, "The new model directory.", required=True)
LENGTH, BATCH = 256, 8


def main(arguments: list[str]) -> None:
    import jax

    from research.compression import merging
    from research.errors import UserError
    from research.language import BASE as SHIPPED
    from research.training.model_directory import save_model
    from research.training.workdir import load_model

    if DATA.value and len(DATA.value) != len(MODELS.value):
        raise UserError(
            f"--data names {len(DATA.value)} sources for {len(MODELS.value)} models: one for each"
        )
    if METHOD.value in ("fisher", "regmean") and not DATA.value:
        raise UserError(f"--method={METHOD.value} observes each model on data of its own: give --data=...")
    if PROGRAM.values["scale"].present and METHOD.value not in ("task", "ties"):
        raise UserError(f"--scale has no effect with --method={METHOD.value}: it is for task and ties")
    base = load_model(BASE.value or SHIPPED)
    tuned = {path: load_model(path) for path in MODELS.value}
    if len(tuned) < len(MODELS.value):
        raise UserError(f"--models={','.join(MODELS.value)} names one twice")
    for path, loaded in tuned.items():
        check_alike(path, loaded, base)
    changes = [
        merging.difference(loaded.params, base.params, EXCLUDE.value, path) for path, loaded in tuned.items()
    ]
    keys = jax.random.split(jax.random.key(SEED.value), len(changes))
    changes = [
        merging.drop(change, DROP.value, key, HOW.value) for change, key in zip(changes, keys, strict=True)
    ]
    merged = merging.add(base.params, merge(changes, list(tuned.values())))
    start = BASE.value or "the model that ships"
    card = (
        f"# A merged model\n\nOf {', '.join(tuned)}, fine-tuned from {start}, by {METHOD.value}; "
        f"{DROP.value:.0%} of every difference dropped first ({HOW.value}, seed {SEED.value}).\n"
    )
    save_model(OUTPUT.value, base.config, merged, base.tokenizer, card=card, inputs=base.inputs)
    if DATA.value:
        models = {"base": base.params} | {path: loaded.params for path, loaded in tuned.items()}
        print_losses(base, models | {"merged": merged})
    print(f"{OUTPUT.value}: {len(tuned)} models merged by {METHOD.value}")


def check_alike(path: str, loaded: "Loaded", base: "Loaded") -> None:
    """Raises UserError unless the model is built and reads text as the base does."""
    import dataclasses

    from research.errors import UserError

    # How parameters lie in a tree says nothing of what is done with them.
    if loaded.model != base.model:
        names = [
            field.name for field in dataclasses.fields(base.model) if field.name not in ("parent", "name")
        ]
        differ = [name for name in names if getattr(loaded.model, name, None) != getattr(base.model, name)]
        raise UserError(f"{path} was not fine-tuned from the base: {', '.join(differ) or 'its kind'} differ")
    tokenizers = [None if x.tokenizer is None else x.tokenizer.fingerprint for x in (loaded, base)]
    if tokenizers[0] != tokenizers[1]:
        raise UserError(f"{path} has another tokenizer than the base")


def merge(changes: list[Any], models: "list[Loaded]") -> Any:
    """The merged difference."""
    from research.compression import merging

    if METHOD.value == "average":
        return merging.average(changes)
    if METHOD.value == "task":
        return merging.task_arithmetic(changes, SCALE.value)
    if METHOD.value == "ties":
        return merging.ties(changes, SCALE.value, TRIM.value)
    observed = [observe(loaded, source) for loaded, source in zip(models, DATA.value, strict=True)]
    return (
        merging.fisher(changes, observed) if METHOD.value == "fisher" else merging.regmean(changes, observed)
    )


def observe(loaded: "Loaded", source: str) -> dict[str, Any]:
    """A model's Fisher, or its Gram matrices, on the training split of its source."""
    from research.training.observe import collect_fisher, collect_grams

    collect = collect_fisher if METHOD.value == "fisher" else collect_grams
    return collect(loaded.model, loaded.params, batches(loaded, source, "train"))


def batches(loaded: "Loaded", source: str, split: str) -> list[dict[str, Any]]:
    import numpy as np

    from research.data.text import TokenDataset

    data = TokenDataset(source, split, LENGTH, loaded.tokenizer, shuffle=split == "train")
    rows = np.arange(min(ROWS.value, len(data)) // BATCH * BATCH)
    if not rows.size:
        from research.errors import UserError

        raise UserError(f"--data: {source} has {len(data)} rows of {split} text; at least {BATCH} are needed")
    return [data.take(numbers) for numbers in rows.reshape(-1, BATCH)]


def print_losses(base: "Loaded", models: dict[str, Any]) -> None:
    """Nats a token of every model on every source's validation split."""
    import jax

    from research.training.task import LanguageModelling

    evaluate = jax.jit(LanguageModelling(base.model).evaluate)
    held_out = {source: batches(base, source, "validation") for source in DATA.value}
    width = max(map(len, [*models, "model"]))
    print("nats per token".ljust(width), *(source[-24:].rjust(24) for source in held_out))
    for name, params in models.items():
        losses = []
        for rows in held_out.values():
            found = [evaluate(params, batch)["loss"] for batch in rows]
            losses.append(float(sum(total for total, _ in found) / sum(weight for _, weight in found)))
        print(name.ljust(width), *(f"{loss:24.4f}" for loss in losses))


if __name__ == "__main__":
    PROGRAM.run(main)
