"""All drafters on the same target: how many tokens a call gives, how much time that saves, what was equal.

Every prompt is decoded alone, greedy, in float32 by default, in turns with plain decoding, as Spec-Bench does
(arXiv 2401.07851). "tokens a call" counts the target's own token, so plain decoding has 1. The prompts are the three
kinds of `experiments.claims.drafting`, and those of a JSONL file, by their category. Afterwards each drafter decodes
more than a hundred held-out prompts in batches of unequal lengths, and every token is compared with plain decoding.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.shapes import find_shape
from experiments.claims import drafting
from experiments.systems import read_catalogue
from research import config as configs
from research.config_capture import capture
from research.decoding.generator import Generator
from research.decoding.sampling import argmax
from research.decoding.speculative.loading import find_drafter
from research.decoding.speculative.training import DrafterTraining
from research.decoding.verify import Accept, Draft
from research.errors import UserError
from research.language.grow import deepen, widen
from research.paths import expand
from research.training.loop import Trainer
from research.training.model_directory import Loaded
from research.training.workdir import load_model, open_workdir

HELD_OUT, BATCH = 104, 8
GROWN = "grown"
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One drafter on one kind of prompts; the numbers are those of `drafting.decode`."""

    drafter: str
    kind: str
    tokens_per_call: float
    speed: float
    seconds: float
    plain_seconds: float
    best_speed: float
    calls: int
    drafted: int
    wasted: int
    equal: float
    loopiness: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A held-out prompt that a drafter continued in another way than plain decoding: at which token of the output,
    and by how many nats the target prefers the plain one there."""

    prompt: int
    place: int
    gap: float


@dataclasses.dataclass(frozen=True)
class RootOnly:
    """A verifier that keeps no draft: plain decoding in the drafter's own program, every call with its N nodes. In
    bfloat16 products of N rows and of one round differently; so compared, both have N."""

    def __call__(self, logits: jax.Array, draft: Draft, keys: jax.Array) -> Accept:
        batch = logits.shape[0]
        path = jnp.zeros((batch, draft.tree.levels), jnp.int32)
        return Accept(path, jnp.ones((batch,), jnp.int32), argmax(logits[:, 0]))


@dataclasses.dataclass(frozen=True)
class Report:
    """rows of the table; held_out: prompts compared; differences of each drafter."""

    rows: list[Row]
    held_out: int
    differences: dict[str, list[Difference]]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run(
    names: Sequence[str],
    target: str,
    prompts: str | None = None,
    runs: str = "runs/drafters",
    count: int = 16,
    new_tokens: int = 96,
    held_out: int = HELD_OUT,
    dtype: Literal["float32", "bfloat16"] = "float32",
    figure: str | None = None,
    updates: int | None = None,
    rounds: int = 1,
    replaces: Path | None = None,
    report: Callable[[str], None] = print,
) -> Report:
    """Measure the drafters `names` on the model at `target`, see `open_target`.

    names: what `find_drafter` knows; a config that trains a drafter, which is trained below `runs` where it has
    not been; "all", every such config of the catalogue. prompts: a JSONL file. count: prompts of every kind.
    updates: of the longest stage of every drafter that is trained here, the others in proportion; without it those of
    its config. rounds: turns that the prompts which are timed are decoded in. replaces: the folder of a recorded page.
    dtype: of parameters and cache; in bfloat16 held-out prompts are also compared with decoding that keeps one
    token a call in the drafter's own program, from which nothing may differ.

    Raises:
        UserError: a drafter or file that can't be used; the page that is replaced has what is not measured here.
    """
    loaded = open_target(target)
    if loaded.tokenizer is None or not hasattr(loaded.model, "extend"):
        raise UserError(f"{target} does not decode text")
    kinds = {kind: drafting.prompts(kind, count, loaded.tokenizer) for kind in drafting.KINDS}
    if prompts is not None:
        kinds |= read_prompts(prompts, loaded, count, new_tokens, report)
    labels = label(names)
    if replaces is not None:
        refuse_loss(replaces, {"drafter": labels, "kind": kinds})
    named = []
    for short, name in labels.items():
        config = name.partition(":")[0].endswith(".py")
        path = train(name, target, runs, report, updates) if config else name
        named.append((short, find_drafter(path, loaded)))
    rows: list[Row] = []
    differences: dict[str, list[Difference]] = {}
    options = dict(max_new_tokens=new_tokens)
    plain = Generator(loaded.model, loaded.params, loaded.tokenizer, dtype=dtype)
    expected = {kind: drafting.outputs(plain, tokens, options) for kind, tokens in kinds.items()}
    others = unequal(drafting.prompts("code", held_out, loaded.tokenizer))
    plainly = in_batches(plain, others, new_tokens)
    for name, drafter in named:
        params = drafter.target_params(loaded)
        fields = dict(proposer=drafter.proposer, proposer_params=drafter.params, dtype=dtype)
        drafted = Generator(loaded.model, params, loaded.tokenizer, **fields)
        tuned = params is not loaded.params
        own = Generator(loaded.model, params, loaded.tokenizer, dtype=dtype) if tuned else plain
        for kind, tokens in kinds.items():
            wanted = drafting.outputs(own, tokens, options) if tuned else expected[kind]
            found = drafting.measure(own, drafted, tokens, wanted, options, rounds)
            numbers = [field.name for field in dataclasses.fields(Row)[2:]]
            rows.append(Row(name, kind, **{number: found[number] for number in numbers}))
            report(line(rows[-1]))
        found = in_batches(drafted, others, new_tokens)
        wanted = in_batches(own, others, new_tokens) if tuned else plainly
        differences[name] = compare(own, others, wanted, found)
        report(verdict(name, differences[name], len(others)))
        if dtype != "float32":
            single = Generator(loaded.model, params, loaded.tokenizer, verifier=RootOnly(), **fields)
            same = f"{name}, one token a call"
            differences[same] = compare(own, others, in_batches(single, others, new_tokens), found)
            report(verdict(name, differences[same], len(others), "one token a call in the same program"))
    if figure is not None:
        draw(rows, Path(figure))
        report(f"figure: {figure}")
    return Report(rows, len(others), differences)


def open_target(name: str) -> Loaded:
    """The model at a path; "grown:40M", the model that ships, grown to that size: it says the same, and a call costs
    what one of the size costs (`research/language/grow.py`).

    Raises:
        UserError: no such model, or a size that it does not grow to.
    """
    kind, _, size = name.partition(":")
    if kind != GROWN:
        return load_model(name)
    shape, base = find_shape(size), load_model(drafting.TARGET)
    model, params = base.model, base.params
    while model.width < shape.width:
        model, params = widen(model, params)
    if model.width != shape.width:
        raise UserError(f"--target={name}: a width of {base.model.width} does not double to {shape.width}")
    model, params = deepen(model, params, shape.layers)
    return dataclasses.replace(base, model=model, params=params, config=capture(model))


def line(row: Row) -> str:
    """A row of the table as it is printed."""
    wasted = row.wasted / row.drafted if row.drafted else 0.0
    return (
        f"{row.drafter:>24} {row.kind:<16} {row.tokens_per_call:5.2f} tokens a call, {row.speed:5.2f}x "
        f"({row.best_speed:.2f}x), {wasted:4.0%} of drafts wasted, equal {row.equal:4.0%}, "
        f"loopiness {row.loopiness:.2f}"
    )


def verdict(
    name: str, differences: Sequence[Difference], count: int, reference: str = "plain decoding"
) -> str:
    """Whether the output of a drafter on the held-out prompts is that of the reference, in one line."""
    if not differences:
        return f"{name:>24} all {count} held-out prompts in batches of {BATCH}: identical to {reference}"
    widest = max(differences, key=lambda found: found.gap)
    return (
        f"{name:>24} {len(differences)} of {count} held-out prompts in batches of {BATCH} differ from "
        f"{reference}, at logit gaps of up to {widest.gap:.2g} nats"
    )


def read_prompts(
    path: str, loaded: Loaded, count: int, new_tokens: int, report: Callable[[str], None]
) -> dict[str, list[list[int]]]:
    """{category: prompts} of a JSONL file: in every line `prompt`, or `turns` of which the first is taken, and
    perhaps `category`. The first `count` of a category; the end of those that do not fit the context.

    Raises:
        UserError: no such file, or a line without a prompt.
    """
    try:
        text = expand(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path}: {getattr(error, 'strerror', None) or error}") from error
    room, cut, kinds = loaded.model.max_length - new_tokens, 0, {}
    for number, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            entry = json.loads(content)
            prompt = entry["prompt"] if "prompt" in entry else entry["turns"][0]
            category = str(entry.get("category", "prompts"))
            ids = loaded.tokenizer.encode(prompt)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"--prompts={path}: line {number} holds no prompt ({error!r})") from error
        begin = [] if loaded.tokenizer.bos_id is None else [loaded.tokenizer.bos_id]
        if len(kinds.setdefault(category, [])) < count:
            cut += len(ids) + len(begin) > room
            kinds[category].append([*begin, *ids[-(room - len(begin)) :]])
    if not kinds:
        raise UserError(f"--prompts={path} holds no prompt")
    if cut:
        report(f"{path}: of {cut} prompts only the last {room} tokens fit the context")
    return kinds


def label(names: Sequence[str]) -> dict[str, str]:
    """{what a row calls it: drafter}, each once, with those of "all"."""
    wanted: list[str] = []
    for name in names:
        if name == "all":
            decoding = [system for system in read_catalogue() if system.family == "decoding"]
            trains = [system.config for system in decoding if _trains(system.config)]
            wanted += ["prompt_lookup", "submodel", "aded", *dict.fromkeys(trains)]
        else:
            wanted.append(name)
    found: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        short = Path(name.partition(":")[0]).stem
        found[name if short in found else short] = name
    return found


def refuse_loss(page: Path, measured: Mapping[str, Collection[str]]) -> None:
    """Raises UserError where a recorded page has drafters or kinds of prompts that are not measured."""
    path = page / "result.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for field, here in measured.items():
        lost = [name for name in dict.fromkeys(row[field] for row in rows) if name not in here]
        if lost:
            raise UserError(
                f"--record: {path} also has {', '.join(lost)}: measure all, or move it away first"
            )


def _trains(config: str) -> bool:
    task = configs.load_config(config).get("task")
    return task is not None and task.get("cls", "").endswith(":DrafterTraining")


def train(
    name: str, target: str, runs: str, report: Callable[[str], None], updates: int | None = None
) -> str:
    """Trains the drafter of a config for `target`, or goes on with it; returns the run's workdir."""
    if target.startswith(f"{GROWN}:"):
        raise UserError(
            f"--target={target} is no path: train {name} for a model directory, or name other drafters"
        )
    config = configs.load_config(name)
    if "task" in config and "target" in config.task:
        config.task.target = target
    stages = config.get("stages", ())
    if updates is not None and stages:
        longest = max(stage.steps for stage in stages)
        for stage in stages:
            stage.steps = max(1, round(stage.steps * updates / longest))
    trainer = configs.build(config)
    if not isinstance(trainer, Trainer) or not isinstance(trainer.task, DrafterTraining):
        raise UserError(f"{name} trains no drafter: it builds a {type(trainer).__name__}")
    digest = hashlib.sha256(configs.to_json(config).encode()).hexdigest()[:8]
    workdir = str(Path(runs) / f"{Path(name.partition(':')[0]).stem}-{digest}")
    report(f"{name}: {trainer.steps} steps in {workdir}, fewer where it has begun")
    with open_workdir(workdir, config) as run:
        trainer.train(run, progress=False)
    return workdir


