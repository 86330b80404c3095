"""Meta-Transformer: frozen blocks of a toy tower against blocks as drawn, a thin encoder trained whole, and none."""

import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import meta_transformer as meta
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build
from research.multimodal.meta_transformer import MetaTransformer, Transfer
from research.nn.accounting import count_bytes
from research.training.evaluators import means
from research.training.workdir import open_workdir

STEPS, PRETRAINING, BATCH, MOST = 200, 250, 32, 512
THIN = dict(width=26, heads=2)  # with it all of a model has about as many parameters as a frozen arm trains
# Accuracy, in per cent, of always naming one class, the most frequent.
GUESSING = {
    "image": 10.0,
    "points": 33.3,
    "audio": 10.0,
    "hyperspectral": 16.7,
    "text": 14.3,
    "table": 39.9,
}
NAMES = (*GUESSING, "series")


def probe(pool: str) -> ConfigDict:
    """No block; heads read the mean of the tokens, or with "flat" every token by itself. The forecast has a head that
    reads every step anyway."""
    made = meta.model(NAMES, layers=0)
    for name in GUESSING:
        made.modalities[name].head.pool = pool
    return made


# name -> (model, what no stage trains, peak rate, whether the blocks are the tower's, description)
SETUPS: dict[str, tuple[ConfigDict, tuple[str, ...], float, bool, str]] = {
    "pretrained": (
        meta.model(NAMES),
        meta.FROZEN,
        1e-2,
        True,
        "the blocks of the tower, frozen: Meta-Transformer",
    ),
    "random": (meta.model(NAMES), meta.FROZEN, 1e-2, False, "the same blocks as they were drawn, frozen"),
    "thin": (
        meta.model(NAMES, **THIN),
        (),
        3e-3,
        False,
        f"an encoder of width {THIN['width']}, shared too, trained from scratch with all else: about as many trained "
        "parameters",
    ),
    "pooled tokens": (
        probe("mean"),
        (),
        1e-2,
        False,
        "no encoder: tokenizers, norms and heads, which read the mean of the tokens",
    ),
    "all tokens": (
        probe("flat"),
        (),
        1e-2,
        False,
        "no encoder: heads read every token by itself, with more trained parameters; of pixels, bands and columns "
        "it is linear up to the norm",
    ),
}


