"""ADED: a trigram table that adapts to the text, against the same table left as the corpus made it.

Both search and draft alike; only the gain of the online update differs. Prompt lookup, the other drafter without
training, stands beside them. Nothing that is decoded is in the corpus of the table.
"""

import functools
import statistics
from pathlib import Path

import jax

from experiments.claims.drafting import KINDS, decode, selected, target
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.decoding.proposers import Target
from research.decoding.sampling import Sampling
from research.decoding.speculative.aded import ADED, Table
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.nn.accounting import count_bytes

RECORDS, LENGTH = 8192, 256  # rows of the corpus and their tokens
MODES = {"greedy": Sampling(), "sampled": Sampling(temperature=0.7)}
MEASURES = ("tokens_per_call", "speed", "equal", "loopiness")


@functools.cache
def table() -> Table:
    return ADED(records=RECORDS).create(jax.random.key(0), Target(target().params, target().model))


def run(
    drafter: ADED | PromptLookup, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict:
    params = table() if isinstance(drafter, ADED) else ()
    measured = {}
    for i, (mode, sampling) in enumerate(MODES.items()):
        progress((1 + i) / 3, mode)
        found = decode(drafter, params, KINDS, sampling=sampling, count=8, seed=seed)
        measured |= {f"{mode} {name}": value for name, value in selected(found, *MEASURES).items()}
        measured[f"{mode} drafted"] = sum(part["drafted"] for part in found.values()) / sum(
            part["calls"] for part in found.values()
        )
    return measured | {"budget": RECORDS * LENGTH if params else 0, "bytes": count_bytes(params)}


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def judge(results: Results) -> tuple[str, str]:
    """Holds if the online update gains tokens a call on every kind of text in both modes, and decoding is faster than
    plain; partly if it gains in some."""
    gains = {
        (mode, kind): mean(results, "adaptive", f"{mode} {kind} tokens_per_call")
        - mean(results, "fixed", f"{mode} {kind} tokens_per_call")
        for mode in MODES
        for kind in KINDS
    }
    rows = "; ".join(
        f"{mode} {kind} {mean(results, 'fixed', f'{mode} {kind} tokens_per_call'):.2f} -> "
        f"{mean(results, 'adaptive', f'{mode} {kind} tokens_per_call'):.2f} "
        f"(prompt lookup {mean(results, 'prompt lookup', f'{mode} {kind} tokens_per_call'):.2f}, "
        f"speed {mean(results, 'adaptive', f'{mode} {kind} speed'):.2f})"
        for mode, kind in gains
    )
    positive = sum(gain > 0 for gain in gains.values())
    speeds = [mean(results, "adaptive", f"{mode} {kind} speed") for mode, kind in gains]
    verdict = "yes" if positive == len(gains) and min(speeds) > 1 else "partly" if positive else "no"
    return verdict, (
        f"tokens a call, fixed table -> adaptive: {rows}. The search takes longer than a call of a target this "
        "small, so the wall clock is not the paper's."
    )


def figure(results: Results, path: Path) -> None:
    """Tokens a call of the three drafters, by kind of text and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, constrained_layout=True)
    for panel, mode in zip(panels, MODES, strict=True):
        for i, arm in enumerate(results):
            found = [results[arm][f"{mode} {kind} tokens_per_call"] for kind in KINDS]
            places = [place + 0.27 * (i - 1) for place in range(len(KINDS))]
            spread = [statistics.pstdev(values) for values in found]
            panel.bar(places, [statistics.fmean(v) for v in found], 0.25, yerr=spread, capsize=3, label=arm)
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set(xticks=range(len(KINDS)), xticklabels=KINDS, title=mode, ylabel="tokens per call")
    panels[0].legend()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="aded",
    paper="arXiv 2407.12021, abstract and section 4",
    statement="A trigram table that is updated with the model's own output, searched by Monte-Carlo tree search, gives "
    "drafts that adapt to the text and speeds decoding up without any training.",
    setting="The shipped base model decodes 8 prompts of each kind, 96 tokens each; table of 2.1M training tokens, 150 "
    "iterations, depth 4, 24 paths, 64 nodes; greedy and at temperature 0.7; three seeds (of the search and of the "
    "sampling). `copy` prompts repeat a passage; `loopiness` is the share of repeated 8-grams in the output.",
    measures={
        **{
            f"{mode} {kind} {name}": unit
            for mode in MODES
            for kind in KINDS
            for name, unit in zip(
                MEASURES, ("tokens", "x plain", "share", "share of repeated 8-grams"), strict=True
            )
        },
        **{f"{mode} drafted": "tokens a call" for mode in MODES},
    },
    budget="corpus tokens",
    arms={
        "fixed": Arm(functools.partial(run, ADED(gain=0.0)), "the table as the corpus made it"),
        "adaptive": Arm(functools.partial(run, ADED()), "the same, updated before every draft"),
        "prompt lookup": Arm(
            functools.partial(run, PromptLookup()), "what follows the last n-gram in the text"
        ),
    },
    judge=judge,
    figure=figure,
)