def unequal(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts cut to different lengths, so that the rows of a batch stand at different places."""
    return [list(prompt[: max(SHORTEST, len(prompt) - 7 * (i % BATCH))]) for i, prompt in enumerate(prompts)]


def in_batches(generator: Generator, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations, `BATCH` prompts at once."""
    found: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        samples = generator.generate(prompts[start : start + BATCH], max_new_tokens=new_tokens).samples
        found += [sample.tokens for sample in samples]
    return found


def compare(
    plain: Generator,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
) -> list[Difference]:
    """The prompts whose output is not the one expected."""
    differences = []
    for number, (prompt, a, b) in enumerate(zip(prompts, expected, found, strict=True)):
        if list(a) == list(b):
            continue
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        text = jnp.asarray([[*prompt, *a[:place]]], jnp.int32)
        logits = np.asarray(plain.model.apply({"params": plain.params}, text))[0, -1]
        # One may have ended where the other goes on.
        tokens = [
            (*out, *plain.ends)[place] if len(out) + len(plain.ends) > place else None for out in (a, b)
        ]
        gap = float("inf") if None in tokens else float(logits[tokens[0]] - logits[tokens[1]])
        differences.append(Difference(number, place, gap))
    return differences


def draw(rows: Sequence[Row], path: Path) -> None:
    """The figure: speed against acceptance, a colour for every drafter and a mark for every kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(8, 5.5), constrained_layout=True)
    drafters = list(dict.fromkeys(row.drafter for row in rows))
    kinds = list(dict.fromkeys(row.kind for row in rows))
    marks = "os^Dv<>PX*hpd8"
    colours = dict(zip(drafters, plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(drafters))), strict=True))
    for row in rows:
        colour, mark = colours[row.drafter], marks[kinds.index(row.kind) % len(marks)]
        filled = colour if row.equal == 1 else "none"
        panel.plot(row.tokens_per_call, row.speed, mark, color=colour, markerfacecolor=filled)
    for name in drafters:
        panel.plot([], [], "o", color=colours[name], label=name)
    for kind in kinds:
        panel.plot([], [], marks[kinds.index(kind) % len(marks)], color="0.4", label=kind)
    panel.axhline(1, color="0.7", linewidth=1)
    panel.axvline(1, color="0.7", linewidth=1)
    panel.set(
        xlabel="tokens a call, the target's own included",
        ylabel="speed, plain decoding = 1",
        title="greedy; open marks: not identical to plain decoding",
    )
    panel.legend(fontsize=7, ncols=2)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
