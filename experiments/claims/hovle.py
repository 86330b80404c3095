"""HoVLE's module with and without its first stage, and against an encoder, on generated pictures."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import hovle, llava
from experiments.claims import seeing
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.shapes import Scenes
from research.multimodal.connectors import ShuffledProjection
from research.multimodal.model import VLM
from research.multimodal.task import VisionLanguage
from research.nn.accounting import count_bytes
from research.training.evaluators import Evaluate
from research.training.metrics import read_rows
from research.training.task import language_metrics

DISTIL, ALIGN, INSTRUCT, LENGTH = 260, 260, 100, 32
EVERY, EARLY = 20, 40  # updates between evaluations of stage 2, and what counts as early in it
WORLD = of(Scenes, asks=("colour", "shape", "caption"))
QUESTIONS, CAPTIONS = of(Scenes, asks=("colour", "shape")), of(Scenes, asks=("caption",))
TEACHER = seeing.Eye(hovle.toy_teacher(), of(Scenes), fields={"patch": 4, "merge": 2})


def encoder_model() -> ConfigDict:
    """The control: the frozen teacher as the tower, and as many rows of it through the same connector."""
    connector = of(ShuffledProjection, width=llava.WIDTH)
    parts = dict(decoder=llava.toy_decoder(), planner=hovle.toy_planner(), tower=hovle.toy_teacher())
    return of(VLM, **parts, connector=connector)


def prepare(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    return seeing.parts(WORLD, {"teacher": TEACHER}, seed, workdir, progress)


def distil(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Stage 1."""
    folder = needs["parts"].workdir
    parts = (("decoder", str(folder / "decoder"), ""), ("teacher", str(folder / "teacher"), "tower"))
    task = hovle.task(hovle.model(), hovle.toy_teacher(), parts=parts)
    params = build(task).start(jax.random.key(seed))
    data = hovle.unpaired(WORLD, hovle.toy_planner(), LENGTH, seed=seed)
    stage = llava.stage("distil", DISTIL, (*hovle.MODULE, "^head/"), seeing.BATCH, 3e-3, floor=0.1)
    plain = hovle.task(hovle.model(), hovle.toy_teacher())
    params = seeing.run(plain, data, (stage,), seed, workdir / "run", params)
    held = hovle.unpaired(of(Scenes, asks=WORLD.asks, split="test"), hovle.toy_planner(), LENGTH)
    found = jax.jit(build(plain).evaluate)(params, build(held).take(np.arange(64)))
    trained = seeing.Trained(build(hovle.model()), build(plain).unpack(params))
    cosines = {name: float(found[name][0] / found[name][1]) for name in ("image_cosine", "text_cosine")}
    costs = {"budget": DISTIL * seeing.BATCH, "bytes": count_bytes(trained.params)}
    return cosines | {"text": text_loss(trained)} | costs


