"""What the claims about models that read images share: parts trained apart, one budget, one axis changed at a time.

    ARMS = arms(world, {"tower": Eye(tower, cells)}, {"llava": Setup(model, stages, "what it is"), ...}, length)

The arm `parts` trains a decoder that reads the questions blind, and towers that name what patches show. The others
begin with them, train on as many questions, and say which share of held-out ones they answer right.

Everything is generated (`research.data.shapes`): no photographs, no natural language, and models of some 100k
parameters.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import llava
from experiments.claims.harness import Arm, Needed, Progress, Results
from research.config import build, of
from research.data.shapes import Cells
from research.multimodal.media import Square
from research.multimodal.naming import Namer, Naming
from research.multimodal.task import VisionLanguage
from research.nn.accounting import count_bytes
from research.training.evaluators import means
from research.training.loop import Trainer
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir

BATCH, ROWS = 32, 512
LM_STEPS, TOWER_STEPS = 150, 200
BLIND = of(Square, patch=8, side=8)  # a planner for those who see nothing


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and its parameters."""

    model: Any
    params: Any


def run(
    task: ConfigDict,
    data: ConfigDict,
    stages: tuple,
    seed: int,
    workdir: Path,
    params: Any = None,
    evaluators: tuple = (),
) -> Any:
    """Trains in a folder, where it goes on if it was interrupted; -> parameters."""
    config = of(
        Trainer,
        task=task,
        data=data,
        stages=stages,
        evaluators=evaluators,
        seed=seed,
        checkpoint_every=10_000,
        keep_last=1,
        keep_best=0,
    )
    with open_workdir(workdir, config) as place:
        return build(config).train(place, progress=False, params=params)[0].params


@dataclasses.dataclass(frozen=True)
class Eye:
    """A tower that learns to name what `cells` show before it is frozen. label: see `Cells`; fields: of `Namer`."""

    tower: ConfigDict
    cells: ConfigDict
    label: str = "both"
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def parts(
    world: ConfigDict,
    eyes: dict[str, Eye],
    seed: int,
    workdir: Path,
    progress: Progress,
    decoder: ConfigDict | None = None,
) -> dict[str, Any]:
    """A decoder that has read the dialogues of `world` without pictures, in workdir/decoder, and towers, each in
    workdir/<name>.

    Returns the decoder's loss on text, the towers' accuracy, and the costs.
    """
    decoder = llava.toy_decoder() if decoder is None else decoder
    stage = llava.stage("read", LM_STEPS, (".*",), BATCH, 3e-3, floor=0.1)
    data = llava.conversations(world, BLIND, 40, blind=True, seed=seed)
    params = run(of(LanguageModelling, model=decoder), data, (stage,), seed, workdir / "decoder")
    found = {"text": text_loss(Trained(build(decoder), params), world), "bytes": count_bytes(params)}
    for i, (name, eye) in enumerate(eyes.items()):
        progress((i + 1) / (len(eyes) + 1), name)
        pictures = of(Cells, world=eye.cells, label=eye.label)
        cells = build(pictures)
        fields = dict(patch=8) | eye.fields
        model = of(Namer, tower=eye.tower, num_classes=cells.num_classes, **fields)
        task = of(Naming, model=model, image_shape=cells.element_spec()["images"].shape)
        stage = llava.stage("name", TOWER_STEPS, (".*",), BATCH, 3e-3, floor=0.1)
        params = run(task, pictures, (stage,), seed, workdir / name)
        held = build(of(Cells, world=_test(eye.cells), label=eye.label)).take(np.arange(64))
        metrics = jax.jit(build(task).evaluate)(params, held)
        found[f"{name} accuracy"] = means(metrics, "claim")["accuracy"]
    return found | {"budget": (LM_STEPS + TOWER_STEPS * len(eyes)) * BATCH}


@dataclasses.dataclass(frozen=True)
class Setup:
    """One arm: what is trained after the parts, and how.

    stages: ((name, steps, what is trained), ...). eyes: {subtree of the model: which tower of the parts}. change: makes
    the first parameters of those with the parts in them. rates: the peak.
    """

    model: ConfigDict
    stages: tuple[tuple[str, int, tuple[str, ...]], ...]
    what: str
    eyes: dict[str, str] = dataclasses.field(default_factory=lambda: {"tower": "tower"})
    change: Callable[[Any], Any] = lambda params: params
    peak: float = 3e-3


