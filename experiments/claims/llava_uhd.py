"""LLaVA-UHD against squashing and padding, on pages whose digits are legible at their own size alone."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import llava, llava_uhd
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.config import of
from research.data.shapes import Pages
from research.multimodal.connectors import PatchProjection
from research.multimodal.media import Square
from research.multimodal.model import VLM

ALIGN, INSTRUCT = 50, 300
WORLD = of(Pages, shapes=llava_uhd.PAGES)
CELLS = of(Pages, shapes=((4, 4),), objects=(1, 4))


def setup(model: ConfigDict, what: str) -> seeing.Setup:
    stages = (("align", ALIGN, ("^connector/",)), ("instruct", INSTRUCT, ("^connector/", "^decoder/")))
    return seeing.Setup(model, stages, what)


def square(padded: bool) -> ConfigDict:
    planner = of(Square, patch=8, side=32, padded=padded)
    return of(VLM, **llava.toy_parts(planner, side=4), connector=of(PatchProjection, width=llava.WIDTH))


SETUPS = {
    "squashed": setup(square(False), "the page squashed to 32 x 32 (LLaVA)"),
    "padded": setup(square(True), "the page made a square, then 32 x 32 (LLaVA-1.5)"),
    "sliced": setup(llava_uhd.model(), "LLaVA-UHD"),
}


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
    measures=seeing.MEASURES | {"tower accuracy": "share of cells named"},
    budget="questions",
    arms=seeing.arms(WORLD, {"tower": seeing.Eye(llava.toy_tower(side=4), CELLS)}, SETUPS, llava_uhd.LENGTH),
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
