"""EMMA against LLaVA with the same towers, and with the instructions of other questions."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import emma, llava
from experiments.claims import seeing
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.shapes import Scenes
from research.multimodal.task import VisionLanguage, batch_pictures
from research.training.evaluators import means

ALIGN, INSTRUCT, LENGTH = 50, 300, 20
CONTRAST, PAIRS = 600, 64  # updates of the towers, and pairs each
ASKS = ("colour", "shape", "place", "number")
WORLD = of(Scenes, asks=ASKS)


def prepare(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The decoder, and both towers, which learn which caption is whose."""
    found = seeing.parts(WORLD, {}, seed, workdir, progress)
    stage = llava.stage("contrast", CONTRAST, (".*",), PAIRS, 3e-3, floor=0.1)
    params = seeing.run(emma.contrast(), emma.pairs(seed), (stage,), seed, workdir / "pair")
    held = build(emma.pairs(seed, "test")).take(np.arange(PAIRS))
    metrics = means(jax.jit(build(emma.contrast()).evaluate)(params, held), "claim")
    return found | {"found": metrics["accuracy"], "budget": found["budget"] + CONTRAST * PAIRS}


def setup(what: str, *connector: str) -> seeing.Setup:
    stages = (("align", ALIGN, connector), ("instruct", INSTRUCT, (*connector, "^decoder/")))
    return seeing.Setup(emma.model(), stages, what, {"tower": "pair"})


SETUPS = {
    "llava": setup("the mixing stays [1 | 0], which is LLaVA bit for bit", "^connector/projection/"),
    "emma": setup("instruction and mixing are trained too", "^connector/"),
}


def measure(trained: seeing.Trained) -> dict[str, Any]:
    """Right answers where the connector has the instruction of another question, how far an image's rows move with it,
    and how much of the mixing is of text."""
    source = of(Scenes, asks=ASKS, split="test")
    data = build(llava.conversations(source, emma.planner(), LENGTH, shuffle=False))
    task = VisionLanguage(trained.model)

    @jax.jit
    def evaluate(params: Any, batch: dict) -> tuple[Any, jax.Array]:
        def rows(batch: dict) -> jax.Array:
            return trained.model.apply({"params": params}, batch_pictures(batch).media, method="see")[1]

        other = batch | {"words": jnp.roll(batch["words"], 1, axis=0)}
        own, moved = rows(batch), rows(batch) - rows(other)
        squares = jnp.stack([jnp.sum(jnp.square(moved)), jnp.sum(jnp.square(own))])
        return task.evaluate(params, other), squares

    parts = [evaluate(trained.params, data.take(np.arange(s, s + 64))) for s in range(0, seeing.ROWS, 64)]
    metrics, (moved, whole) = jax.tree.map(lambda *x: sum(x), *parts)
    mixing = np.abs(np.asarray(trained.params["connector"]["mix"]["kernel"]))
    return {
        "shuffled": means(metrics, "claim")["answers"],
        "moved": float(np.sqrt(moved / whole)),
        "text share": float(mixing[mixing.shape[1] :].sum() / mixing.sum()),
    }


def judge(results: Results) -> tuple[str, str]:
    """Yes, if EMMA answers at least 2 points more than LLaVA and loses at least 2 points with other questions'
    instructions; partly, if one of the two."""
    plain, ours = (seeing.mean(results, arm) for arm in ("llava", "emma"))
    shuffled, share, moved = (
        seeing.mean(results, "emma", name) for name in ("shuffled", "text share", "moved")
    )
    held = (ours - plain >= 0.02) + (ours - shuffled >= 0.02)
    return ("no", "partly", "yes")[held], (
        f"Right answers: LLaVA {plain:.3f}, EMMA {ours:.3f}, and with the instruction of another question "
        f"{shuffled:.3f}, which moves an image's rows by {moved:.2f} of their length; {share:.3f} of the mixing, in "
        f"absolute values, is of text (at first 0). Of {PAIRS} captions the towers find "
        f"{seeing.mean(results, 'parts', 'found'):.2f} by picture and back."
    )


def figure(results: Results, path: Path) -> None:
    labels = {
        "answers": "right answers",
        "shuffled": "with another's instruction",
        "text share": "text's share of A",
    }
    seeing.bars(results, labels, path)


ARMS = seeing.arms(WORLD, {}, SETUPS, LENGTH, measure=measure)
CLAIM = Claim(
    system="emma",
    paper="arXiv 2410.02080, abstract",
    statement="One light module in front of the projector, less than 0.2 % more parameters, fuses visual and textual "
    "tokens and boosts performance by up to 9.3 %.",
    setting="Generated pictures of 3 x 3 cells with two to four shapes, and questions of colour, shape, place and "
    "number; two frozen towers of two layers, trained by contrast on pictures and captions; a decoder of two layers "
    f"that has read the questions blind; {ALIGN} updates of the connector and {INSTRUCT} of connector and decoder, "
    f"{seeing.BATCH} questions each; three seeds. The module has 1,308 parameters; the decoder "
    "reads the question too.",
    measures=seeing.MEASURES
    | {
        "shuffled": "share of answers right, instruction of another question",
        "moved": "change of an image's rows with it, over their length",
        "text share": "of the absolute values of A",
        "found": "share of captions and pictures found among 64",
    },
    budget="questions or pairs",
    arms=ARMS | {"parts": Arm(prepare, "the decoder and the towers that both begin with")},
    judge=judge,
    figure=figure,
)
