"""What the claims about models that read images share: parts trained apart, one budget, one axis changed at a time.

    parts(world, seed, workdir, progress)                  a decoder that has read the questions blind, a tower that
                                                           names what patches show
    learn(model, source, stages, seed, workdir, parts)     a VLM that begins with them
    answers(trained, source)                               {"answers": share of questions answered right, "loss": nats}

Everything is generated (`research.data.shapes`): no photographs, no natural language, and models of some 100k
parameters.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import llava
from experiments.claims.harness import Progress, Results
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
    task: ConfigDict, data: ConfigDict, stages: tuple, seed: int, workdir: Path, params: Any = None
) -> Any:
    """Trains in a folder, where it goes on if it was interrupted; -> parameters."""
    config = of(
        Trainer,
        task=task,
        data=data,
        stages=stages,
        seed=seed,
        checkpoint_every=10_000,
        keep_last=1,
        keep_best=0,
    )
    with open_workdir(workdir, config) as place:
        return build(config).train(place, progress=False, params=params)[0].params


def parts(
    world: ConfigDict,
    cells: ConfigDict,
    seed: int,
    workdir: Path,
    progress: Progress,
    *,
    decoder: ConfigDict | None = None,
    towers: dict[str, tuple[ConfigDict, str]],
) -> dict[str, Any]:
    """A decoder that has read the dialogues of `world` without pictures, in workdir/decoder, and of every name in
    `towers` (config, what it learns to name: see `Cells`) a tower, in workdir/<name>, from pictures of `cells`.

    Returns the decoder's loss on text, the towers' accuracy, and the costs.
    """
    decoder = llava.toy_decoder() if decoder is None else decoder
    stage = llava.stage("read", LM_STEPS, (".*",), BATCH, 3e-3, floor=0.1)
    data = llava.conversations(world, BLIND, 40, blind=True, seed=seed)
    params = run(of(LanguageModelling, model=decoder), data, (stage,), seed, workdir / "decoder")
    found = {"text": text_loss(Trained(build(decoder), params), world), "bytes": count_bytes(params)}
    for i, (name, (tower, label)) in enumerate(towers.items()):
        progress((i + 1) / (len(towers) + 1), name)
        pictures = of(Cells, world=cells, label=label)
        classes = build(pictures)
        shape = classes.element_spec()["images"].shape
        model = of(Namer, tower=tower, num_classes=classes.num_classes, patch=8)
        stage = llava.stage("name", TOWER_STEPS, (".*",), BATCH, 3e-3, floor=0.1)
        task = of(Naming, model=model, image_shape=shape)
        params = run(task, pictures, (stage,), seed, workdir / name)
        held = build(of(Cells, world=_test(cells), label=label)).take(np.arange(64))
        metrics = jax.jit(build(task).evaluate)(params, held)
        found[f"{name} accuracy"] = means(metrics, "claim")["accuracy"]
    return found | {"budget": (LM_STEPS + TOWER_STEPS * len(towers)) * BATCH}


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
