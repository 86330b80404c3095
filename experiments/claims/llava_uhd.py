"""LLaVA-UHD against squashing and padding, on pages whose digits are legible at their own size alone."""

import functools
from pathlib import Path
from typing import Any

from configs import llava, llava_uhd
from experiments.claims import seeing
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import of
from research.data.shapes import Pages
from research.multimodal.connectors import PatchProjection
from research.multimodal.media import Square
from research.multimodal.model import VLM

ALIGN, INSTRUCT = 50, 300
WORLD = of(Pages, shapes=llava_uhd.PAGES)
CELLS = of(Pages, shapes=((4, 4),), objects=(1, 4))


def prepare(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    towers = {"tower": (llava.toy_tower(side=4), "both")}
    return seeing.parts(WORLD, CELLS, seed, workdir, progress, towers=towers)


def train(
    kind: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    if kind in ("squashed", "padded"):
        planner = of(Square, patch=8, side=32, padded=kind == "padded")
        connector = of(PatchProjection, width=llava.WIDTH)
        model = of(VLM, **llava.toy_parts(planner, side=4), connector=connector)
    else:
        model = llava_uhd.model()
    stages = (
        llava.stage("align", ALIGN, ("^connector/",), seeing.BATCH, 3e-3, floor=0.1),
        llava.stage("instruct", INSTRUCT, ("^connector/", "^decoder/"), seeing.BATCH, 3e-3, floor=0.1),
    )
    folder = needs["parts"].workdir
    begun = {"decoder": (folder / "decoder", ""), "tower": (folder / "tower", "tower")}
    trained = seeing.learn(model, WORLD, stages, seed, workdir / "run", begun, length=llava_uhd.LENGTH)
    tokens = len(trained.model.planner.read(Pages().picture(0))[1])  # of a page of 64 x 96
    found = seeing.answers(trained, WORLD, llava_uhd.LENGTH)
    return found | {"tokens": tokens, "budget": (ALIGN + INSTRUCT) * seeing.BATCH}


def judge(results: Results) -> tuple[str, str]:
    """Yes, if slices answer at least 20 points more than the better of squashed and padded; partly, if more."""
    ours = seeing.mean(results, "sliced")
    others = {kind: seeing.mean(results, kind) for kind in ("squashed", "padded")}
    gap = ours - max(others.values())
    listed = ", ".join(f"{kind} {value:.3f}" for kind, value in others.items())
    return "yes" if gap >= 0.2 else "partly" if gap > 0 else "no", (
        f"Digits read: sliced {ours:.3f} with {results['sliced']['tokens'][0]} visual tokens a page of 64 x 96; "
        f"{listed}, with {results['squashed']['tokens'][0]}; guessing is 0.1."
    )


def figure(results: Results, path: Path) -> None:
    """Accuracy against visual tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(5, 4), constrained_layout=True)
    for arm in ("squashed", "padded", "sliced"):
        panel.plot(results[arm]["tokens"], results[arm]["answers"], "o", label=arm)
    panel.axhline(0.1, color="0.7", linestyle=":")
    panel.set(xlabel="visual tokens of a page of 64 x 96", ylabel="digits read", ylim=(0, 1))
    panel.legend()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="llava_uhd",
    paper="arXiv 2403.11703, abstract",
    statement="Native resolution and aspect ratio, in slices, read what a fixed square does not (TextVQA +6.4 over "
    "LLaVA-1.5).",
    setting="Generated pages of 64 x 96, 96 x 64 and 64 x 64 pixels with two to four digits of 5 x 7; a tower of 32 x "
    "32 pixels, frozen, that learned to name digits at their own size; a decoder of two layers; "
    f"{ALIGN} updates of the connector and {INSTRUCT} of connector and decoder, {seeing.BATCH} questions each; "
    "two seeds.",
    measures={
        "answers": "share of digits read",
        "loss": "nats a token",
        "tokens": "visual tokens of a page",
        "text": "nats a token, decoder alone",
        "tower accuracy": "share of cells named",
    },
    budget="questions",
    arms={
        "parts": Arm(prepare, "the decoder and the tower that all begin with"),
        **{
            kind: Arm(functools.partial(train, kind), what, ("parts",))
            for kind, what in {
                "squashed": "the page squashed to 32 x 32 (LLaVA)",
                "padded": "the page made a square, then 32 x 32 (LLaVA-1.5)",
                "sliced": "LLaVA-UHD",
            }.items()
        },
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