def align(
    kind: str, steps: int, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """Stages 2 and 3 of "distilled", "drawn" or "encoder"; stage 2 with the decoder frozen."""
    folder = needs["parts"].workdir
    parts = [("decoder", str(folder / "decoder"), "")]
    if kind == "encoder":
        model, light, all_ = encoder_model(), ("^connector/",), ("^connector/", "^decoder/")
        parts.append(("tower", str(folder / "teacher"), "tower"))
    else:
        model, light, all_ = hovle.model(), hovle.MODULE, hovle.ALL
    if kind == "distilled":
        run = str(needs["distil"].workdir / "run")
        parts += [(name, run, name) for name in ("holistic", "tower", "connector")]
    params = build(of(VisionLanguage, model=model, parts=tuple(parts))).start(jax.random.key(seed))
    task, data = of(VisionLanguage, model=model), llava.conversations(WORLD, model.planner, LENGTH, seed=seed)
    curve = [seeing.answers(seeing.Trained(build(model), params), CAPTIONS, LENGTH)["loss"]]
    before = text_loss(seeing.Trained(build(model), params))

    held = llava.conversations(
        of(Scenes, asks=("caption",), split="test"), model.planner, LENGTH, shuffle=False
    )
    watch = of(Evaluate, name="captions", data=held, batch_size=64, every=EVERY, batches=2)
    stage = llava.stage("align", steps, light, seeing.BATCH, 3e-3, floor=0.1)
    params = seeing.run(task, data, (stage,), seed, workdir / "align", params, (watch,))
    rows = read_rows(workdir / "align" / "metrics.jsonl")
    curve += [row["loss"] for row in rows if row["kind"] == "eval"]
    progress(0.6, "instructing")
    trained = seeing.Trained(build(model), params)
    found = {"aligned": seeing.answers(trained, QUESTIONS, LENGTH)["answers"]}
    stage = llava.stage("instruct", INSTRUCT, all_, seeing.BATCH, 1e-3, floor=0.1)
    params = seeing.run(task, data, (stage,), seed, workdir / "instruct", params)
    trained = seeing.Trained(build(model), params)
    found |= seeing.answers(trained, QUESTIONS, LENGTH) | {"text": text_loss(trained)}
    first = DISTIL if kind == "distilled" else 0
    costs = {"budget": (first + steps + INSTRUCT) * seeing.BATCH}
    return found | {"captions": curve, "text before": before} | costs


def text_loss(trained: seeing.Trained) -> float:
    """Nats a token of held-out answers without pictures, through all of the model that text passes through."""
    world = of(Scenes, asks=WORLD.asks, split="test")
    data = build(llava.conversations(world, seeing.BLIND, LENGTH, blind=True, shuffle=False))
    batch = data.take(np.arange(256))

    @jax.jit
    def measure(params: Any) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params}
        logits = trained.model.apply(variables, batch["tokens"], None, batch["segments"])
        return language_metrics(logits, batch)[0]["loss"]

    total, weight = measure(trained.params)
    return float(total / weight)


