"""EVE's recipe without its first stage, and without its alignment, on generated pictures."""

from pathlib import Path

from configs import eve, llava
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.config import of
from research.data.shapes import Scenes

PREALIGN, INSTRUCT, LENGTH = 100, 250, 24
WORLD = of(Scenes, asks=("colour", "shape", "number"))
TEACHER = seeing.Eye(llava.toy_tower(flexible=True), of(Scenes), fields={"patch": 4, "shrink": 2})


def setup(what: str, first: tuple[str, ...], aligned: bool = True) -> seeing.Setup:
    all_ = eve.ALL if aligned else tuple(path for path in eve.ALL if "align" not in path)
    stages = (("prealign", PREALIGN, first or all_), ("pretrain", INSTRUCT, all_))
    return seeing.Setup(eve.model(aligned), stages, what, {"teacher": "teacher"} if aligned else {})


SETUPS = {
    "whole": setup("a first stage with the decoder frozen, and alignment", eve.LIGHT),
    "no first stage": setup("all is trained from the start", ()),
    "no alignment": setup("the loss of the answers alone", ("^tower/", "^connector/"), aligned=False),
}


def judge(results: Results) -> tuple[str, str]:
    """Yes, if alignment answers at least 5 points more than none, and if without the first stage the decoder's text
    suffers more with every seed and answers are no better; partly, if one of the two holds."""
    whole, straight, alone = (seeing.mean(results, arm) for arm in SETUPS)
    text = {arm: seeing.mean(results, arm, "text") for arm in ("parts", *SETUPS)}
    seeds = zip(results["no first stage"]["text"], results["whole"]["text"], strict=True)
    held = (whole >= alone + 0.05) + (all(a > b for a, b in seeds) and straight <= whole)
    return ("no", "partly", "yes")[held], (
        f"Right answers: whole recipe {whole:.3f}, no first stage {straight:.3f}, no alignment {alone:.3f}; nats of "
        f"text without pictures: before {text['parts']:.3f}, whole {text['whole']:.3f}, no first stage "
        f"{text['no first stage']:.3f}, no alignment {text['no alignment']:.3f}. A collapse as of 7B parameters is not "
        "expected at this size."
    )


def figure(results: Results, path: Path) -> None:
    seeing.bars(results, {"answers": "right answers", "text": "nats of text"}, path)


CLAIM = Claim(
    system="eve",
    paper="arXiv 2406.11832, section 4.3",
    statement="A first stage that trains the patch layers alone keeps training from collapsing, and aligning patches "
    "with a frozen encoder makes it faster and better.",
    setting="Generated pictures of 24 x 24 pixels in patches of 4; a teacher that has learned to name what windows "
    f"of 2 x 2 patches show; a decoder of two layers that has read questions blind; {PREALIGN} and {INSTRUCT} updates "
    f"of {seeing.BATCH} questions; two seeds.",
    measures=seeing.MEASURES | {"teacher accuracy": "share of cells named"},
    budget="questions",
    arms=seeing.arms(WORLD, {"teacher": TEACHER}, SETUPS, LENGTH),
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
