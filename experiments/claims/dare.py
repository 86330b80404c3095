"""DARE on two fine-tunes of the model that ships: what is left of them at rising drop rates, and merging them.

The base is fine-tuned on sums in sentences and on the type stubs that come with NumPy. Gain kept is the share of what
fine-tuning gained on held-out text of its own: 1 for the fine-tuned model, 0 for the base, below 0 for worse than the
base. Factors of merging are chosen on validation text without DARE and kept with it; everything else is measured on
test text. Random masks are drawn five times for each fine-tuning.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.dare import base_model, finetune
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.compression import merging
from research.config import build
from research.data.text import TokenDataset
from research.language import BASE
from research.nn.accounting import count_bytes
from research.training.observe import collect_fisher, collect_grams
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir

SOURCES = {"sums": "arithmetic", "stubs": str(Path(np.__file__).parent / "**" / "*.pyi")}
STEPS, BATCH, LENGTH, RATE = 40, 8, 128, 5e-4
ROWS = 16  # of held-out text of each domain
RATES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
MASKS = 5
MERGE_RATES = (0.9,)
SCALES = (0.5, 1.0)
METHODS = ("average", "task arithmetic", "TIES", "Fisher", "RegMean")


def train(
    domain: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """The base, fine-tuned on a domain."""
    config = finetune(SOURCES[domain], base_model(), "package:language/base", STEPS, BATCH, RATE, LENGTH)
    config.seed = config.data.seed = seed
    config.evaluators = ()
    progress(0.05, "training")
    with open_workdir(workdir / "run", config) as place:
        state, _ = build(config).train(place, progress=False)
    _, base = shipped()
    losses = {f"{name} loss": [nats(base, name), nats(state.params, name)] for name in SOURCES}
    return losses | {"budget": STEPS * BATCH * LENGTH, "bytes": count_bytes(state.params)}


def drop(how: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Gain kept of both fine-tunes by drop rate; of random masks the mean and the deviation over masks."""
    _, base = shipped()
    measured: dict[str, Any] = {}
    for number, domain in enumerate(SOURCES):
        tuned = tuned_params(needs, domain)
        before, after = needs[domain].measured[f"{domain} loss"]
        change = merging.difference(tuned, base)
        kept = []
        for place, rate in enumerate(RATES):
            progress((number + place / len(RATES)) / len(SOURCES), f"{domain}, {rate:.0%} dropped")
            keys = mask_keys(seed, domain)[: 1 if how == "magnitude" else MASKS]
            losses = [nats(sparse(how, tuned, base, change, rate, key), domain) for key in keys]
            kept.append((before - np.array(losses)) / (before - after))
        measured[f"{domain} gain kept"] = [float(np.mean(values)) for values in kept]
        measured[f"{domain} deviation"] = [float(np.std(values)) for values in kept]
    return measured | {"budget": 0, "bytes": count_bytes(base)}


def sparse(how: str, tuned: Any, base: Any, change: merging.Difference, rate: float, key: jax.Array) -> Any:
    """The fine-tuned model with a share dropped: of its difference, or, for "weights", of itself."""
    if how == "weights":
        nothing = jax.tree.map(np.zeros_like, tuned)
        return merging.dropped(tuned, nothing, rate, key, "random_unscaled")
    return merging.add(base, merging.drop(change, rate, key, how))


