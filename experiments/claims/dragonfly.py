"""Dragonfly's zooms against the low view alone, and its selection against all high crops, on generated pages."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import dragonfly, llava
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.config import build, of
from research.data.shapes import CELL, Pages
from research.multimodal.connectors import PatchProjection
from research.multimodal.dragonfly import FINE, REGIONS, select
from research.multimodal.media import Square
from research.multimodal.model import VLM

ALIGN, INSTRUCT = 50, 300
WORLD = of(Pages, shapes=((8, 12),))
LOW = of(
    VLM,
    **llava.toy_parts(of(Square, patch=8, side=16), side=2, class_token=True),
    connector=of(PatchProjection, width=llava.WIDTH, layers=1),
)


def setup(model: Any, what: str) -> seeing.Setup:
    stages = (("align", ALIGN, ("^connector/",)), ("instruct", INSTRUCT, ("^connector/", "^decoder/")))
    return seeing.Setup(model, stages, what)


SETUPS = {
    "low": setup(LOW, "the page at 16 x 16"),
    "selected": setup(dragonfly.model(3), "Dragonfly: three of six high crops in every region"),
    "all": setup(dragonfly.model(6), "all 24 high crops"),
}


def hits(trained: seeing.Trained) -> dict[str, float]:
    """Of the digits of held-out pages, the share that lies in a high crop which is kept; keeping at random is k / 6."""
    if not hasattr(trained.model.planner, "keep"):
        return {}
    pages, planner = build(of(Pages, split="test", shapes=((8, 12),))), trained.model.planner
    read = [planner.read(pages.picture(i))[0] for i in range(64)]
    media = jax.tree.map(lambda *x: np.stack(x)[:, None], *read)
    whole = trained.model.clone(planner=dataclasses.replace(planner, keep=FINE // REGIONS))
    whole = whole.clone(connector=trained.model.connector.clone(keep=FINE // REGIONS))
    rows = jax.jit(lambda p, m: whole.apply({"params": p}, m, method="see")[1])(trained.params, media)
    tokens = rows.reshape(64, 1 + REGIONS + FINE, -1, rows.shape[-1])
    chosen = select(
        tokens[:, 1 + REGIONS :], tokens[:, 1 : 1 + REGIONS], media.marks[:, 0, 1 + REGIONS :], planner.keep
    )
    found = []
    for i, kept in enumerate(np.asarray(chosen)):
        for row, column in np.argwhere(pages.cells(i)[0] >= 0):
            found.append(row * CELL // planner.side * 6 + column * CELL // planner.side in kept)
    return {"hits": float(np.mean(found))}


def judge(results: Results) -> tuple[str, str]:
    """Yes, if the selected crops answer at least 20 points more than the low view and at most 5 less than all; partly,
    if only the first holds."""
    low, ours, whole = (seeing.mean(results, arm) for arm in SETUPS)
    better = ours >= low + 0.2
    return "yes" if better and ours >= whole - 0.05 else "partly" if better else "no", (
        f"Digits read: low view {low:.3f}, selected {ours:.3f} with {results['selected']['tokens'][0]} visual tokens, "
        f"all "
        f"crops {whole:.3f} with {results['all']['tokens'][0]}; {seeing.mean(results, 'selected', 'hits'):.2f} of the "
        "digits lie in a crop that is kept (0.5 at random). The selection cannot know the question."
    )


def figure(results: Results, path: Path) -> None:
    """Accuracy against visual tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(5, 4), constrained_layout=True)
    for arm in SETUPS:
        panel.plot(results[arm]["tokens"], results[arm]["answers"], "o", label=arm)
    panel.set(xlabel="visual tokens", ylabel="digits read", ylim=(0, 1))
    panel.legend()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="dragonfly",
    paper="arXiv 2406.00977 (version 1), abstract",
    statement="Zooming beyond the tower's resolution, with the crops that matter selected, reads fine detail within a "
    "short context.",
    setting="Generated pages of 64 x 96 pixels with two to four digits; a tower of 16 x 16 pixels, frozen, that has "
    f"learned to name digits; a decoder of two layers; {ALIGN} updates of the map and {INSTRUCT} of map and decoder, "
    f"{seeing.BATCH} questions each; one seed.",
    measures=seeing.MEASURES
    | {"tower accuracy": "share of cells named", "hits": "share of digits in kept crops"},
    budget="questions",
    arms=seeing.arms(
        WORLD,
        {
            "tower": seeing.Eye(
                llava.toy_tower(side=2, class_token=True), of(Pages, shapes=((2, 2),), objects=(1, 2))
            )
        },
        SETUPS,
        190,
        measure=hits,
    ),
    judge=judge,
    figure=figure,
    seeds=(0,),
)
