"""Inner-Adaptor against a projector alone and against fine-tuning the decoder, on generated pictures."""

from pathlib import Path

from configs import iaa, llava
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.config import of
from research.data.shapes import Scenes
from research.multimodal.connectors import PatchProjection
from research.multimodal.iaa import begin_workflow
from research.multimodal.media import Square
from research.multimodal.model import VLM

ALIGN, INSTRUCT, LENGTH = 50, 300, 20
WORLD = of(Scenes, asks=("colour", "shape", "number"))
LLAVA = of(
    VLM, **llava.toy_parts(of(Square, patch=8, side=24)), connector=of(PatchProjection, width=llava.WIDTH)
)


def stages(*trainable: str) -> tuple:
    return (("align", ALIGN, ("^connector/",)), ("instruct", INSTRUCT, trainable))


SETUPS = {
    "projector": seeing.Setup(LLAVA, stages("^connector/"), "the decoder is frozen, the projector learns"),
    "inserted": seeing.Setup(
        iaa.model(), stages(*iaa.OWN), "Inner-Adaptor: two inserted layers", change=begin_workflow
    ),
    "fine-tuned": seeing.Setup(
        LLAVA, stages("^connector/", "^decoder/"), "projector and decoder learn (LLaVA-1.5)"
    ),
}


def judge(results: Results) -> tuple[str, str]:
    """Yes, if inserted layers leave the decoder's loss on text the same number, answer at least 10 points more than the
    projector alone and at most 5 less than fine-tuning; partly, if only the first two hold."""
    before, after = results["parts"]["text"], results["inserted"]["text"]
    ours, projector, tuned = (seeing.mean(results, arm) for arm in ("inserted", "projector", "fine-tuned"))
    kept = before == after and ours >= projector + 0.1
    verdict = "yes" if kept and ours >= tuned - 0.05 else "partly" if kept else "no"
    return verdict, (
        f"Right answers: projector {projector:.3f}, inserted layers {ours:.3f}, fine-tuning {tuned:.3f}; nats of text "
        f"without pictures: before {seeing.mean(results, 'parts', 'text'):.3f}, inserted "
        f"{seeing.mean(results, 'inserted', 'text'):.3f} ({'the same bits' if before == after else 'NOT the same'}), "
        f"fine-tuned {seeing.mean(results, 'fine-tuned', 'text'):.3f}."
    )


def figure(results: Results, path: Path) -> None:
    seeing.bars(results, {"answers": "right answers", "text": "nats of text"}, path)


CLAIM = Claim(
    system="iaa",
    paper="arXiv 2408.12902, abstract and table 1",
    statement="Inserted layers give a frozen language model multimodal ability beyond that of fine-tuning it, and "
    "leave "
    "its language ability as it was.",
    setting="Generated pictures of 3 x 3 cells with two to four shapes, and questions of colour, shape and number; a "
    f"decoder of two layers that has read the questions blind, a frozen tower; {ALIGN} updates of the projector and "
    f"{INSTRUCT} of what each arm trains, {seeing.BATCH} questions each; two seeds. Text is the questions without "
    "pictures: all that the decoder had read.",
    measures=seeing.MEASURES | {"tower accuracy": "share of cells named"},
    budget="questions",
    arms=seeing.arms(WORLD, {"tower": seeing.Eye(llava.toy_tower(), of(Scenes))}, SETUPS, LENGTH),
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
