"""MouSi: two experts of different skills against each alone, on questions that need both."""

from pathlib import Path

from configs import llava, mousi
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.config import of
from research.data.shapes import Scenes

ALIGN, INSTRUCT, LENGTH = 50, 300, 28
WORLD = of(Scenes, asks=("colour", "shape"))
EYES = {skill: seeing.Eye(llava.toy_tower(), of(Scenes), skill) for skill in ("colour", "kind")}


def setup(*skills: str) -> seeing.Setup:
    stages = (("align", ALIGN, ("^connector/",)), ("instruct", INSTRUCT, ("^connector/", "^decoder/")))
    eyes = {f"tower/experts_{i}": skill for i, skill in enumerate(skills)}
    return seeing.Setup(mousi.model(len(skills)), stages, f"experts that name: {', '.join(skills)}", eyes)


SETUPS = {"colour": setup("colour"), "kind": setup("kind"), "both": setup("colour", "kind")}


def judge(results: Results) -> tuple[str, str]:
    """Yes, if both experts together answer at least 10 points more than the better one alone; partly, if more."""
    both, *alone = (seeing.mean(results, arm) for arm in ("both", "colour", "kind"))
    gap = both - max(alone)
    return "yes" if gap >= 0.1 else "partly" if gap > 0 else "no", (
        f"Right answers: both experts {both:.3f}, the one of colours {alone[0]:.3f}, the one of shapes {alone[1]:.3f}; "
        f"{results['both']['tokens'][0]} visual tokens against {results['kind']['tokens'][0]}."
    )


def figure(results: Results, path: Path) -> None:
    seeing.bars(results, {"answers": "right answers", "loss": "nats of answers"}, path)


CLAIM = Claim(
    system="mousi",
    paper="arXiv 2401.17221, abstract",
    statement="Several experts perform consistently better than each of them alone.",
    setting="Generated pictures of 3 x 3 cells; questions of the colour of a shape and the shape of a colour; two "
    "frozen towers, one that has learned to name colours, one shapes; a decoder of two layers; "
    f"{ALIGN} updates of the fusion and {INSTRUCT} of fusion and decoder, {seeing.BATCH} questions each; two seeds. "
    "Two experts have twice the visual tokens of one.",
    measures=seeing.MEASURES | {f"{skill} accuracy": "share of cells named" for skill in EYES},
    budget="questions",
    arms=seeing.arms(WORLD, EYES, SETUPS, LENGTH),
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
