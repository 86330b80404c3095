"""SJD: images from a small autoregressive model, drawn in fewer calls than they have tokens.

Every arm draws the same number of images of every class with the same target; what counts is how many calls of the
model an image takes. That the law is kept is tested by enumeration elsewhere; here the drawn images are scored by the
target itself, which a change of the law would show.
"""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import sjd as config
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build
from research.data.codes import Codebook
from research.data.photographs import PICTURES, PhotographDataset
from research.decoding.proposers import Proposer, Round, Target
from research.decoding.sampling import Sampling
from research.decoding.speculative.sjd import SJD, Window
from research.decoding.verify import Draft
from research.nn.accounting import count_bytes
from research.training.model_directory import Loaded
from research.training.workdir import load_model, open_workdir
from research.vision.autoregressive import Artist

STEPS, BATCH = 300, 8
SIDE, CODES = config.SIDE, config.SIDE**2  # of an image
PER_CLASS = 3
WINDOWS = (8, 16, 32)
RULES = ("repeat_horizontal", "sample_horizontal", "repeat_vertical", "sample_vertical")
SHOWN = {"plain": "plain sampling", "SJD 16": "SJD, window 16", "SJD 16 guided": "SJD, guided"}


@dataclasses.dataclass(frozen=True)
class Jacobi(SJD):
    """Jacobi decoding with sampling: the model draws a token and keeps the window's if it is the same, which it is
    with probability sum p q instead of sum min(p, q)."""

    def propose(self, params: Any, target: Target, state: Window, round: Round) -> tuple[Draft, Window]:
        draft, state = super().propose(params, target, state, round)
        return draft.replace(q=None), state