def arms(
    world: ConfigDict,
    eyes: dict[str, Eye],
    setups: dict[str, Setup],
    length: int,
    decoder: ConfigDict | None = None,
    measure: Callable[[Trained], dict[str, Any]] = lambda trained: {},
) -> dict[str, Arm]:
    """The arm `parts` and one for every setup, which measures `answers`, `text` (the decoder without pictures, after
    training), `tokens` of a picture and what `measure` adds."""

    def prepare(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
        return parts(world, eyes, seed, workdir, progress, decoder)

    def train(
        setup: Setup, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
    ) -> dict[str, Any]:
        folder = needs["parts"].workdir
        begun = {"decoder": (folder / "decoder", "")}
        begun |= {path: (folder / name, "tower") for path, name in setup.eyes.items()}
        stages = tuple(
            llava.stage(name, steps, trainable, BATCH, setup.peak, floor=0.1)
            for name, steps, trainable in setup.stages
        )
        options = dict(length=length, change=setup.change)
        trained = learn(setup.model, world, stages, seed, workdir / "run", begun, **options)
        progress(0.9, "measuring")
        found = answers(trained, world, length) | measure(trained)
        found["text"] = text_loss(Trained(trained.model.decoder, trained.params["decoder"]), world)
        found["tokens"] = len(trained.model.planner.read(build(world).picture(0))[1])
        return found | {"budget": sum(steps for _, steps, _ in setup.stages) * BATCH}

    made = {"parts": Arm(prepare, "the decoder and the towers that all begin with")}
    return made | {
        name: Arm(functools.partial(train, setup), setup.what, ("parts",)) for name, setup in setups.items()
    }


MEASURES = {
    "answers": "share of answers right",
    "loss": "nats a token",
    "text": "nats a token, the decoder alone without pictures",
    "tokens": "visual tokens of a picture",
}


def learn(
    model: ConfigDict,
    source: ConfigDict,
    stages: tuple[ConfigDict, ...],
    seed: int,
    workdir: Path,
    begun: dict[str, tuple[Path, str]],
    *,
    length: int,
    change: Callable[[Any], Any] = lambda params: params,
) -> Trained:
    """A VLM trained on `source` after `begun`: {subtree: (folder, subtree there)}; `change` makes the first parameters
    of those."""
    task = of(
        VisionLanguage, model=model, parts=tuple((path, str(f), inner) for path, (f, inner) in begun.items())
    )
    params = change(build(task).start(jax.random.key(seed)))
    data = llava.conversations(source, model.planner, length, seed=seed)
    plain = of(VisionLanguage, model=model)
    trained = run(plain, data, stages, seed, workdir, params)
    return Trained(build(model), trained)


def answers(trained: Trained, source: ConfigDict, length: int) -> dict[str, float]:
    """Of held-out dialogues: the share answered right, word for word, and nats a token."""
    planner = trained.model.planner
    data = build(llava.conversations(_test(source), BLIND, length, shuffle=False))
    data = dataclasses.replace(data, planner=planner)
    evaluate = jax.jit(VisionLanguage(trained.model).evaluate)
    rows = [evaluate(trained.params, data.take(np.arange(s, s + 64))) for s in range(0, ROWS, 64)]
    total = jax.tree.map(lambda *x: sum(x), *rows)
    found = means(total, "claim")
    return {"answers": found["answers"], "loss": found["loss"], "bytes": count_bytes(trained.params)}


def text_loss(trained: Trained, source: ConfigDict) -> float:
    """Nats a token of a decoder alone on held-out questions' answers, without pictures."""
    data = build(llava.conversations(_test(source), BLIND, 40, blind=True, shuffle=False))
    batch = data.take(np.arange(256))
    return means(jax.jit(LanguageModelling(trained.model).evaluate)(trained.params, batch), "claim")["loss"]


def decoder_of(folder: Path) -> Trained:
    """What `parts` left in workdir/decoder."""
    loaded = load_model(folder)
    return Trained(loaded.model, loaded.params)


def _test(world: ConfigDict) -> ConfigDict:
    made = world.copy_and_resolve_references()
    with made.unlocked():
        made.split = "test"
    return made


def mean(results: Results, arm: str, measure: str = "answers") -> float:
    return float(np.mean(results[arm][measure]))


def bars(results: Results, measures: dict[str, str], path: Path) -> None:
    """A panel for every measure, a bar for every arm, a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(
        1, len(measures), figsize=(4 * len(measures), 3.2), constrained_layout=True, squeeze=False
    )
    for panel, (measure, label) in zip(panels[0], measures.items(), strict=True):
        arms = [arm for arm in results if measure in results[arm]]
        panel.bar(range(len(arms)), [mean(results, arm, measure) for arm in arms], color="0.8")
        for i, arm in enumerate(arms):
            panel.plot([i] * len(results[arm][measure]), results[arm][measure], "o")
        panel.set(xticks=range(len(arms)), ylabel=label)
        panel.set_xticklabels(arms, rotation=20)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