def merge(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Loss of merged models, mean of the two domains, without DARE and with it."""
    model, base = shipped()
    changes = [merging.difference(tuned_params(needs, domain), base) for domain in SOURCES]
    observed = {}
    for name, collect in {"Fisher": collect_fisher, "RegMean": collect_grams}.items():
        progress(0.05, f"observing for {name}")
        observed[name] = [
            collect(model, tuned_params(needs, domain), [held(domain, "train")]) for domain in SOURCES
        ]
    measured: dict[str, Any] = {}
    for number, method in enumerate(METHODS):
        progress(0.1 + 0.9 * number / len(METHODS), method)
        scales = SCALES if method in ("task arithmetic", "TIES") else (1.0,)

        def losses(
            changes: list[merging.Difference], scale: float, split: str = "test", method: str = method
        ) -> list[float]:
            merged = merging.add(base, merged_by(method, changes, scale, observed))
            return [nats(merged, domain, split) for domain in SOURCES]

        scale = min(scales, key=lambda scale: np.mean(losses(changes, scale, "validation")))
        measured[f"{method} factor"] = scale
        measured[f"{method} by domain"] = losses(changes, scale)
        found = [float(np.mean(measured[f"{method} by domain"]))]
        for rate in MERGE_RATES:
            masks = zip(*(mask_keys(seed, domain) for domain in SOURCES), strict=True)
            dared = [[merging.drop(c, rate, k) for c, k in zip(changes, keys, strict=True)] for keys in masks]
            found.append(float(np.mean([losses(some, scale) for some in dared])))
        measured[method] = found
    return measured | {"budget": 0, "bytes": count_bytes(base)}


def merged_by(
    method: str, changes: list[merging.Difference], scale: float, observed: dict[str, Any]
) -> merging.Difference:
    if method == "average":
        return merging.average(changes)
    if method == "task arithmetic":
        return merging.task_arithmetic(changes, scale)
    if method == "TIES":
        return merging.ties(changes, scale, trim=0.8)
    return (merging.fisher if method == "Fisher" else merging.regmean)(changes, observed[method])


def mask_keys(seed: int, domain: str) -> list[jax.Array]:
    """A key for every mask, the domains' own."""
    key = jax.random.fold_in(jax.random.key(seed), list(SOURCES).index(domain))
    return list(jax.random.split(key, MASKS))


@functools.cache
def shipped() -> tuple[Any, Any]:
    loaded = load_model(BASE)
    return loaded.model, loaded.params


def tuned_params(needs: dict[str, Needed], domain: str) -> Any:
    return load_model(needs[domain].workdir / "run").params


@functools.cache
def held(domain: str, split: str) -> dict[str, np.ndarray]:
    data = TokenDataset(SOURCES[domain], split, LENGTH, str(BASE), shuffle=split == "train")
    return data.take(np.arange(ROWS))


@functools.cache
def evaluation() -> Any:
    return jax.jit(LanguageModelling(shipped()[0]).evaluate)


def nats(params: Any, domain: str, split: str = "test") -> float:
    total, weight = evaluation()(params, held(domain, split))["loss"]
    return float(total / weight)


def kept(results: Results, arm: str, rate: float) -> list[float]:
    """Mean over seeds, for each domain."""
    place = RATES.index(rate)
    return [float(np.mean(results[arm][f"{domain} gain kept"], axis=0)[place]) for domain in SOURCES]


def judge(results: Results) -> tuple[str, str]:
    """Four parts: with 90 % dropped DARE keeps at least 80 % of the gain in both domains; it keeps more than without
    rescaling and more than by magnitude there; with 10 % of the weights themselves dropped nothing is kept; TIES merges
    better with DARE at 90 % than without, and average and task arithmetic lose at most 0.05 nats by it. Yes if all
    hold, no if fewer than two."""
    at = {arm: kept(results, arm, 0.9) for arm in ("DARE", "unscaled", "magnitude")}
    weights = kept(results, "weights", 0.1)
    table = {method: np.mean(results["merged"][method], axis=0) for method in METHODS}
    parts = {
        "kept": min(at["DARE"]) >= 0.8,
        "best": all(
            d > max(u, m) for d, u, m in zip(at["DARE"], at["unscaled"], at["magnitude"], strict=True)
        ),
        "weights": max(weights) <= 0,
        "merging": bool(
            table["TIES"][-1] < table["TIES"][0]
            and all(table[m][-1] <= table[m][0] + 0.05 for m in ("average", "task arithmetic"))
        ),
    }
    verdict = "yes" if all(parts.values()) else "partly" if sum(parts.values()) >= 2 else "no"

    def both(values: list[float]) -> str:
        return " and ".join(f"{value:.2f}" for value in values)

    gains = [np.mean(results[domain][f"{domain} loss"], axis=0) for domain in SOURCES]
    curves = "; ".join(
        f"{arm} {', '.join(both(kept(results, arm, rate)) for rate in (0.5, 0.9, 0.99))}" for arm in at
    )
    rows = "; ".join(
        f"{method} {values[0]:.3f} -> {', '.join(f'{v:.3f}' for v in values[1:])}"
        for method, values in table.items()
    )
    return verdict, (
        f"Fine-tuning lowers the loss from {' and '.join(f'{a:.2f} to {b:.2f}' for a, b in gains)} nats on sums and "
        f"stubs. Gain kept with 50 %, 90 % and 99 % of the differences dropped: {curves}. With 10 % of the weights "
        f"dropped: {both(weights)}. Merged, mean nats of the two domains without DARE and with "
        f"{' and '.join(f'{rate:.0%}' for rate in MERGE_RATES)} dropped: {rows}."
    )


def figure(results: Results, path: Path) -> None:
    """Gain kept against drop rate, and the merge table as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 3, figsize=(14, 3.9), constrained_layout=True)
    styles = {"DARE": "C3", "unscaled": "C0", "magnitude": "C2", "weights": "0.5"}
    for panel, domain in zip(panels, SOURCES, strict=False):
        for arm, colour in styles.items():
            curve, spread = (
                np.mean(results[arm][f"{domain} {what}"], axis=0) for what in ("gain kept", "deviation")
            )
            panel.errorbar(range(len(RATES)), curve, spread, fmt="o-", color=colour, capsize=3, label=arm)
        panel.axhline(0, color="k", linewidth=0.8)
        panel.set(
            xticks=range(len(RATES)),
            xticklabels=RATES,
            xlabel="share dropped",
            ylabel="gain kept",
            ylim=(-1, 1.1),
            title=f"fine-tuned on {domain}",
        )
        panel.legend(fontsize=8)
    names = ["without DARE", *(f"{rate:.0%} dropped" for rate in MERGE_RATES)]
    for i, name in enumerate(names):
        heights = [np.mean(results["merged"][method], axis=0)[i] for method in METHODS]
        panels[2].bar(np.arange(len(METHODS)) + 0.4 * (i - 0.5), heights, 0.38, label=name)
    panels[2].set(
        xticks=range(len(METHODS)), xticklabels=METHODS, ylabel="nats, mean of both domains", title="merged"
    )
    panels[2].tick_params(axis="x", labelsize=8)
    panels[2].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


BOTH = tuple(SOURCES)
CLAIM = Claim(
    system="dare",
    paper="arXiv 2311.03099, abstract, figures 1 to 5 and table 1",
    statement="90 % or even 99 % of what fine-tuning changed can be dropped, if the rest is scaled up, without a loss "
    "of ability; dropping 10 % of the weights themselves destroys it; models so sparsified merge at least as well.",
    setting="The shipped base model of 7.3M parameters, 40 updates of 8 x 128 tokens on generated sums and on NumPy's "
    "type stubs, 16 held-out rows of 128 tokens each; five masks for each of two fine-tunings. An element's noise "
    "under DARE is sqrt(p / (1 - p)) of its own size whatever the width, and a small model has fewer to average over.",
    measures={
        **{
            f"{domain} {what}": unit
            for domain in SOURCES
            for what, unit in (
                ("loss", "nats, before and after"),
                ("gain kept", "share, by rate"),
                ("deviation", "share, by rate"),
            )
        },
        **{method: "nats, by rate" for method in METHODS},
        **{f"{method} by domain": "nats" for method in METHODS},
        **{f"{method} factor": "x" for method in METHODS},
    },
    budget="training tokens",
    arms={
        "sums": Arm(functools.partial(train, "sums"), "the base, fine-tuned on sums in sentences"),
        "stubs": Arm(functools.partial(train, "stubs"), "the base, fine-tuned on type stubs"),
        "DARE": Arm(functools.partial(drop, "random"), "a random share dropped, the rest rescaled", BOTH),
        "unscaled": Arm(functools.partial(drop, "random_unscaled"), "not rescaled", BOTH),
        "magnitude": Arm(functools.partial(drop, "magnitude"), "the smallest dropped", BOTH),
        "weights": Arm(
            functools.partial(drop, "weights"), "the weights dropped, not their differences", BOTH
        ),
        "merged": Arm(merge, "both merged, without DARE and with it", BOTH),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
