"""Clover: against Medusa, and its dynamic tree of four candidates against fixed shapes of four.

Both drafters are trained for the same steps on the same batches, with three guesses unrolled. A call checks at most
four drafted tokens, Clover's setting of large batches: a chain of three or four, a fan of the four best next tokens,
Medusa's best fixed tree of four, or Clover's dynamic tree.
"""

import dataclasses
import statistics
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments.claims.drafting import decode, fit, rank_accuracy, selected
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import of
from research.decoding.proposers import Proposer
from research.decoding.sampling import Sampling
from research.decoding.speculative.clover import Clover
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.trees import RankTree, build_static_tree, chain_paths
from research.nn.accounting import count_bytes

GUESSES, BUDGET = 3, 4
STEPS, BATCH, LENGTH = 120, 8, 128
KINDS = ("code", "prose")
MODES = {"greedy": Sampling(), "sampled": Sampling(temperature=0.7)}

CLOVER = Clover(depth=GUESSES, budget=BUDGET, layers=1)
CLOVER_SHAPES = {
    "chain of 3": dataclasses.replace(CLOVER, budget=GUESSES, top_p=0.0),
    "chain of 4": dataclasses.replace(CLOVER, depth=BUDGET, top_p=0.0),  # the cell is recurrent: it can go on
    "fan of 4": dataclasses.replace(CLOVER, depth=1, top_p=1.0, floor=0.0),
    "dynamic 4": dataclasses.replace(CLOVER, depth=BUDGET),
}


def train(drafter: ConfigDict, seed: int, workdir: Path, progress: Progress):
    options = dict(steps=STEPS, batch_size=BATCH, length=LENGTH, weight_decay=0.0)
    return fit(drafter, seed, workdir, progress, **options)


def measure(shapes: dict[str, Proposer], params, progress: Progress, seed: int) -> dict:
    measured = {}
    for i, (shape, proposer) in enumerate(shapes.items()):
        for mode, sampling in MODES.items():
            progress(0.7 + 0.3 * i / len(shapes), f"{shape}, {mode}")
            found = decode(proposer, params, KINDS, sampling=sampling, count=12, new_tokens=64, seed=seed)
            names = ("tokens_per_call", "speed", "equal", "loopiness")
            measured |= {f"{shape}, {mode} {name}": value for name, value in selected(found, *names).items()}
    budget = STEPS * BATCH * LENGTH
    return measured | {"budget": budget, "bytes": count_bytes(params)}


