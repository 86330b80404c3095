"""CorDA: what survives when the smallest components are discarded, and what is kept and gained when they are trained.

First without training, the paper's figure 2: of every projection of the shipped model the smallest components are taken
out, those of W (SVD), of W weighted by the size of its inputs (ASVD) or by their Gram matrix in the model's own text
(CO-SVD). Then LoRA, PiSSA and CorDA in both modes learn sums in sentences at one rank and three learning rates each:
`kept` is the loss of the model's own text, `gained` that of sums, both held out.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.adapting import (
    BATCH,
    LENGTH,
    centre,
    dataset,
    nats,
    rows,
    shipped,
    start,
    tune,
    two_panels,
    updates,
    values,
)
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.adapters.corda import CorDA, damped
from research.adapters.lora import PROJECTIONS, LoRA, PiSSA, chosen_kernels, flat, tree
from research.nn.accounting import count_bytes
from research.nn.lowrank import low_rank
from research.training.observe import collect_grams

DISCARDED = (16, 32, 64, 128)  # of 256 components
RANK, STEPS = 16, 24
SAMPLES = 64  # rows of 64 tokens that orient a decomposition
RATES = {
    "LoRA": (5e-4, 2e-3, 8e-3),
    "PiSSA": (2e-4, 8e-4, 3e-3),
    "KPA": (5e-4, 2e-3, 8e-3),
    "IPA": (2e-4, 8e-4, 3e-3),
}
PLAIN = LoRA(rank=RANK)


def own_text(seed: int) -> Any:
    return dataset("builtin", "train", seed)


def discard(
    how: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """Nats of the model's own held-out text by components discarded, 0 first."""
    model, params = shipped().model, shipped().params
    kernels = chosen_kernels(params, PROJECTIONS)
    batches = own_text(seed).batches(0, 8)
    calibration = [next(batches) for _ in range(SAMPLES // 8)]
    grams = collect_grams(model, params, calibration, lambda path: path in kernels)
    small: dict[str, Any] = {}
    for number, (path, kernel) in enumerate(kernels.items()):
        progress(0.8 * number / len(kernels), "decomposing")
        weighting = None
        if how == "ASVD":  # root of the mean magnitude of every input, here its root mean square
            weighting = np.diag(grams[path].mean()) ** 0.25
        elif how == "CO-SVD":
            weighting = damped(grams[path].total)[0]
        small[path] = low_rank(np.asarray(kernel), max(DISCARDED), weighting, which="bottom")
    held = rows("builtin", "validation", 32)
    measured = []
    for count in (0, *DISCARDED):
        leaves = flat(params)
        for path, fit in small.items():
            down, up = fit.down[:, len(fit.up) - count :], fit.up[len(fit.up) - count :]
            leaves[path] = leaves[path] - jnp.asarray(down @ up, jnp.float32)
        measured.append(float(nats(model, None, tree(leaves), held)))
    return {"own text": measured, "budget": 0, "bytes": count_bytes(params)}


def adapter(name: str, seed: int) -> LoRA:
    if name in ("LoRA", "PiSSA"):
        return {"LoRA": LoRA, "PiSSA": PiSSA}[name](rank=RANK)
    mode, context = {
        "KPA": ("knowledge", own_text(seed)),
        "IPA": ("instruction", dataset("arithmetic", "train", seed)),
    }[name]
    return CorDA(rank=RANK, mode=mode, context=context, samples=SAMPLES * 8)


def train(
    name: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """By learning rate: what is kept and what is gained."""
    model = shipped().model
    progress(0.05, "decomposing")
    params = start(adapter(name, seed), seed)
    batches = updates("arithmetic", STEPS, seed)
    own, sums = rows("builtin", "validation", 32), rows("arithmetic", "validation", 32)
    before = [float(nats(model, PLAIN, params, batch)) for batch in (own, sums)]
    kept, gained = [], []
    for number, rate in enumerate(RATES[name]):
        progress(0.2 + 0.8 * number / len(RATES[name]), f"rate {rate:g}")
        tuned, _ = tune(model, PLAIN, params, batches, rate, jax.random.key(seed))
        kept.append(float(nats(model, PLAIN, tuned, own)))
        gained.append(float(nats(model, PLAIN, tuned, sums)))
    return {
        "kept": kept,
        "gained": gained,
        "before": before,
        "budget": len(RATES[name]) * STEPS * BATCH * LENGTH,
        "bytes": count_bytes(params["base"]) + count_bytes(params["adapter"]),
    }


def kept_at(results: Results, arm: str, gained: float) -> float:
    """Loss of the own text where the mean curve over rates has the loss `gained` of sums; infinite where it has not."""
    x, y = (values(results, arm, measure).mean(axis=0) for measure in ("gained", "kept"))
    order = np.argsort(x)
    return float(np.interp(gained, x[order], y[order], left=np.inf))


def judge(results: Results) -> tuple[str, str]:
    """Three statements: with every seed, CO-SVD loses less than SVD and ASVD at each count from 32; at the task
    loss that LoRA, PiSSA and KPA all reach, KPA keeps more of its own text than both; IPA's best task loss is below
    those of LoRA and PiSSA with every seed. All three for "yes", one for "partly"."""
    places = [1 + DISCARDED.index(count) for count in DISCARDED if count >= 32]
    oriented = values(results, "CO-SVD", "own text")[:, places]
    first = all((oriented < values(results, arm, "own text")[:, places]).all() for arm in ("SVD", "ASVD"))
    reached = max(values(results, arm, "gained").mean(axis=0).min() for arm in ("LoRA", "PiSSA", "KPA"))
    kept = {arm: kept_at(results, arm, reached) for arm in RATES}
    second = kept["KPA"] < min(kept["LoRA"], kept["PiSSA"])
    best = {arm: values(results, arm, "gained").min(axis=1) for arm in RATES}
    third = bool((best["IPA"] < np.minimum(best["LoRA"], best["PiSSA"])).all())
    held = first + second + third
    verdict = "yes" if held == 3 else "partly" if held else "no"
    at = 1 + DISCARDED.index(64)
    discarded = ", ".join(
        f"{arm} {values(results, arm, 'own text')[:, at].mean():.2f}" for arm in ("SVD", "ASVD", "CO-SVD")
    )
    whole = values(results, "SVD", "own text")[:, 0].mean()
    return verdict, (
        f"With 64 of 256 components discarded the own text has {discarded} nats (whole: {whole:.2f}). Own text where "
        f"sums have {reached:.2f} nats: "
        + ", ".join(f"{arm} {loss:.3f}" for arm, loss in kept.items())
        + ". Best sums: "
        + ", ".join(f"{arm} {loss.mean():.3f}" for arm, loss in best.items())
        + f" nats. Holds: discarding {'yes' if first else 'no'}, keeping {'yes' if second else 'no'}, gaining "
        f"{'yes' if third else 'no'}."
    )


def figure(results: Results, path: Path) -> None:
    """Discarding, and kept against gained."""
    with two_panels(path, (11, 4.2)) as (left, right):
        for arm in ("SVD", "ASVD", "CO-SVD"):
            mean, error = centre(values(results, arm, "own text"))
            left.errorbar((0, *DISCARDED), mean, error, fmt="o-", capsize=3, label=arm)
        left.set(
            xlabel="smallest components discarded, of 256",
            ylabel="nats per token, own text",
            title="No training",
        )
        left.legend(fontsize=8)
        for arm in RATES:
            x, y = (values(results, arm, measure) for measure in ("gained", "kept"))
            right.plot(x.mean(axis=0), y.mean(axis=0), "o-", label=arm)
            right.plot(x.T, y.T, ".", color=right.lines[-1].get_color(), alpha=0.5)
        before = np.mean([values(results, arm, "before").mean(axis=0) for arm in RATES], axis=0)
        right.axhline(before[0], color="0.7", linewidth=0.8)
        right.set(
            xlabel="nats per token, sums (gained)",
            ylabel="nats per token, own text (kept)",
            title=f"After {STEPS} updates, three learning rates; grey: before",
        )
        right.legend(fontsize=8)


CLAIM = Claim(
    system="corda",
    paper="arXiv 2406.05223, figure 2 and tables 1 and 2",
    statement="Context-oriented decomposition concentrates what a context needs in its largest components; training "
    "the smallest (KPA) forgets less than LoRA and PiSSA, training the largest of the task's context (IPA) learns "
    "better.",
    setting=f"The shipped base model of 7.3M parameters, its 42 projections. Contexts of {SAMPLES} rows of {LENGTH} "
    f"tokens (discarding) and {8 * SAMPLES} (adapters): the model's own training text, for IPA generated sums in "
    f"sentences. "
    f"Rank {RANK}, {STEPS} updates of {BATCH} x {LENGTH} tokens of sums with Adam, three learning rates an arm, two "
    f"seeds.",
    measures={
        "own text": f"nats/token with {(0, *DISCARDED)} components discarded",
        "kept": "nats/token of own text, by learning rate",
        "gained": "nats/token of sums, by learning rate",
        "before": "nats/token of own text and of sums",
    },
    budget="training tokens",
    arms={
        **{
            how: Arm(functools.partial(discard, how), what)
            for how, what in {
                "SVD": "the smallest components of W are discarded",
                "ASVD": "of W weighted by the root of its inputs' size",
                "CO-SVD": "of W weighted by its inputs' damped Gram matrix",
            }.items()
        },
        **{
            name: Arm(functools.partial(train, name), what)
            for name, what in {
                "LoRA": "factors begin with a product of 0",
                "PiSSA": "the largest components of W are trained",
                "KPA": "the smallest in the context of the model's own text",
                "IPA": "the largest in the context of the sums",
            }.items()
        },
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