def train(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The target: the config's experiment, shorter."""
    experiment = config.get_config("tiny")
    experiment.seed = experiment.data.seed = experiment.data.images.seed = seed
    experiment.stages[0].steps, experiment.stages[0].batch_size = STEPS, BATCH
    experiment.evaluators[0].every = None
    progress(0.05, f"{STEPS} steps")
    trainer = build(experiment)
    with open_workdir(workdir / "run", experiment) as run:
        state, metrics = trainer.train(run, progress=False)
    return {"loss": metrics["test/loss"], "budget": STEPS * BATCH * CODES, "bytes": count_bytes(state.params)}


def draw(
    proposer: Proposer | None,
    sampling: Sampling,
    guidance: float | None,
    seed: int,
    workdir: Path,
    progress: Progress,
    needs: dict[str, Needed],
) -> dict[str, Any]:
    """Images of all classes, counted and scored."""
    loaded = load_model(needs["target"].workdir / "run")
    progress(0.1, "drawing")
    labels = [label for label in range(len(PICTURES)) for _ in range(1 if sampling.greedy else PER_CLASS)]
    options = dict(rows=SIDE, columns=SIDE, guidance=guidance)
    artist = Artist(loaded.model, loaded.params, Codebook.load(), proposer=proposer, **options)
    drawing = artist.draw(labels, sampling=sampling, seed=seed)
    calls = 1 + sum(drawing.stats.gained) / len(labels)  # prefill is a call
    measured = {
        "calls": calls,
        "codes per call": CODES / calls,
        "wasted": drawing.stats.wasted / len(labels),
        "nats": score(loaded, labels, drawing.codes),
        "images": [
            int.from_bytes(bytes(row), "big")
            for row in drawing.codes[:: len(labels) // 8].reshape(-1, SIDE).tolist()
        ],
        "budget": len(labels) * CODES,
        "bytes": count_bytes(loaded.params),
    }
    if sampling.greedy:
        plain = Artist(loaded.model, loaded.params, Codebook.load(), **options).draw(
            labels, sampling=sampling
        )
        measured["equal"] = float(np.mean(np.all(plain.codes == drawing.codes, axis=(1, 2))))
    return measured


def score(loaded: Loaded, labels: list[int], codes: np.ndarray) -> list[float]:
    """Mean nats a code of every image under the target, without guidance."""
    flat = codes.reshape(len(codes), -1)
    tokens = np.concatenate([config.CODES + np.asarray(labels)[:, None], flat[:, :-1]], axis=1)
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, jnp.asarray(tokens, jnp.int32))
    log_p = jax.nn.log_softmax(logits[..., : config.CODES])
    return (-np.take_along_axis(np.asarray(log_p), flat[..., None], axis=-1)[..., 0].mean(axis=1)).tolist()


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def standard_errors(results: Results, arm: str) -> float:
    """How far the arm's mean nats are from those of plain sampling, in standard errors of the difference: images
    vary within a class of a seed, and every arm has equally many of each."""
    scores = [np.reshape(results[name]["nats"], (-1, len(PICTURES), PER_CLASS)) for name in ("plain", arm)]
    variance = sum(np.mean(np.var(x, axis=-1, ddof=1)) / x.size for x in scores)
    return float((scores[1].mean() - scores[0].mean()) / np.sqrt(variance))


def judge(results: Results) -> tuple[str, str]:
    """Holds when sampling takes at most half the calls with a window of 16, the ratio test beats matching, every
    window beats the smaller one, the best neighbour beats a random guess, greedy images are equal, and no arm's
    images score otherwise than plain ones (three standard errors)."""
    calls = {arm: mean(results, arm, "calls") for arm in results if "calls" in results[arm]}
    saved = {arm: CODES / value for arm, value in calls.items()}
    best = min(RULES, key=lambda rule: calls[f"SJD 16 {rule}"])
    windows = [calls[f"SJD {window}"] for window in WINDOWS]
    kept = ["Jacobi 16", *(f"SJD {w}" for w in WINDOWS), *(f"SJD 16 {rule}" for rule in RULES)]
    off = max((standard_errors(results, arm) for arm in kept), key=abs)
    equal = mean(results, "greedy Jacobi 16", "equal")
    held = [
        saved["SJD 16"] >= 2,
        calls["SJD 16"] < calls["Jacobi 16"],
        windows == sorted(windows, reverse=True),
        calls[f"SJD 16 {best}"] < calls["SJD 16"],
        equal == 1,
        abs(off) < 3,
    ]
    verdict = "yes" if all(held) else "partly" if any(held) else "no"
    return verdict, (
        f"Codes per call: plain sampling {saved['plain']:.2f}, Jacobi decoding {saved['Jacobi 16']:.2f}, SJD "
        f"{saved['SJD 8']:.2f}, {saved['SJD 16']:.2f} and {saved['SJD 32']:.2f} with windows of 8, 16 and 32 (paper: "
        f"about 2), {saved[f'SJD 16 {best}']:.2f} with the best initialisation ({best}), "
        f"{saved['SJD 16 guided']:.2f} with guidance and top-k, greedy Jacobi {saved['greedy Jacobi 16']:.2f} "
        f"({equal:.0%} of its images equal to greedy decoding's); the images' scores differ from plain sampling's "
        f"by at most {abs(off):.1f} standard errors."
    )


def figure(results: Results, path: Path) -> None:
    """Calls an image takes in every arm; beside them real images and drawn ones of every class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.6), width_ratios=(2, 3), constrained_layout=True
    )
    arms = [arm for arm in results if "calls" in results[arm]]
    places = np.arange(len(arms))[::-1]
    found = [results[arm]["calls"] for arm in arms]
    left.barh(places, [np.mean(x) for x in found], xerr=[np.std(x) for x in found], color="C0", alpha=0.8)
    left.set_yticks(places, arms)
    left.set(xlabel=f"calls of the model for an image of {CODES} codes")

    rows = {"real, quantised": real_images()}
    for arm, name in SHOWN.items():
        codes = [list(row.to_bytes(SIDE, "big")) for row in results[arm]["images"][0]]
        images = Codebook.load().decode(np.reshape(codes, (-1, SIDE, SIDE)))
        rows[f"{name}\n{mean(results, arm, 'calls'):.0f} calls"] = images
    gap = 2
    height, width = (side + gap for side in next(iter(rows.values())).shape[1:3])
    sheet = np.ones((len(rows) * height, len(PICTURES) * width))
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images):
            sheet[i * height : (i + 1) * height - gap, j * width : (j + 1) * width - gap] = image[..., 0]
    right.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    right.set_yticks((np.arange(len(rows)) + 0.5) * height, list(rows))
    right.set_xticks((np.arange(len(PICTURES)) + 0.5) * width, PICTURES)
    right.tick_params(length=0)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def real_images() -> np.ndarray:
    """One training crop of every class, through the codebook."""
    data = PhotographDataset("train")
    records = data.take(np.arange(400))
    chosen = [int(np.flatnonzero(records["labels"] == label)[0]) for label in range(len(PICTURES))]
    codebook = Codebook.load()
    return codebook.decode(codebook.encode(records["images"][chosen]))


def arm(
    proposer: type[SJD] | None,
    description: str,
    sampling: Sampling = Sampling(temperature=1.0),  # noqa: B008  (frozen)
    guidance: float | None = None,
    **fields: Any,
) -> Arm:
    made = None if proposer is None else proposer(codes=config.CODES, rows=SIDE, columns=SIDE, **fields)
    return Arm(functools.partial(draw, made, sampling, guidance), description, needs=("target",))


CLAIM = Claim(
    system="sjd",
    paper="arXiv 2410.01699, abstract and sections 4 and 5",
    statement="Speculative Jacobi decoding accelerates auto-regressive text-to-image generation about 2 times without "
    "training and without loss of visual quality, where Jacobi decoding with a deterministic criterion fails under "
    "sampling; spatial initialisation helps further on simple images.",
    setting="A class-conditional decoder of 0.7M parameters over 16 x 16 codes (256 vectors of 2 x 2 grey pixels), "
    f"trained for {STEPS} updates of {BATCH} crops of eight photographs; {PER_CLASS} images of each of the 8 classes "
    "an arm, 256 codes each, temperature 1, the class as the prompt; guided: scale 2 and top-k 64; three seeds, each "
    "with a target of its own. A call is one forward of the target, prefill included; on a CPU calls are compared, "
    "not seconds.",
    measures={
        "loss": "held-out nats a code",
        "calls": "an image",
        "codes per call": "plain is 1",
        "wasted": "drafted and not kept, an image",
        "nats": "a code of every drawn image, under the target",
        "equal": "share of greedy images",
        "images": "one of every class, a row of codes being a number in base 256",
    },
    budget="codes trained on or drawn",
    arms={
        "target": Arm(train, "trains the target that all arms decode"),
        "plain": arm(None, "plain sampling, a call for every code"),
        "Jacobi 16": arm(Jacobi, "Jacobi decoding, window 16: kept where a fresh draw matches", window=16),
        **{f"SJD {w}": arm(SJD, f"SJD, window {w}, random initialisation", window=w) for w in WINDOWS},
        **{
            f"SJD 16 {rule}": arm(SJD, f"SJD, window 16, {rule}", window=16, init_rule=rule) for rule in RULES
        },
        "SJD 16 guided": arm(
            SJD,
            "SJD, window 16, guidance 2 and top-k 64",
            Sampling(temperature=1.0, top_k=64),
            2.0,
            window=16,
        ),
        "greedy Jacobi 16": arm(SJD, "temperature 0, window 16", Sampling(), window=16),
    },
    judge=judge,
    figure=figure,
)
