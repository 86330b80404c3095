"""Hydra and Hydra++ against Medusa: the same heads in number, the same tree, data and updates.

The tree is the one with the greatest expected number of accepted tokens for Medusa's heads of the same seed, by how
often each rank is right on validation text, so that it favours the baseline.
"""

import functools
import statistics
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments.claims.drafting import decode, fit, rank_accuracy, selected
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.decoding.sampling import Sampling
from research.decoding.speculative.hydra import Hydra
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.trees import Path as Ranks
from research.decoding.speculative.trees import RankTree, build_static_tree, chain_paths
from research.nn.accounting import count_bytes

HEADS, BUDGET = 3, 15  # drafted tokens of a call
STEPS, BATCH, LENGTH = 100, 8, 96
KINDS = ("code", "prose")
MODES = {"greedy": Sampling(), "sampled": Sampling(temperature=0.7)}
NAMES = ("tokens_per_call", "speed", "equal", "loopiness")
PLUS = dict(num_layers=2, prefix_layer=True, teacher="target")


def drafter(arm: str, paths: tuple[Ranks, ...]) -> ConfigDict:
    tree = of(RankTree, paths=paths)
    if arm == "medusa":
        return of(Medusa, tree=tree, num_heads=HEADS, decay=1.0)  # heads count alike, as in Hydra
    return of(Hydra, tree=tree, num_heads=HEADS, **(PLUS if arm == "hydra++" else {}))


def train(arm: str, seed: int, workdir: Path, progress: Progress):
    return fit(
        drafter(arm, chain_paths(HEADS)),
        seed,
        workdir,
        progress,
        steps=STEPS,
        batch_size=BATCH,
        length=LENGTH,
        text="corpus",  # in another order with every seed
        peak=1e-3,
        weight_decay=0.0,
    )


def run(arm: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    params = train(arm, seed, workdir, progress)
    accuracy = rank_accuracy(build(drafter(arm, chain_paths(HEADS))), params, length=LENGTH)
    baseline = accuracy
    if needs:
        heads = train("medusa", seed, needs["medusa"].workdir, progress)
        baseline = rank_accuracy(build(drafter("medusa", chain_paths(HEADS))), heads, length=LENGTH)
    proposer = build(drafter(arm, build_static_tree(baseline, BUDGET)))
    measured = {"agreement": accuracy[:, 0], "budget": STEPS * BATCH * LENGTH, "bytes": count_bytes(params)}
    for mode, sampling in MODES.items():
        found = decode(proposer, params, KINDS, sampling=sampling, count=8, new_tokens=64, seed=seed)
        measured |= {f"{mode} {name}": value for name, value in selected(found, *NAMES).items()}
        progress(0.85, mode)
    return measured


def gains(results: Results, arm: str, mode: str, name: str = "tokens_per_call") -> np.ndarray:
    """Tokens a call, or another measure, mean over kinds, by seed."""
    return np.mean([results[arm][f"{mode} {kind} {name}"] for kind in KINDS], axis=0)


def judge(results: Results) -> tuple[str, str]:
    """Holds if in both modes Hydra gains more tokens a call than Medusa with every seed and Hydra++ more than Hydra in
    the mean, and their speeds are in that order too; partly if Hydra gains more than Medusa."""
    found = {mode: [gains(results, arm, mode) for arm in ("medusa", "hydra", "hydra++")] for mode in MODES}
    first = all(np.all(hydra > medusa) for medusa, hydra, _ in found.values())
    second = all(plus.mean() > hydra.mean() for _, hydra, plus in found.values())
    shown = "; ".join(
        f"{mode} " + ", ".join(f"{x.mean():.2f} +- {x.std():.2f}" for x in arms)
        for mode, arms in found.items()
    )
    last = [
        statistics.fmean(a[-1] for a in results[arm]["agreement"]) for arm in ("medusa", "hydra", "hydra++")
    ]
    speed = [
        statistics.fmean(gains(results, arm, mode, "speed").mean() for mode in MODES)
        for arm in ("medusa", "hydra", "hydra++")
    ]
    verdict = "yes" if first and second and speed == sorted(speed) else "partly" if first else "no"
    return verdict, (
        f"Tokens a call of Medusa, Hydra and Hydra++: {shown}. On the clock, plain decoding = 1: "
        f"{', '.join(f'{x:.2f}' for x in speed)}. Their head {HEADS} is right at "
        f"{', '.join(f'{x:.0%}' for x in last)} of the places of validation text."
    )


def figure(results: Results, path: Path) -> None:
    """Tokens a call by mode and kind, and how often each head is right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (bars, lines) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    groups = [(mode, kind) for mode in MODES for kind in KINDS]
    for number, arm in enumerate(results):
        found = [results[arm][f"{mode} {kind} tokens_per_call"] for mode, kind in groups]
        places = np.arange(len(groups)) + 0.27 * (number - 1)
        bars.bar(places, np.mean(found, axis=1), 0.25, yerr=np.std(found, axis=1), capsize=3, label=arm)
        agreement = np.asarray(results[arm]["agreement"])
        lines.errorbar(
            range(1, HEADS + 1), agreement.mean(0), agreement.std(0), fmt="o-", capsize=3, label=arm
        )
    bars.set_xticks(range(len(groups)), [f"{mode}\n{kind}" for mode, kind in groups])
    bars.set_ylabel(f"tokens gained a call, {BUDGET} nodes")
    lines.set(xlabel="head", ylabel="first guess right, given the tokens before", xticks=range(1, HEADS + 1))
    bars.legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="hydra",
    paper="arXiv 2402.05109, abstract and sections 5 and 6",
    statement="Heads that depend on the tokens drafted before theirs have more of them accepted than Medusa's, and the "
    "recipe Hydra++ (teacher, deeper heads, a prefix layer) still more: 1.11 and 1.31 times Medusa's throughput.",
    setting=f"{HEADS} heads for the shipped base model of 7.3M parameters, {STEPS} updates of {BATCH} x {LENGTH} "
    f"tokens of Python's standard library in every arm, one tree of {BUDGET} nodes for all, the best for Medusa's "
    "heads. Hydra++ has two layers a head and no dropout, for so few updates. 8 held-out prompts a kind, 64 tokens "
    "each, greedy and at temperature 0.7; three seeds. Wall clock is information.",
    measures={
        **{
            f"{mode} {kind} {name}": unit
            for mode in MODES
            for kind in KINDS
            for name, unit in (
                ("tokens_per_call", "plain is 1"),
                ("speed", "x plain"),
                ("equal", "share of prompts"),
                ("loopiness", "share of repeated 8-grams"),
            )
        },
        "agreement": "share, by head",
    },
    budget="training tokens",
    arms={
        "medusa": Arm(functools.partial(run, "medusa"), "heads that know the hidden state alone"),
        "hydra": Arm(functools.partial(run, "hydra"), "and the path's tokens", needs=("medusa",)),
        "hydra++": Arm(
            functools.partial(run, "hydra++"), "and a prefix layer, the target as teacher", needs=("medusa",)
        ),
    },
    judge=judge,
    figure=figure,
)