def judge(results: Results) -> tuple[str, str]:
    """Four parts: (1) with every seed captions cost less with the first stage than without it, at every evaluation of
    stage 2, and early in it 10 % less on average; (2) at the end it answers at least 5 points more; (3) after stage 1
    text through the module costs at most 1.25 times what it costs the decoder alone, and at least twice that through a
    drawn module; (4) at the end the monolith is at most 5 points below the encoder. Yes: all; partly: (1) or (2)."""
    curves = {arm: np.asarray(results[arm]["captions"]) for arm in ("distilled", "not distilled", "encoder")}
    one, other = curves["distilled"], curves["not distilled"]
    early = slice(1, 1 + EARLY // EVERY)
    gain = 1 - one[:, early].mean() / other[:, early].mean()
    ends = {
        arm: seeing.mean(results, arm)
        for arm in ("distilled", "not distilled", "longer alignment", "encoder")
    }
    aligned = {arm: seeing.mean(results, arm, "aligned") for arm in ends}
    text = seeing.mean(results, "parts", "text"), seeing.mean(results, "distil", "text")
    drawn = seeing.mean(results, "not distilled", "text before")
    held = (
        bool((one < other).all() and gain >= 0.10),
        ends["distilled"] >= ends["not distilled"] + 0.05,
        text[1] <= 1.25 * text[0] and drawn >= 2 * text[0],
        ends["distilled"] >= ends["encoder"] - 0.05,
    )
    verdict = "yes" if all(held) else "partly" if held[0] or held[1] else "no"
    return verdict, (
        f"Captions {EVERY} and {EARLY} updates into stage 2 cost {gain:.0%} less with the first stage "
        f"(curve of the mean at 0, {EVERY}, {ALIGN}: {_ends(one)} against {_ends(other)}; encoder "
        f"{_ends(curves['encoder'])}); right answers after stages 2 and 3: "
        + ", ".join(f"{arm} {aligned[arm]:.3f} and {ends[arm]:.3f}" for arm in ends)
        + f"; text: decoder alone {text[0]:.3f} nats, through the module after stage 1 {text[1]:.3f}, through a drawn "
        f"one {drawn:.3f}. Of four parts these held, by number: "
        f"{', '.join(str(i + 1) for i, h in enumerate(held) if h) or 'none'}."
    )


def _ends(curve: np.ndarray) -> str:
    return ", ".join(f"{value:.3f}" for value in curve.mean(0)[[0, 1, -1]])


def figure(results: Results, path: Path) -> None:
    """Captions along stage 2, answers after stages 2 and 3, text without pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 3, figsize=(14, 3.8), constrained_layout=True)
    arms = [arm for arm in results if "captions" in results[arm]]
    for i, arm in enumerate(arms):
        curves = np.asarray(results[arm]["captions"])
        for row in curves:
            panels[0].plot(EVERY * np.arange(len(row)), row, color=f"C{i}", alpha=0.25)
        panels[0].plot(EVERY * np.arange(curves.shape[1]), curves.mean(0), color=f"C{i}", label=arm)
    panels[0].set(xlabel="updates of stage 2", ylabel="captions, nats a token", yscale="log")
    panels[0].legend(fontsize=8)
    for k, (measure, label) in enumerate({"aligned": "after stage 2", "answers": "after stage 3"}.items()):
        heights = [seeing.mean(results, arm, measure) for arm in arms]
        panels[1].bar(np.arange(len(arms)) + 0.4 * k - 0.2, heights, 0.4, label=label)
    panels[1].set_xticks(range(len(arms)), arms, rotation=15, fontsize=8)
    panels[1].set(ylabel="colours and shapes right")
    panels[1].legend(fontsize=8)
    words = {
        "decoder alone": ("parts", "text"),
        "drawn module": ("not distilled", "text before"),
        "after stage 1": ("distil", "text"),
        "after stage 3": ("distilled", "text"),
        "encoder,\nafter stage 3": ("encoder", "text"),
    }
    panels[2].bar(range(len(words)), [seeing.mean(results, *where) for where in words.values()], color="0.8")
    for i, (arm, measure) in enumerate(words.values()):
        panels[2].plot([i] * len(results[arm][measure]), results[arm][measure], "o")
    panels[2].set_xticks(range(len(words)), words, fontsize=8)
    panels[2].set(ylabel="text without pictures, nats a token")
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def arm(kind: str, what: str, steps: int = ALIGN) -> Arm:
    return Arm(
        functools.partial(align, kind, steps), what, ("parts", *(("distil",) if kind == "distilled" else ()))
    )


CLAIM = Claim(
    system="hovle",
    paper="arXiv 2412.16158, abstract and section 4",
    statement="A holistic embedding before an intact language model, distilled first from a vision encoder and the "
    "model's own word embeddings on unpaired data, makes a monolithic model close to those with an encoder, where "
    "earlier monolithic ones fall behind.",
    setting="Generated pictures of 24 x 24 pixels in one tile of patches of 4; a decoder of two layers that has read "
    "questions and captions blind, a teacher that has learned to name what 2 x 2 patches show, a module of two layers; "
    f"{DISTIL}, {ALIGN} and {INSTRUCT} updates of {seeing.BATCH} rows in the three stages, pictures and texts of the "
    "first unpaired; the encoder's control has the teacher itself, frozen, as its tower. Two seeds.",
    measures={
        "answers": "share of colours and shapes right, after stage 3",
        "aligned": "the same after stage 2",
        "captions": f"nats a token of held-out captions, every {EVERY} updates of stage 2",
        "loss": "nats a token of the answers, after stage 3",
        "text": "nats a token without pictures, at the end",
        "text before": "the same before stage 2",
        "image_cosine": "mean over held-out tokens",
        "text_cosine": "mean over held-out tokens",
        "teacher accuracy": "share of cells named",
    },
    budget="rows",
    arms={
        "parts": Arm(prepare, "the decoder and the teacher that all begin with"),
        "distil": Arm(distil, "stage 1", ("parts",)),
        "distilled": arm("distilled", "stages 2 and 3 behind stage 1"),
        "not distilled": arm("drawn", "stages 2 and 3 of a module that was drawn"),
        "longer alignment": arm(
            "drawn", "the same; stage 2 has the updates of stage 1 as well", DISTIL + ALIGN
        ),
        "encoder": arm(
            "encoder", "the teacher as a tower: stage 2 trains the connector, stage 3 the decoder as well"
        ),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
