"""GlobalCom2 against random tokens, the thumbnail alone and each crop's own scores, on generated pictures.

One small model is trained with all tokens and then reads as many tokens in every arm, untrained. Ratios and choice are
taken apart: `local` has crop scores and one ratio, `blended` thumbnail and crop scores and one ratio.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import globalcom2
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build
from research.data.glyphs import GlyphCanvases
from research.nn.accounting import count_bytes
from research.sparse.crop_reading import CropReading, keep_all
from research.sparse.globalcom2 import GlobalCom2, Kept, assemble, compress, global_scores, holistic_scores
from research.sparse.tokens import keep_best
from research.training.workdir import open_workdir, read_checkpoint

STEPS, RATIOS, ROWS = (150, 150), (0.1, 0.25, 0.5), 128


def train(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The model, and what it answers with all tokens."""
    config = globalcom2.tiny(seed, STEPS)
    config.evaluators = ()
    with open_workdir(workdir / "run", config) as place:
        build(config).train(place, progress=False)
    progress(0.9, "measuring")
    task, params = trained(workdir, seed)
    found = measured(task, params, functools.partial(keep_all, task.layout), 0)
    return {name: [value] * len(RATIOS) for name, value in found.items()} | costs(params)


def compressed(
    kind: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    task, params = trained(needs["all tokens"].workdir, seed)
    rows = [measured(task, params, functools.partial(choose, kind, task, ratio), seed) for ratio in RATIOS]
    return {name: [row[name] for row in rows] for name in rows[0]} | costs(params)


def choose(kind: str, task: CropReading, ratio: float, thumbnail, crops, s_g, s_l, newline, key) -> Kept:
    """A `Chooser`: as many tokens in all kinds, up to the rounding of the ratios."""
    layout, rule = task.layout, GlobalCom2(ratio)
    if kind == "GlobalCom2":
        return compress(thumbnail, crops, s_g, s_l, newline, layout, rule)
    valid = jnp.asarray(layout.to_crops(layout.valid))
    n = layout.side**2
    if kind == "thumbnail":
        # The thumbnail's best instead of the crops', as far as it goes.
        total = min(int(n * ratio) + int(layout.counts.sum() * ratio), n)
        alone = GlobalCom2(total / n)
        none, uniform = jnp.zeros_like(valid), jnp.zeros(layout.crops)
        return assemble(thumbnail, crops, s_g, none, newline, layout, alone, 0, uniform)
    if kind == "random":
        first, second = jax.random.split(key)
        s_g, s_l = jax.random.normal(first, s_g.shape), jax.random.normal(second, s_l.shape)
    scores = s_l
    if kind == "blended":
        scores = holistic_scores(s_l, global_scores(s_g, layout), valid)
    counts = (layout.counts * ratio).astype(int)
    keep = keep_best(scores, valid, jnp.asarray(counts))
    budget, uniform = int(counts.sum()), jnp.full(layout.crops, ratio)
    return assemble(thumbnail, crops, s_g, keep, newline, layout, rule, budget, uniform)


def trained(workdir: Path, seed: int) -> tuple[CropReading, Any]:
    task = build(globalcom2.tiny(seed, STEPS)).task
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return task, read_checkpoint(workdir / "run", shapes)[0]


def measured(task: CropReading, params: Any, chooser: Any, seed: int) -> dict[str, float]:
    batch = GlyphCanvases(split="test", size=ROWS, seed=seed).take(np.arange(ROWS))
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    metrics, there = jax.jit(lambda params, batch: task.answer(params, batch, chooser))(params, batch)
    accuracy = float(metrics["accuracy"][0] / metrics["accuracy"][1])
    return {"accuracy": accuracy, "tokens": float(jnp.mean(jnp.sum(there, axis=1)))}


def costs(params: Any) -> dict[str, float]:
    return {"budget": sum(STEPS) * 16, "bytes": count_bytes(params)}


def mean(results: Results, arm: str) -> np.ndarray:
    return np.mean(results[arm]["accuracy"], axis=0)


def judge(results: Results) -> tuple[str, str]:
    """Yes, if at every ratio up to a quarter GlobalCom2 answers better than random tokens, the thumbnail and local
    scores, and at a half within two points of all tokens; partly, if it beats random tokens at those ratios."""
    few = [i for i, ratio in enumerate(RATIOS) if ratio <= 0.25]
    ours, full = mean(results, "GlobalCom2"), mean(results, "all tokens")[0]
    better = {
        kind: all(ours[i] > mean(results, kind)[i] for i in few) for kind in ("random", "thumbnail", "local")
    }
    near = full - ours[-1] <= 0.02
    spelled = "; ".join(
        f"{kind} " + "/".join(f"{x:.2f}" for x in mean(results, kind))
        for kind in results
        if kind != "all tokens"
    )
    adaptive = ", ".join(f"{x:+.3f}" for x in ours - mean(results, "blended"))
    verdict = "yes" if all(better.values()) and near else "partly" if better["random"] else "no"
    tokens = statistics.fmean(row[0] for row in results["all tokens"]["tokens"])
    return verdict, (
        f"Right answers at R={'/'.join(map(str, RATIOS))}: {spelled}; all {tokens:.0f} tokens {full:.2f}. What the "
        f"ratios of the crops add to the same choice with one ratio: {adaptive}."
    )


def figure(results: Results, path: Path) -> None:
    """Right answers against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(5.5, 4), constrained_layout=True)
    for arm, rows in results.items():
        panel.plot(np.mean(rows["tokens"], axis=0), mean(results, arm), "o-", label=arm)
    panel.set(xlabel="tokens read", ylabel="right answers")
    panel.legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


KINDS = {
    "GlobalCom2": "ratios and scores guided by the thumbnail, logits of the class token",
    "blended": "the same scores with one ratio for all crops",
    "local": "each crop's own scores, one ratio",
    "random": "random tokens, one ratio",
    "thumbnail": "as many tokens of the thumbnail alone, as far as it has them",
}

CLAIM = Claim(
    system="globalcom2",
    paper="arXiv 2501.05179, abstract",
    statement="Keeping a quarter of the visual tokens of a high-resolution model under the guidance of its thumbnail "
    "keeps over 90 % of its performance, without training, and more than other methods do.",
    setting="Generated pictures of 96 x 96 pixels with one to three glyphs of 12 pixels, thumbnail and 2 x 2 crops of "
    f"64 tokens; a ViT of 2 layers of width 32, {STEPS[0]} updates of 16 pictures, frozen, and a decoder of 2 layers, "
    f"{STEPS[1]} updates with all tokens; {ROWS} held-out questions of a glyph's colour, two seeds. Newlines are read "
    "in all arms.",
    measures={"accuracy": "share right, by ratio", "tokens": "read, by ratio"},
    budget="training pictures",
    arms={
        "all tokens": Arm(train, "nothing is dropped"),
        **{
            kind: Arm(functools.partial(compressed, kind), what, ("all tokens",))
            for kind, what in KINDS.items()
        },
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
