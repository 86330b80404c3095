"""Hidden Transfer: from which layer the states of future tokens are best made, and against Medusa's heads.

Every arm trains three linear maps after one layer of the frozen target, as long as Medusa trains its heads, and drafts
the tree of 15 that is best for how often each rank is right on validation text.
"""

import functools
import statistics
from pathlib import Path

import numpy as np

from experiments.claims.drafting import decode, fit, rank_accuracy, selected
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.decoding.sampling import Sampling
from research.decoding.speculative.hidden_transfer import HiddenTransfer
from research.decoding.speculative.medusa import Medusa
from research.decoding.speculative.trees import RankTree, build_static_tree, chain_paths
from research.nn.accounting import count_bytes, count_parameters

STEPS_AHEAD, BUDGET = 3, 15
LAYERS = (2, 4, 6)  # of 6: after the last, no layer is left to refine the guess
STEPS, BATCH, LENGTH = 80, 8, 128
KINDS = ("code", "prose")
MODES = {"greedy": Sampling(), "sampled": Sampling(temperature=0.7)}
OPTIONS = dict(count=8, new_tokens=64)
NAMES = ("tokens_per_call", "speed", "equal", "loopiness")


def drafter(layer: int | None, paths):
    """The config of one arm's drafter."""
    if layer is None:
        return of(Medusa, tree=of(RankTree, paths=paths), num_heads=STEPS_AHEAD)
    return of(HiddenTransfer, layers=(layer,) * STEPS_AHEAD, paths=paths, anchors=32)


def run(layer: int | None, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    chain = drafter(layer, chain_paths(STEPS_AHEAD))
    common = dict(steps=STEPS, batch_size=BATCH, length=LENGTH, weight_decay=0.0)
    params = fit(chain, seed, workdir, progress, peak=1e-3, **common)
    table = rank_accuracy(build(chain), params, length=LENGTH)
    best = build(drafter(layer, build_static_tree(table, BUDGET)))
    measured = {
        "first guess": table[:, 0].tolist(),
        "parameters": count_parameters(params),
        # Rows of a call below and above the layer of the maps.
        "rows": [BUDGET + 1, best.size],
        "budget": STEPS * BATCH * LENGTH,
        "bytes": count_bytes(params),
    }
    for mode, sampling in MODES.items():
        found = decode(best, params, KINDS, sampling=sampling, seed=seed, **OPTIONS)
        measured |= {f"{mode} {name}": value for name, value in selected(found, *NAMES).items()}
        progress(0.85, mode)
    return measured


def mean(results: Results, arm: str, name: str) -> float:
    return statistics.fmean(
        statistics.fmean(results[arm][f"{mode} {kind} {name}"]) for mode in MODES for kind in KINDS
    )


def judge(results: Results) -> tuple[str, str]:
    """Holds if a middle layer gains more tokens a call than the last layer and than Medusa, and decodes faster than
    Medusa on the clock; partly if only some of it is so."""
    gained = {arm: mean(results, arm, "tokens_per_call") for arm in results}
    speed = {arm: mean(results, arm, "speed") for arm in results}
    last = f"layer {LAYERS[-1]}"
    middle = max((f"layer {layer}" for layer in LAYERS[:-1]), key=gained.__getitem__)
    won = [gained[middle] > gained[last], gained[middle] > gained["Medusa"], speed[middle] > speed["Medusa"]]
    guesses = {arm: np.mean(results[arm]["first guess"], axis=0) for arm in results}
    below, above = results[middle]["rows"][0]
    return "yes" if all(won) else "partly" if any(won) else "no", (
        f"Tokens a call, mean over kinds of text and modes: {', '.join(f'{a} {x:.2f}' for a, x in gained.items())}. "
        f"On the clock of this machine, plain decoding = 1: {', '.join(f'{a} {x:.2f}' for a, x in speed.items())}. "
        "First guesses right at depths 1 to 3: "
        + "; ".join(f"{arm} {', '.join(f'{x:.0%}' for x in found)}" for arm, found in guesses.items())
        + f". Maps of {results[middle]['parameters'][0]} numbers against {results['Medusa']['parameters'][0]} in "
        f"Medusa's heads, but {above:.0f} rows a call above the layer instead of {below:.0f}."
    )


def figure(results: Results, path: Path) -> None:
    """Tokens a call against the layer; Medusa as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, constrained_layout=True)
    for panel, mode in zip(panels, MODES, strict=True):
        for kind, colour in zip(KINDS, ("C0", "C1"), strict=True):
            name = f"{mode} {kind} tokens_per_call"
            values = np.asarray([results[f"layer {layer}"][name] for layer in LAYERS])
            panel.errorbar(
                LAYERS, values.mean(1), values.std(1), fmt="o-", color=colour, capsize=3, label=kind
            )
            panel.axhline(
                np.mean(results["Medusa"][name]), color=colour, linestyle=":", label=f"{kind}, Medusa"
            )
        panel.set(title=mode, xlabel="layer after which the maps stand, of 6", xticks=LAYERS)
    panels[0].set_ylabel("tokens gained a call")
    panels[0].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="hidden_transfer",
    paper="arXiv 2404.12022, abstract and the figures of accuracy by layer",
    statement="Pseudo hidden states made in the middle of the model and refined by the layers above predict future "
    "tokens better than heads on the last layer, so the acceleration exceeds Medusa's.",
    setting=f"The base model that ships (7.3M parameters, 6 layers), what it says itself as text; {STEPS} updates of "
    f"{BATCH} rows of {LENGTH} tokens for three maps, at 32 places of each row, and for Medusa's heads. Trees of "
    f"{BUDGET} drafted tokens; 8 prompts of a kind, 64 tokens, greedy and at temperature 0.7; two seeds.",
    measures={
        **{
            f"{mode} {kind} {name}": unit
            for mode in MODES
            for kind in KINDS
            for name, unit in (
                ("tokens_per_call", "tokens"),
                ("speed", "plain = 1"),
                ("equal", "share"),
                ("loopiness", "share"),
            )
        },
        "first guess": "share right, by depth",
        "parameters": "trained numbers",
        "rows": "rows a call, below and above the layer",
    },  # fmt: skip
    budget="training tokens",
    arms={
        **{
            f"layer {layer}": Arm(functools.partial(run, layer), f"three maps after layer {layer}")
            for layer in LAYERS
        },
        "Medusa": Arm(functools.partial(run, None), "three heads on the last layer"),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
