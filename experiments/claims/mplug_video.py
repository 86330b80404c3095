"""mPLUG-video: divided space-time attention against the mean over frames, and what captions teach before few labels."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import llava, mplug_video
from experiments.claims import seeing
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.clips import DIRECTIONS, Clips
from research.data.shapes import Scenes
from research.multimodal.media import Media
from research.multimodal.mplug_video import VideoLanguage, score_names
from research.multimodal.prompts import Prompts
from research.multimodal.tower import Seen, Tower
from research.nn.accounting import count_bytes

STEPS, LABELS, LABEL_STEPS, LENGTH = 1000, 100, 60, 20
SIDE, ROWS = 24, 256
MOVING = dict(side=SIDE, frames=mplug_video.FRAMES, speeds=(3, 5), objects=(1, 1))
READ = of(Clips, **MOVING, asks=("direction", "speed", "caption"), told=True)
EYE = llava.toy_tower(3, class_token=True)


class FrameMean(nn.Module):
    """An image tower on every frame, and one frame of the means over them."""

    images: Tower

    def __call__(self, media: Media) -> Seen:
        seen = self.images(media)
        tokens, taps = (
            jnp.mean(x, axis=2 + axis, keepdims=True) for x, axis in ((seen.tokens, 0), (seen.taps, 1))
        )
        return Seen(tokens, seen.mask[:, :, :1], seen.grid[:, :, :1], taps)


TOWERS = {
    "mean": of(FrameMean, images=EYE),
    "divided": mplug_video.in_time(EYE, mplug_video.FRAMES),
}


def model(tower: str) -> ConfigDict:
    return mplug_video.model(TOWERS[tower])


def learn(
    tower: str,
    source: ConfigDict,
    steps: int,
    peak: float,
    seed: int,
    workdir: Path,
    parts: Path,
    begun: Any = None,
) -> seeing.Trained:
    """Tower and abstractor of a model with the frozen decoder, from the parts or from parameters."""
    made = model(tower)
    if begun is None:
        images = (str(parts / "tower"), "tower")
        own = {"image_tower": images} if tower == "divided" else {}
        places = (("decoder", str(parts / "decoder"), ""),)
        places += () if own else (("tower/images", *images),)
        begun = build(of(VideoLanguage, model=made, parts=places, **own)).start(jax.random.key(seed))
    stage = llava.stage("videos", steps, mplug_video.OWN, seeing.BATCH, peak, floor=0.1)
    data = llava.conversations(source, made.planner, LENGTH, seed=seed)
    params = seeing.run(of(VideoLanguage, model=made), data, (stage,), seed, workdir, begun)
    return seeing.Trained(build(made), params)


def measure(trained: seeing.Trained) -> dict[str, float]:
    """The share of held-out clips whose direction, and whose speed, is ranked first of all six words."""
    names, planner = (*DIRECTIONS, "slow", "fast"), trained.model.planner
    worlds = {ask: Clips(**MOVING, split="test", asks=(ask,)) for ask in ("direction", "speed")}
    right: dict[str, list[bool]] = {ask: [] for ask in worlds}
    for start in range(0, ROWS, 64):
        said = [(ask, worlds[ask][i]) for ask in worlds for i in range(start, start + 64)]
        asked = [(f"{one.turns[0][0]} ", one.images) for _, one in said]
        text = mplug_video.vocabulary()
        scores = score_names(trained.model, trained.params, Prompts.of(asked, planner, text), names, text)
        for (ask, one), best in zip(said, scores.argmax(axis=1), strict=True):
            right[ask].append(names[best] == one.turns[0][1])
    decoder = seeing.Trained(trained.model.decoder, trained.params["decoder"])
    found = {ask: float(np.mean(hits)) for ask, hits in right.items()}
    return found | {"text": seeing.text_loss(decoder, READ), "bytes": count_bytes(trained.params)}


def prepare(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    eyes = {"tower": seeing.Eye(EYE, of(Scenes))}
    return seeing.parts(READ, eyes, seed, workdir, progress, mplug_video.toy_decoder())


def answer(
    tower: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    source = of(Clips, **MOVING, asks=("direction", "speed"))
    trained = learn(tower, source, STEPS, 3e-3, seed, workdir / "run", needs["parts"].workdir)
    return measure(trained) | {"budget": STEPS * seeing.BATCH}


def classify(
    captions: bool, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    parts, begun = needs["parts"].workdir, None
    if captions:
        told = of(Clips, **MOVING, asks=("caption",))
        begun = learn("divided", told, STEPS, 3e-3, seed, workdir / "captions", parts).params
        progress(0.7, "labels")
    labelled = of(Clips, **MOVING, asks=("direction",), size=LABELS)
    trained = learn("divided", labelled, LABEL_STEPS, 1e-3, seed, workdir / "run", parts, begun)
    found = measure(trained)
    del found["speed"]  # which it was not asked
    return found | {"budget": (STEPS * captions + LABEL_STEPS) * seeing.BATCH}


def judge(results: Results) -> tuple[str, str]:
    """Of directions: divided attention names 20 points more than the mean over frames, and 100 labels give 5 points
    more after captions than without. Yes, if both hold and the decoder keeps its bits; partly, if one does."""
    mean, divided = (seeing.mean(results, arm, "direction") for arm in ("mean", "divided"))
    speeds = [seeing.mean(results, arm, "speed") for arm in ("mean", "divided")]
    scratch, captions = (seeing.mean(results, arm, "direction") for arm in ("labels", "captions, labels"))
    frozen = all(results[arm]["text"] == results["parts"]["text"] for arm in results)
    held = (divided >= mean + 0.2) + (captions >= scratch + 0.05)
    verdict = ("no", "partly", "yes")[held] if frozen else "no"
    return verdict, (
        f"Directions named right, of which guessing is a quarter and the axis alone tells half: mean over frames "
        f"{mean:.3f}, divided space-time attention {divided:.3f}; speeds {speeds[0]:.3f} and {speeds[1]:.3f}. With "
        f"{LABELS} labelled clips {scratch:.3f}, and after captions {captions:.3f}. The frozen decoder's loss on text "
        f"is {'the same bits' if frozen else 'NOT the same'}."
    )


def figure(results: Results, path: Path) -> None:
    seeing.bars(results, {"direction": "directions right", "speed": "speeds right"}, path)


CLAIM = Claim(
    system="mplug_video",
    paper="arXiv 2306.04362, abstract; arXiv 2102.05095, section 4",
    statement="A video tower and an abstractor, trained before a frozen language model, understand videos; captions "
    "before the labels of categories give up to 23.1 % more. Divided space-time attention sees motion.",
    setting="Generated clips of 24 x 24 pixels and 4 frames of one shape that moves left, right, up or down, slowly or "
    "fast; a decoder of two layers, frozen, that has read sentences about clips with questions after them, and has "
    "never seen one; both towers begin as one image tower that has learned to name still shapes, and are trained with "
    f"the abstractor of 8 queries: {STEPS} updates of {seeing.BATCH} questions, or as many captions and then "
    f"{LABEL_STEPS} on {LABELS} labelled clips. Divided attention has more parameters in its tower. Classes are ranked "
    "by the log-likelihood of their names. Played backwards, a clip is as likely: the set of its frames tells the axis "
    "and not the direction. Two seeds.",
    measures={
        "direction": "share of directions ranked first",
        "speed": "share of speeds ranked first",
        "text": "nats a token, the decoder alone without clips",
        "tower accuracy": "share of cells of still pictures named",
    },
    budget="clips",
    arms={
        "parts": Arm(prepare, "the decoder and the image tower that all begin with"),
        "mean": Arm(
            functools.partial(answer, "mean"),
            "an image tower on every frame, the mean over frames",
            ("parts",),
        ),
        "divided": Arm(functools.partial(answer, "divided"), "divided space-time attention", ("parts",)),
        "labels": Arm(
            functools.partial(classify, False), f"divided, {LABELS} labelled clips alone", ("parts",)
        ),
        "captions, labels": Arm(
            functools.partial(classify, True), "divided, captions and then the labelled clips", ("parts",)
        ),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