def pretrain(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    config = meta.pretraining(PRETRAINING, seed)
    with open_workdir(workdir / "run", config) as place:
        state, metrics = build(config).train(place, progress=False, devices=jax.devices()[:1])
    return {
        "tower": 100 * metrics["train/accuracy"],
        "budget": PRETRAINING * BATCH,
        "bytes": count_bytes(state.params),
    }


def train(
    name: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """One run in which all modalities learn side by side."""
    model, frozen, peak, begins, _ = SETUPS[name]
    config = meta.experiment(NAMES, frozen, model, STEPS, seed)
    config.stages[0].optimizer.schedule.peak = peak
    config.evaluators = ()
    if begins:
        config.task.encoder = str(needs["tower"].workdir / "run")
    trainer = build(config)
    with open_workdir(workdir / "run", config) as place:
        state, _ = trainer.train(place, progress=False, devices=jax.devices()[:1])
    progress(0.9, "test")
    found = means(evaluation(trainer.task.model)(state.params, tested(seed)), "claim")
    scores = {m: 100 * found[f"{m}/accuracy"] for m in GUESSING}
    mask = trainer.stages[0].mask(state.params)
    trained = [x.size for x, m in zip(jax.tree.leaves(state.params), jax.tree.leaves(mask), strict=True) if m]
    return scores | {
        "mean": statistics.fmean(scores.values()),
        "series": found["series/error"],
        "trained": sum(trained) / 1000,
        "budget": STEPS * BATCH * len(NAMES),
        "bytes": count_bytes(state.params),
    }


@functools.cache
def evaluation(model: MetaTransformer):
    """Compiled once for all seeds, and for both arms with frozen blocks."""
    return jax.jit(Transfer(model).evaluate)


def tested(seed: int) -> dict[str, np.ndarray]:
    """Of every modality as many held-out records as there are, at most `MOST`, in one batch."""
    batch = {}
    for name in NAMES:
        data = build(meta.data((name,), "test", seed))
        batch |= data.take(np.arange(min(len(data), MOST)))
    return batch


def usable(results: Results) -> list[str]:
    """Modalities that the frozen pretrained encoder serves at least half of the way from guessing to all right."""
    ours = results["pretrained"]
    return [name for name, guess in GUESSING.items() if statistics.fmean(ours[name]) >= (100 + guess) / 2]


def judge(results: Results) -> tuple[str, str]:
    """Yes, if at least 90 % of the digits are right, at least five of the six classifications are half of the way from
    guessing to all right, and the mean accuracy is above that of every other arm with every seed. Partly, if only the
    first two hold. No otherwise."""
    means_of = {arm: results[arm]["mean"] for arm in SETUPS}
    digits = statistics.fmean(results["pretrained"]["image"])
    served = usable(results)
    ahead = {
        arm: all(a > b for a, b in zip(means_of["pretrained"], means_of[arm], strict=True))
        for arm in SETUPS
        if arm != "pretrained"
    }
    works = digits >= 90 and len(served) >= 5
    verdict = "yes" if works and all(ahead.values()) else "partly" if works else "no"
    gap = statistics.fmean(
        a - b for a, b in zip(results["pretrained"]["image"], results["random"]["image"], strict=True)
    )
    said = ", ".join(f"{arm} {statistics.fmean(values):.1f}" for arm, values in means_of.items())
    behind = ", ".join(arm for arm, first in ahead.items() if not first) or "none"
    return verdict, (
        f"Digits {digits:.1f} % ({gap:+.1f} points on blocks as drawn); {len(served)} of {len(GUESSING)} "
        f"classifications half of the way from guessing to all right; mean accuracy: {said}; not "
        f"beaten with every seed: {behind}."
    )


def figure(results: Results, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(7, 1.6))
    thick = 0.8 / len(SETUPS)
    for i, arm in enumerate(SETUPS):
        for panel, names in ((left, tuple(GUESSING)), (right, ("series",))):
            heights = [statistics.fmean(results[arm][name]) for name in names]
            panel.bar(np.arange(len(names)) + (i - 2) * thick, heights, thick, color=f"C{i}", label=arm)
            for place, name in enumerate(names):
                seeds = results[arm][name]
                panel.plot([place + (i - 2) * thick] * len(seeds), seeds, ".k", markersize=3)
    for place, guess in enumerate(GUESSING.values()):
        left.plot([place - 0.45, place + 0.45], [guess, guess], "--", color="grey", linewidth=1)
    left.set_xticks(range(len(GUESSING)), list(GUESSING))
    left.set(ylabel="test accuracy (%), dashed: guessing", ylim=(0, 100))
    right.set_xticks([0], ["series"])
    right.set_ylabel("mean absolute error of the forecast")
    figure.legend(*left.get_legend_handles_labels(), ncols=5, loc="outside lower center")
    figure.savefig(path)


CLAIM = Claim(
    system="meta_transformer",
    paper="arXiv 2307.10802, abstract and section 4",
    statement="One frozen encoder, pretrained on images, serves twelve modalities without paired data: each needs only "
    "a tokenizer and a head of its own.",
    setting="Seven modalities. Real: scikit-learn's digits and wines, and text, whose package of Python's standard "
    "library is to be told. Generated: clouds of points of three solids, spoken digits as overlapping patches of "
    "log-mel spectrograms, windows of a hyperspectral scene split by blocks, hourly series to "
    f"be forecast. A tower of {meta.LAYERS} blocks of width {meta.WIDTH} learns in {PRETRAINING} updates to name the "
    f"cells of generated pictures: labels, not texts as in CLIP. Then {STEPS} updates with {BATCH} records of every "
    f"modality; at most {MOST} test records each; two seeds, which draw data, tower and all else. Rates are 1e-2 "
    "where the encoder is frozen or there is none, and 3e-3 where it is trained.",
    measures={name: "%" for name in (*GUESSING, "mean")}
    | {"series": "mean absolute error", "trained": "thousand parameters", "tower": "% of cells named"},
    budget="records",
    arms={"tower": Arm(pretrain, "what the pretrained arm's blocks are from")}
    | {
        name: Arm(functools.partial(train, name), setup[-1], ("tower",) if setup[3] else ())
        for name, setup in SETUPS.items()
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
