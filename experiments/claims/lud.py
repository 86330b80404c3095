"""LUD: what speed costs in quality. Tokens a call, and how good the target finds what was said, over beta.

Two tuned models a seed: with units that the target was sure of, and with every run of four tokens taken for one. Each
decodes at several thresholds without any check, and once with one.
"""

import functools
import statistics
from pathlib import Path

import jax
import numpy as np

from experiments.claims.drafting import KINDS, decode, fit, prompts, target
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from experiments.claims.medusa import nats
from research.config import of
from research.data.text import TokenDataset
from research.decoding.speculative.lud import LUD, Unchecked
from research.nn.accounting import count_bytes
from research.training.task import LanguageModelling

SPAN = 4
BETAS = (1.01, 0.95, 0.9, 0.7, 0.5, 0.3)
TEXTS = KINDS[:2]  # of copies a language model this small makes none
STEPS, BATCH, LENGTH = 60, 8, 128
OPTIONS = dict(count=8, new_tokens=64)


def run(alpha: float, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    config = of(LUD, length=SPAN, alpha=alpha, anchors=16)
    common = dict(steps=STEPS, batch_size=BATCH, length=LENGTH, weight_decay=0.0)
    params = fit(config, seed, workdir, progress, peak=3e-4, text="corpus", **common)
    tuned = params["model"]
    placeholder = {"placeholder": params["placeholder"]}
    measured: dict = {
        name: []
        for kind in TEXTS
        for name in (f"{kind} tokens", f"{kind} nats", f"{kind} same", f"{kind} loops")
    }
    plain: dict[str, list[list[int]]] = {}  # what the first threshold gives: nothing is said in parallel
    for i, beta in enumerate(BETAS):
        drafter = LUD(SPAN, alpha, beta)
        found = decode(
            drafter, placeholder, TEXTS, verifier=Unchecked(), seed=seed, target_params=tuned, **OPTIONS
        )
        for kind in TEXTS:
            outputs = found[kind]["outputs"]
            measured[f"{kind} tokens"].append(found[kind]["tokens_per_call"])
            measured[f"{kind} nats"].append(nats(prompts(kind, OPTIONS["count"]), outputs))
            measured[f"{kind} same"].append(agreement(outputs, plain.setdefault(kind, outputs)))
            measured[f"{kind} loops"].append(found[kind]["loopiness"])
        progress(0.7 + 0.25 * i / len(BETAS), f"beta {beta}")
    checked = decode(
        LUD(SPAN, alpha, 0.3, checked=True), placeholder, TEXTS, seed=seed, target_params=tuned, **OPTIONS
    )
    for kind in TEXTS:
        measured[f"{kind} checked"] = checked[kind]["tokens_per_call"]
        measured[f"{kind} equal"] = checked[kind]["equal"]
    measured["held-out loss"] = loss(tuned)
    measured["loss before"] = loss(target().params)
    return measured | {"budget": STEPS * BATCH * LENGTH, "bytes": count_bytes(tuned)}


def agreement(outputs: list[list[int]], plain: list[list[int]]) -> float:
    """Share of the tokens before the first that differs from plain decoding."""
    shares = []
    for output, expected in zip(outputs, plain, strict=True):
        same = [a == b for a, b in zip(output, expected, strict=False)]
        shares.append((same.index(False) if False in same else len(same)) / max(len(expected), 1))
    return statistics.fmean(shares)


def loss(params) -> float:
    """Nats a token of the model, one token at a time, on validation text."""
    data = TokenDataset(split="validation", length=LENGTH, shuffle=False)
    task = LanguageModelling(target().model)
    total, weight = jax.jit(lambda p, b: task.evaluate(p, b)["loss"])(params, data.take(np.arange(64)))
    return float(total / weight)


def curve(results: Results, arm: str, name: str) -> np.ndarray:
    """[betas], mean over seeds and kinds of text."""
    return np.mean([np.mean(results[arm][f"{kind} {name}"], axis=0) for kind in TEXTS], axis=0)


def judge(results: Results) -> tuple[str, str]:
    """Holds if at beta = 0.9 a call gives 1.3 tokens or more and what is said costs at most 3 % more nats than
    without parallel tokens; partly if 1.1 tokens or more at that cost."""
    at = BETAS.index(0.9)
    tokens, cost = curve(results, "units", "tokens"), curve(results, "units", "nats")
    others, other_cost = curve(results, "all spans", "tokens"), curve(results, "all spans", "nats")
    rise = float(cost[at] / cost[0] - 1)
    cheap = rise <= 0.03
    verdict = "yes" if cheap and tokens[at] >= 1.3 else "partly" if cheap and tokens[at] >= 1.1 else "no"
    # What the others cost where they are as fast, between the thresholds that were tried.
    alike = float(np.interp(tokens[at], others, other_cost))
    same = curve(results, "units", "same")
    checked = statistics.fmean(statistics.fmean(results["units"][f"{kind} checked"]) for kind in TEXTS)
    equal = statistics.fmean(statistics.fmean(results["units"][f"{kind} equal"]) for kind in TEXTS)
    before, after = (statistics.fmean(results["units"][name]) for name in ("loss before", "held-out loss"))
    return verdict, (
        f"At beta 0.9 a call gives {tokens[at]:.2f} tokens and what is said costs {rise:+.1%} nats under the model "
        f"before tuning; {same[at]:.0%} of it is as without parallel tokens. At beta {BETAS[-1]}: "
        f"{tokens[-1]:.2f} tokens, {cost[-1] / cost[0] - 1:+.1%}. Tuned on all runs of {SPAN}: "
        f"{others[at]:.2f} tokens at beta 0.9, and at equal tokens {alike / other_cost[0] - 1:+.1%}. Checked, the "
        f"guesses give {checked:.2f} tokens a call and the tuned model's own output in {equal:.0%} of the prompts. "
        f"Tuning moved the held-out loss from {before:.3f} to {after:.3f} nats."
    )


def figure(results: Results, path: Path) -> None:
    """Quality against speed, one point for each threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    labels = {
        "nats": "nats a token under the model before tuning",
        "same": "share said as without parallel tokens",
    }
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        for arm, colour in zip(results, ("C0", "C3"), strict=True):
            tokens, values = curve(results, arm, "tokens"), curve(results, arm, name)
            panel.plot(tokens, values, "o-", color=colour, label=arm)
            for beta, x, y in zip(BETAS, tokens, values, strict=True):
                panel.annotate(f"{beta:g}", (x, y), xytext=(3, 4), textcoords="offset points", fontsize=7)
        panel.set(xlabel="tokens gained a call", ylabel=label)
    panels[0].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="lud",
    paper="arXiv 2405.15208, abstract",
    statement="Lexical units decoded in parallel speed up text generation by 33 % with no loss of quality, and code "
    "by 30 % with a loss of 3 %.",
    setting=f"The base model that ships (7.3M parameters), tuned for {STEPS} updates of {BATCH} rows of {LENGTH} "
    f"tokens of its corpus, 16 units of each row; units of up to {SPAN} tokens that it gives at least 0.9, or every "
    "run of as many. 8 prompts of a kind, 64 tokens, greedy, no check; two seeds.",
    measures={
        **{
            f"{kind} {name}": unit
            for kind in TEXTS
            for name, unit in (
                ("tokens", f"tokens a call at beta {', '.join(map(str, BETAS))}"),
                ("nats", "nats a token under the model before tuning"),
                ("same", "share before the first token unlike plain decoding's"),
                ("loops", "share of repeated 8-grams"),
                ("checked", "tokens a call, checked"),
                ("equal", "share of prompts, checked"),
            )
        },
        "held-out loss": "nats, one token at a time",
        "loss before": "nats, of the model before tuning",
    },  # fmt: skip
    budget="training tokens",
    arms={
        "units": Arm(functools.partial(run, 0.9), "tuned on runs of which the model was sure"),
        "all spans": Arm(functools.partial(run, 0.0), "tuned on all runs of four tokens"),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
