"""PAT against pruning before and after fine-tuning: a quarter of the residual stream's channels away.

The shipped model learns NumPy's type stubs with low-rank adapters. PAT learns a mask meanwhile; the others are pruned
by size: a channel's score is the sum over the kernels that read it of its mean square there times the squares of its
row, and the least are cut out. What is measured of PAT and of pruned models is the smaller model.
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
from research.adapters.lora import LoRA, flat, merge
from research.adapters.pat import PAT, READERS
from research.nn.accounting import count_bytes
from research.training.observe import collect_grams

STUBS = str(Path(np.__file__).parent / "**" / "*.pyi")
STEPS, PRUNE, RATE, PROXY_RATE = 60, 36, 2e-3, 8.0
KEEP = 0.75
# PAT's factors of rank 8 and modules of rank 16 are as many numbers as low-rank terms of rank 11.
METHOD = PAT(rank=8, dropout=0.0, alpha=None, keep=KEEP, mixing_rank=16, steps=PRUNE)
PLAIN = LoRA(rank=11)


def held(seed: int) -> Any:
    return rows(STUBS, "test", 32)


def cut(model: Any, params: Any, seed: int) -> tuple[Any, Any]:
    """The model without the least of its channels, by the scores above; through PAT's own merge."""
    batches = dataset(STUBS, "train", seed).batches(0, BATCH)
    calibration = [next(batches) for _ in range(8)]
    readers = [
        path for path in flat(params) if path.rpartition("/")[0].endswith(READERS) and "head" not in path
    ]
    grams = collect_grams(model, params, calibration, lambda path: path in readers)
    squares = (
        np.diag(grams[path].mean()) * np.square(np.asarray(flat(params)[path])).sum(axis=1)
        for path in readers
    )
    scores = np.sum(list(squares), axis=0)
    least = np.argsort(scores)[: len(scores) - METHOD.target(len(scores))]
    fixed, adapter = METHOD.create(model, params, jax.random.key(0))
    proxy = jnp.ones(len(scores)).at[jnp.asarray(least)].set(-1.0)
    whole = {
        "base": METHOD.frozen(params, fixed),
        "fixed": {**fixed, "step": jnp.int32(PRUNE)},
        "adapter": {**adapter, "proxy": proxy},
    }
    return METHOD.merge(model, whole)[:2]


def tuned(model: Any, params: Any, seed: int, workdir: Path) -> Any:
    """The parameters, fine-tuned by plain LoRA and merged."""
    _, adapter = PLAIN.create(model, params, jax.random.key(seed))
    began = {"base": params, "fixed": {}, "adapter": adapter}
    after, _ = tune(model, PLAIN, began, updates(STUBS, STEPS, seed), RATE, jax.random.key(seed))
    return merge(PLAIN.unpack(after))[0]


def baseline(
    order: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """`order`: what is done to the shipped model, letter by letter: T tunes, P prunes."""
    model, params = shipped().model, shipped().params
    for number, letter in enumerate(order):
        progress(0.1 + number / len(order), {"T": "tuning", "P": "pruning"}[letter])
        if letter == "P":
            model, params = cut(model, params, seed)
        else:
            params = tuned(model, params, seed, workdir)
    return result(model, params, seed)


def result(model: Any, params: Any, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "loss": float(nats(model, None, params, held(seed))),
        "channels": int(model.width),
        **more,
        "budget": STEPS * BATCH * LENGTH,
        "bytes": count_bytes(params),
    }


def pat(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    progress(0.1, "tuning and pruning")
    params = start(METHOD, seed)
    rates = jax.tree.map(lambda _: 1.0, params["adapter"])
    rates["proxy"] = -PROXY_RATE  # only until the mask is 0 or 1
    model = METHOD.model(shipped().model)
    batches = updates(STUBS, STEPS, seed)
    after, losses = tune(model, METHOD, params, batches, RATE, jax.random.key(seed), rates, PRUNE)
    progress(0.9, "merging")
    small, merged, _ = METHOD.merge(shipped().model, after)
    return result(
        small, merged, seed, curve=[float(x) for x in np.asarray(losses).reshape(-1, 4).mean(axis=1)]
    )


def losses_of(results: Results, arm: str) -> np.ndarray:
    return values(results, arm, "loss")


ARMS = {
    "LoRA, unpruned": "T",
    "pruned": "P",
    "prune, then LoRA": "PT",
    "LoRA, then prune": "TP",
}


def judge(results: Results) -> tuple[str, str]:
    """Yes where with every seed PAT's small model is better than pruning before and after tuning, with no more channels
    than they keep; partly where that is so against one of them."""
    target = METHOD.target(shipped().model.width)
    fair = max(results["PAT"]["channels"]) <= target
    better = [bool((losses_of(results, "PAT") < losses_of(results, arm)).all()) for arm in list(ARMS)[2:]]
    verdict = "yes" if fair and all(better) else "partly" if fair and any(better) else "no"
    shown = ", ".join(f"{arm} {losses_of(results, arm).mean():.3f}" for arm in (*ARMS, "PAT"))
    channels = ", ".join(map(str, results["PAT"]["channels"]))
    return verdict, f"Nats per token: {shown}. PAT kept {channels} channels, {target} were asked for."


def figure(results: Results, path: Path) -> None:
    """Losses, and how PAT's training goes."""
    with two_panels(path, (10, 4)) as (left, right):
        arms = [*ARMS, "PAT"]
        means, errors = zip(*(centre(losses_of(results, arm)) for arm in arms), strict=True)
        left.barh(arms, means, xerr=errors)
        left.set(xlabel="nats per token, type stubs", title="After pruning to 3/4 of the channels and tuning")
        left.invert_yaxis()
        for curve in results["PAT"]["curve"]:
            right.plot(4 * np.arange(len(curve)) + 2, curve, color="C0")
        right.axvline(PRUNE, color="0.6", linewidth=0.8)
        right.set(xlabel="update", ylabel="training loss", title="PAT; at the line the mask is 0 or 1")


CLAIM = Claim(
    system="pat",
    paper="arXiv 2408.14721, table 1",
    statement="Pruning-aware tuning outperforms pruning before and after LoRA at 20 to 30 % of the channels, and "
    "even LoRA "
    "on the unpruned model.",
    setting=f"The shipped base model of 7.3M parameters and width 256, to keep {KEEP:.0%} of its channels; {STEPS} "
    f"updates of "
    f"{BATCH} x {LENGTH} tokens of NumPy's type stubs with Adam at rate {RATE}, the mask's proxy {PROXY_RATE:g} times "
    f"as "
    f"fast, 0 or 1 after {PRUNE}. LoRA of rank 11 has as many trained numbers as PAT (rank 8, modules of rank 16). "
    f"Two seeds.",
    measures={
        "loss": "nats/token, held-out type stubs",
        "channels": "of the residual stream, afterwards",
        "curve": "training nats/token, means of 4 updates",
    },
    budget="training tokens",
    arms={
        **{
            arm: Arm(functools.partial(baseline, order), what)
            for (arm, order), what in zip(
                ARMS.items(),
                (
                    "all channels",
                    "channels of the least score cut out, no training",
                    "the same, then LoRA on the smaller model",
                    "LoRA, merged, then the same",
                ),
                strict=True,
            )
        },
        "PAT": Arm(pat, "mask, mixing and LoRA together, merged into a smaller model"),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
