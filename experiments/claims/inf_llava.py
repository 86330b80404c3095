"""INF-LLaVA's two perspectives against the whole picture, blocks alone and samplings alone, on generated pages."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import inf_llava, llava
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.config import of
from research.data.shapes import Pages
from research.multimodal.connectors import PatchProjection
from research.multimodal.media import Square
from research.multimodal.model import VLM

ALIGN, INSTRUCT, LENGTH = 50, 300, 28
WORLD = of(Pages, **inf_llava.WORLD)
WHOLE = of(
    VLM,
    **llava.toy_parts(of(Square, patch=8, side=32), side=4),
    connector=of(PatchProjection, width=llava.WIDTH),
)


def setup(model: ConfigDict, what: str) -> seeing.Setup:
    stages = (("align", ALIGN, ("^connector/",)), ("instruct", INSTRUCT, ("^connector/", "^decoder/")))
    return seeing.Setup(model, stages, what)


SETUPS = {
    "whole": setup(WHOLE, "the page at 32 x 32"),
    "blocks": setup(inf_llava.model("blocks"), "blocks in both places"),
    "samplings": setup(inf_llava.model("strides"), "strided samplings in both places"),
    "both": setup(inf_llava.model(), "INF-LLaVA"),
}


def judge(results: Results) -> tuple[str, str]:
    """Yes, if both perspectives answer more than each alone and at least 10 points more than the whole; partly, if they
    answer at least 10 points more than the whole."""
    found = {arm: seeing.mean(results, arm) for arm in SETUPS}
    better = found["both"] >= found["whole"] + 0.1
    best = found["both"] > max(found["blocks"], found["samplings"])
    listed = ", ".join(f"{arm} {value:.3f}" for arm, value in found.items())
    return "yes" if better and best else "partly" if better else "no", (
        f"Right answers (digits and their number): {listed}; all with {results['both']['tokens'][0]} visual tokens, "
        "each "
        "of which stands for 2 x 2 cells of the page."
    )


def figure(results: Results, path: Path) -> None:
    seeing.bars(results, {"answers": "right answers", "loss": "nats of answers"}, path)


CLAIM = Claim(
    system="inf_llava",
    paper="arXiv 2407.16198, section 4",
    statement="Blocks and strided samplings, each enhanced by the other, perceive large pictures better than either.",
    setting="Generated pages of 64 x 64 pixels with two to four digits, asked for a digit or their number; a tower "
    f"of 32 x 32 pixels, frozen; a decoder of two layers; {ALIGN} updates of the connector and {INSTRUCT} of connector "
    f"and decoder, {seeing.BATCH} questions each; one seed.",
    measures=seeing.MEASURES | {"tower accuracy": "share of cells named"},
    budget="questions",
    arms=seeing.arms(
        WORLD,
        {"tower": seeing.Eye(llava.toy_tower(side=4), of(Pages, shapes=((4, 4),), objects=(1, 4)))},
        SETUPS,
        LENGTH,
    ),
    judge=judge,
    figure=figure,
    seeds=(0,),
)
