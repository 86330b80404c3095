"""Arcana: modality LoRA at the paper's beta against LoRA of the same ranks, and a ladder of queries on a tower that has
learned shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import arcana, llava
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.adapters.lora import LoRA, adapted, flat, tree
from research.config import build, of
from research.data.shapes import Scenes
from research.multimodal.arcana import Arcana, MMLoRA, ModalityLoRA, copy_rungs
from research.multimodal.connectors import PatchProjection
from research.multimodal.media import Square
from research.multimodal.model import VLM

ALIGN, INSTRUCT, LENGTH = 50, 300, 28
RANK, QUERIES, SCALE = 16, 4, 2.0
VISION = RANK // 4  # the paper's beta, 0.25
WORLD = of(Scenes, asks=("colour", "shape"))
EYES = {
    "tower": seeing.Eye(llava.toy_tower(), WORLD),
    "shapes": seeing.Eye(llava.toy_tower(), WORLD, "kind"),
}
COLOURS = of(Scenes, asks=("colour",))
PARTS = dict(llava.toy_parts(of(Square, patch=8, side=24)), connector=of(PatchProjection, width=llava.WIDTH))
KEY = jax.random.key(7)


def plain_lora(params: Any) -> Any:
    """LoRA with all ranks on every token."""
    lora = LoRA(RANK, alpha=SCALE * RANK)
    terms = lora.create(build(PARTS["decoder"]), params["decoder"], KEY)[1]
    return params | {"decoder": adapted(flat(params["decoder"]), flat(terms))}


def modality_lora(params: Any) -> Any:
    return params | {"decoder": MMLoRA(VISION, RANK - VISION, SCALE).install(params["decoder"], KEY)}


def with_ladder(params: Any) -> Any:
    return copy_rungs(modality_lora(params))


def setup(
    model: Any, what: str, change: Callable, terms: str = "/kernel/(vision|language)/", eye: str = "tower"
) -> seeing.Setup:
    own = "^connector/"
    stages = (("align", ALIGN, (own,)), ("instruct", INSTRUCT, (own, terms)))
    return seeing.Setup(model, stages, what, {"tower": eye}, change)


ARCANA = of(Arcana, **PARTS, dropout=0.0)
SETUPS = {
    "lora": setup(of(VLM, **PARTS), f"LoRA of rank {RANK} on every token", plain_lora, "/kernel/terms/1/"),
    "beta 0.25": setup(ARCANA, f"rank {VISION} on rows of images, {RANK - VISION} on text", modality_lora),
    "shapes": setup(
        ARCANA, "beta 0.25 on a tower that has learned shapes alone", modality_lora, eye="shapes"
    ),
    "shapes, ladder": setup(
        arcana.model(QUERIES), f"the same with a ladder of {QUERIES} queries", with_ladder, eye="shapes"
    ),
}


def measure(trained: seeing.Trained) -> dict[str, Any]:
    """Right answers of colour, and the loss on text where the terms of text are 0 and those of images are not."""
    found = {"colours": seeing.answers(trained, COLOURS, LENGTH)["answers"]}
    if not isinstance(trained.model, Arcana):
        return found

    def silent(node: Any) -> Any:
        if not isinstance(node, ModalityLoRA):
            return node
        return node.replace(language=jax.tree.map(jnp.zeros_like, node.language))

    decoder = tree({path: silent(leaf) for path, leaf in flat(trained.params["decoder"]).items()})
    alone = seeing.Trained(trained.model.decoder, decoder)
    return found | {"isolated": seeing.text_loss(alone, WORLD)}


def judge(results: Results) -> tuple[str, str]:
    """Isolated: with the terms of text at 0 the loss on text is the number it was, in every arm and seed. Yes, if so,
    and modality LoRA at the paper's beta 0.25 answers at least 2 points more than LoRA, and the ladder at least 10
    points more questions of colour than the same without; partly, if isolated and one of the two."""
    before = results["parts"]["text"]
    isolated = all(results[arm]["isolated"] == before for arm in SETUPS if arm != "lora")
    lora, ours = (seeing.mean(results, arm) for arm in ("lora", "beta 0.25"))
    without, ladder = (seeing.mean(results, arm, "colours") for arm in ("shapes", "shapes, ladder"))
    gains = (ours - lora >= 0.02) + (ladder - without >= 0.1)
    verdict = "no" if not isolated or not gains else "partly" if gains == 1 else "yes"
    text = {arm: seeing.mean(results, arm, "text") for arm in ("parts", "lora", "beta 0.25")}
    same = "the same bits as before" if isolated else "NOT what it was before"
    return verdict, (
        f"Right answers: LoRA {lora:.3f}, modality LoRA beta 0.25 {ours:.3f}; of colours, on a tower of shapes: "
        f"{without:.3f}, with a ladder {ladder:.3f}; nats of text without pictures: "
        + ", ".join(f"{arm} {value:.3f}" for arm, value in text.items())
        + f", and of modality LoRA without its terms of text {same}."
    )


def figure(results: Results, path: Path) -> None:
    seeing.bars(
        results,
        {"answers": "right answers", "colours": "right answers of colour", "text": "nats of text"},
        path,
    )


CLAIM = Claim(
    system="arcana",
    paper="arXiv 2410.13733, abstract",
    statement="Low-rank terms of each modality's own keep the modalities from impeding each other, and are better than "
    "one for both; a ladder of queries in the vision tower strengthens what is seen.",
    setting="Generated pictures of 3 x 3 cells with two to four shapes, and questions of the colour of a shape and the "
    "shape of a colour; a frozen decoder of two layers that has read the questions blind; a frozen tower of two layers "
    "that has learned to name what cells show, or for the ladder one that has learned shapes alone; "
    f"{ALIGN} updates of the connector and {INSTRUCT} of connector and low-rank terms of {RANK} ranks together, "
    f"{seeing.BATCH} questions each; three seeds. With the ladder there are {QUERIES} visual tokens and the parameters "
    "of two rungs more. Text is the questions without pictures: all that the decoder had read.",
    measures=seeing.MEASURES
    | {
        "colours": "share of answers right, questions of colour",
        "isolated": "nats a token of the decoder alone, its terms of text at 0",
        "tower accuracy": "share of cells named",
        "shapes accuracy": "share of shapes named",
    },
    budget="questions",
    arms=seeing.arms(WORLD, EYES, SETUPS, LENGTH, measure=measure),
    judge=judge,
    figure=figure,
)
