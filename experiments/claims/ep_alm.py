"""eP-ALM against one token at the input and against all patches as a prefix, with the decoder frozen."""

from pathlib import Path

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from configs import ep_alm, llava
from experiments.claims import seeing
from experiments.claims.harness import Claim, Results
from research.config import of
from research.data.shapes import Scenes
from research.multimodal.connectors import PatchProjection, Projection
from research.multimodal.media import Media, Square
from research.multimodal.model import VLM
from research.multimodal.tower import Seen

STEPS, LENGTH = 350, 20
WORLD = of(Scenes, asks=("colour", "shape"), objects=(1, 1))
EYE = llava.toy_tower(class_token=True, norm_all=True)


class ClassToken(nn.Module):
    """One row: the last class token through a linear map."""

    width: int

    @nn.compact
    def __call__(self, seen: Seen, media: Media) -> jax.Array:
        return Projection(self.width, layers=1, name="projection")(seen.taps[-1, :, :, 0, :1])


def plain(connector: ConfigDict, count: int) -> ConfigDict:
    parts = dict(planner=of(Square, patch=8, side=24, count=count), decoder=llava.toy_decoder(3), tower=EYE)
    return of(VLM, **parts, connector=connector)


def setup(model: ConfigDict, what: str) -> seeing.Setup:
    return seeing.Setup(model, (("maps", STEPS, ep_alm.OWN),), what)


def only_connector(model: ConfigDict, what: str) -> seeing.Setup:
    return seeing.Setup(model, (("maps", STEPS, ("^connector/",)),), what)


SETUPS = {
    "injected": setup(
        ep_alm.model(), "eP-ALM: a token from the second layer on, of two levels, and two of a prompt"
    ),
    "one token": only_connector(
        plain(of(ClassToken, width=llava.WIDTH), 1), "the last class token at the input"
    ),
    "patches": only_connector(
        plain(of(PatchProjection, width=llava.WIDTH, layers=1), 9), "all nine patches at the input"
    ),
}


def judge(results: Results) -> tuple[str, str]:
    """Yes, if the injected token answers at least as much as one at the input, and better than guessing (0.25 of
    shapes, 0.17 of colours) by 20 points; partly, if only the second holds."""
    ours, one, patches = (seeing.mean(results, arm) for arm in SETUPS)
    same = results["parts"]["text"] == results["injected"]["text"]
    learned = same and ours >= 0.41
    return "yes" if learned and ours >= one else "partly" if learned else "no", (
        f"Right answers with a frozen decoder: injected {ours:.3f}, one token at the input {one:.3f}, patches "
        f"{patches:.3f}; text without pictures is {'the same bits' if same else 'NOT the same'}."
    )


def figure(results: Results, path: Path) -> None:
    seeing.bars(results, {"answers": "right answers", "loss": "nats of answers"}, path)


CLAIM = Claim(
    system="ep_alm",
    paper="arXiv 2303.11403, section 4",
    statement="With a frozen encoder and a frozen language model, linear maps of several class tokens into upper "
    "layers "
    "and a soft prompt suffice, and beat one token at the input.",
    setting="Generated pictures of 3 x 3 cells with one shape, asked for its colour or shape; a decoder of three "
    "layers "
    "that has read the questions blind, a tower whose class token has learned to name shape and colour, both frozen; "
    f"{STEPS} updates of {seeing.BATCH} questions; two seeds.",
    measures=seeing.MEASURES | {"tower accuracy": "share of pictures named"},
    budget="questions",
    arms=seeing.arms(
        WORLD,
        {"tower": seeing.Eye(EYE, of(Scenes, objects=(1, 1)), fields={"whole": True})},
        SETUPS,
        LENGTH,
        llava.toy_decoder(3),
    ),
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