def clover(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict:
    params = train(of(Clover, depth=GUESSES, budget=BUDGET, layers=1), seed, workdir, progress)
    return measure(CLOVER_SHAPES, params, progress, seed)


def medusa(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict:
    chain = of(RankTree, paths=chain_paths(GUESSES))
    params = train(of(Medusa, tree=chain, num_heads=GUESSES), seed, workdir, progress)
    heads = Medusa(RankTree(chain_paths(GUESSES)), num_heads=GUESSES)
    accuracy = rank_accuracy(heads, params, length=LENGTH, rows=16, top=BUDGET)
    best = RankTree(build_static_tree(accuracy, BUDGET))
    return measure(
        {"chain of 3": heads, "best fixed 4": dataclasses.replace(heads, tree=best)}, params, progress, seed
    )


def mean(results: Results, arm: str, shape: str, mode: str, name: str = "tokens_per_call") -> float:
    """Over kinds of text and seeds."""
    return statistics.fmean(
        statistics.fmean(results[arm][f"{shape}, {mode} {kind} {name}"]) for kind in KINDS
    )


def judge(results: Results) -> tuple[str, str]:
    """Holds if Clover gains more tokens a call than Medusa, and is faster on the clock, with chains and with four
    candidates, and its dynamic tree gains more than both fixed shapes of four, in both modes; partly if any of
    it is so."""
    wins, sentences = {"chains": [], "four": [], "dynamic": []}, []
    for mode in MODES:
        one, other = mean(results, "clover", "chain of 3", mode), mean(results, "medusa", "chain of 3", mode)
        four, fixed = (
            mean(results, "clover", "dynamic 4", mode),
            mean(results, "medusa", "best fixed 4", mode),
        )
        chain, fan = (mean(results, "clover", f"{shape} of 4", mode) for shape in ("chain", "fan"))
        wins["chains"].append(one > other)
        wins["four"].append(four > fixed)
        wins["dynamic"].append(four > max(chain, fan))
        sentences.append(
            f"{mode}: chains of three {one:.2f} against Medusa's {other:.2f} ({one / other - 1:+.0%}), four candidates "
            f"{four:.2f} against {fixed:.2f} ({four / fixed - 1:+.0%}), and against Clover's own chain {chain:.2f} and "
            f"fan {fan:.2f} of four"
        )
    held = [all(found) for found in wins.values()]
    pairs = (("chain of 3", "chain of 3"), ("dynamic 4", "best fixed 4"))
    speed = [
        tuple(
            statistics.fmean(mean(results, arm, shape, mode, "speed") for mode in MODES)
            for arm, shape in zip(("clover", "medusa"), pair, strict=True)
        )
        for pair in pairs
    ]
    held.append(all(one > other for one, other in speed))
    verdict = "yes" if all(held) else "partly" if any(held) else "no"
    return verdict, (
        f"Tokens a call, {'; '.join(sentences)}. On the clock, plain decoding = 1: chains {speed[0][0]:.2f} against "
        f"{speed[0][1]:.2f}, four candidates {speed[1][0]:.2f} against {speed[1][1]:.2f}."
    )


def figure(results: Results, path: Path) -> None:
    """Tokens a call of all shapes, by mode, mean over kinds of text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [("medusa", "chain of 3"), ("clover", "chain of 3"), ("medusa", "best fixed 4")]
    bars += [("clover", shape) for shape in ("chain of 4", "fan of 4", "dynamic 4")]
    drawing, panels = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, constrained_layout=True)
    for panel, mode in zip(panels, MODES, strict=True):
        for place, (arm, shape) in enumerate(bars):
            by_seed = np.mean(
                [results[arm][f"{shape}, {mode} {kind} tokens_per_call"] for kind in KINDS], axis=0
            )
            colour = "C0" if arm == "clover" else "C7"
            panel.bar(place, by_seed.mean(), 0.7, yerr=by_seed.std(), capsize=3, color=colour)
        labels = [f"{arm}\n{shape}" for arm, shape in bars]
        panel.set(xticks=range(len(bars)), title=mode, ylabel="tokens per call")
        panel.set_xticklabels(labels, fontsize=8)
        panel.axhline(1.0, color="grey", linewidth=0.8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


SHAPES = ("chain of 3", "chain of 4", "fan of 4", "dynamic 4", "best fixed 4")
UNITS = {
    "tokens_per_call": "plain is 1",
    "speed": "x plain",
    "equal": "share of prompts",
    "loopiness": "share of repeated 8-grams",
}

CLAIM = Claim(
    system="clover",
    paper="arXiv 2405.00263, abstract and section 4",
    statement="With sequential knowledge from the tokens already speculated, Clover exceeds the throughput of plain "
    "decoding by up to 91 % and 146 %, and that of Medusa by up to 37 % and 57 % (two model sizes, large batches).",
    setting="Drafters for the shipped base model of 7.3M parameters: three guesses, 120 updates of 8 x 128 tokens "
    "that the target itself wrote, AdamW, the same batches. Medusa-1 learns the tokens, Clover the target's "
    "distributions and hidden states, as in their papers; one augmenting layer. 12 held-out "
    "prompts a kind, 64 tokens each, greedy and at temperature 0.7; two seeds.",
    measures={
        f"{shape}, {mode} {kind} {name}": unit
        for shape in SHAPES
        for mode in MODES
        for kind in KINDS
        for name, unit in UNITS.items()
    },
    budget="training tokens",
    arms={
        "medusa": Arm(medusa, "heads that do not know each other's tokens"),
        "clover": Arm(clover, "the recurrent speculator"),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
