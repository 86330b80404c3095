"""Medusa: a tree of guesses against a chain, and typical acceptance against exact sampling.

One set of heads a seed, trained once on the frozen target; all arms draft with it. Trees are those with the greatest
expected number of accepted tokens, by how often each rank of each head is right on validation text; what is measured
are prompts of the test split and of another kind of text.
"""

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.drafting import decode, fit, prompts, rank_accuracy, selected, target
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.decoding.proposers import Target
from research.decoding.sampling import Sampling
from research.decoding.speculative.medusa import Medusa, Medusa2
from research.decoding.speculative.trees import RankTree, build_static_tree, chain_paths
from research.decoding.verify import Typical, Verifier
from research.nn.accounting import count_bytes

HEADS, BUDGETS, TUNED_BUDGET = 3, (7, 15, 31), 15  # drafted tokens of a call
STEPS, BATCH, LENGTH = 150, 8, 128
KINDS = ("code", "prose")
MODES = {"greedy": Sampling(), "sampled": Sampling(temperature=0.7)}
WARM = Sampling(temperature=1.0)
OPTIONS = dict(count=8, new_tokens=64)
NAMES = ("tokens_per_call", "speed", "equal", "loopiness")


def heads(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    """Trained by the first arm; the others, which need it, read what it left."""
    drafter = of(Medusa, tree=of(RankTree, paths=chain_paths(HEADS)), num_heads=HEADS)
    home = needs["chain"].workdir if needs else workdir
    return fit(
        drafter,
        seed,
        home,
        progress,
        steps=STEPS,
        batch_size=BATCH,
        length=LENGTH,
        text="corpus",  # in another order with every seed
        peak=1e-3,
        weight_decay=0.0,
    )


def best_tree(params, budget: int) -> RankTree:
    accuracy = rank_accuracy(Medusa(RankTree(chain_paths(HEADS)), HEADS), params, length=LENGTH)
    return RankTree(build_static_tree(accuracy, budget))


def exact(budget: int | None, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    """A chain (no budget) or the best tree, greedy and at temperature 0.7, with the exact rules."""
    params = heads(seed, workdir, progress, needs)
    tree = RankTree(chain_paths(HEADS)) if budget is None else best_tree(params, budget)
    measured = {"budget": 0 if needs else STEPS * BATCH * LENGTH, "bytes": count_bytes(params)}
    for mode, sampling in MODES.items():
        found = decode(Medusa(tree, HEADS), params, KINDS, sampling=sampling, seed=seed, **OPTIONS)
        measured |= {f"{mode} {name}": value for name, value in selected(found, *NAMES).items()}
        progress(0.85, mode)
    return measured


def warm(verifier: Verifier | None, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    """The largest tree at temperature 1; what was written is judged by the target."""
    params = heads(seed, workdir, progress, needs)
    drafter = Medusa(best_tree(params, BUDGETS[-1]), HEADS)
    found = decode(drafter, params, KINDS, sampling=WARM, verifier=verifier, seed=seed, **OPTIONS)
    measured = {
        f"warm {name}": value for name, value in selected(found, "tokens_per_call", "loopiness").items()
    }
    for kind in KINDS:
        measured[f"warm {kind} nats"] = nats(prompts(kind, OPTIONS["count"]), found[kind]["outputs"])
    return measured | {"budget": 0, "bytes": count_bytes(params)}


def tuned(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    """Medusa-2 on as many tokens as the heads alone, with their best tree of 15, which favours them."""
    tree = best_tree(heads(seed, workdir, progress, needs), TUNED_BUDGET)
    drafter = of(
        Medusa2, tree=of(RankTree, paths=tree.paths), num_heads=HEADS, reference="self", rank=8, alpha=8.0
    )
    params = fit(
        drafter,
        seed,
        workdir,
        progress,
        steps=STEPS,
        batch_size=BATCH,
        length=LENGTH,
        text="corpus",
        peak=2.5e-4,  # of the branches; the heads go four times as fast
        rates=(("^drafter/head_", 4.0),),
        weight_decay=0.0,
    )
    loaded, drafter = target(), build(drafter)
    after = drafter.tuned(params, Target(loaded.params, loaded.model))
    texts = prompts("code", 32)
    halves = [text[:8] for text in texts], [text[8:] for text in texts]
    measured = {
        "nats before": nats(*halves),
        "nats after": nats(*halves, params=after),
        "budget": STEPS * BATCH * LENGTH,
        "bytes": count_bytes(params),
    }
    for mode, sampling in MODES.items():
        found = decode(drafter, params, KINDS, sampling=sampling, seed=seed, target_params=after, **OPTIONS)
        measured |= {f"{mode} {name}": value for name, value in selected(found, *NAMES).items()}
        progress(0.85, mode)
    return measured


def nats(beginnings: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], params=None) -> float:
    """Mean negative log-probability that the target (with other `params`) gives to the tokens of the outputs, at
    temperature 1."""
    loaded = target()
    params = loaded.params if params is None else params
    score = jax.jit(lambda params, tokens: jax.nn.log_softmax(loaded.model.apply({"params": params}, tokens)))
    width = max(len(a) + len(b) for a, b in zip(beginnings, outputs, strict=True))
    total, count = 0.0, 0
    for beginning, output in zip(beginnings, outputs, strict=True):
        text = [*beginning, *output]
        row = jnp.asarray([text + [0] * (width - len(text))])  # what follows is not seen
        log_p = np.asarray(score(params, row)[0])
        places = range(len(beginning), len(text))
        total -= sum(float(log_p[t - 1, text[t]]) for t in places)
        count += len(places)
    return total / max(count, 1)


def mean(results: Results, arm: str, name: str) -> float:
    return statistics.fmean(statistics.fmean(results[arm][name.format(kind)]) for kind in KINDS)


def judge(results: Results) -> tuple[str, str]:
    """Holds if the chain already gains, every larger tree gains more, typical acceptance gains more than exact
    sampling, and some tree is faster than plain decoding on the clock; partly if all trees beat the chain."""
    arms = ("chain", *(f"{budget} nodes" for budget in BUDGETS))
    gains = {mode: [mean(results, arm, f"{mode} {{}} tokens_per_call") for arm in arms] for mode in MODES}
    rates = [mean(results, arm, "warm {} tokens_per_call") for arm in ("exact, T=1", "typical, T=1")]
    costs = [mean(results, arm, "warm {} nats") for arm in ("exact, T=1", "typical, T=1")]
    loops = [mean(results, arm, "warm {} loopiness") for arm in ("exact, T=1", "typical, T=1")]
    rising = all(found[0] > 1 and found == sorted(found) for found in gains.values())
    beaten = all(min(found[1:]) > found[0] for found in gains.values())
    speed = {mode: [mean(results, arm, f"{mode} {{}} speed") for arm in arms] for mode in MODES}
    faster = all(max(found) > 1 for found in speed.values())
    clock = "; ".join(f"{mode} {', '.join(f'{x:.2f}' for x in found)}" for mode, found in speed.items())
    both = [mean(results, arm, "greedy {} tokens_per_call") for arm in (f"{TUNED_BUDGET} nodes", "Medusa-2")]
    drift = [statistics.fmean(results["Medusa-2"][f"nats {when}"]) for when in ("before", "after")]
    verdict = "yes" if rising and rates[1] > rates[0] and faster else "partly" if beaten else "no"
    shown = "; ".join(f"{mode} {', '.join(f'{x:.2f}' for x in found)}" for mode, found in gains.items())
    return verdict, (
        f"Tokens a call with {', '.join(arms)}: {shown}. On the clock, plain decoding = 1: "
        f"{clock}. At temperature 1, exact {rates[0]:.2f} and typical "
        f"{rates[1]:.2f}, whose text has {costs[1]:.2f} nats a token instead of {costs[0]:.2f} and "
        f"{loops[1]:.0%} instead of {loops[0]:.0%} repeated 8-grams. Medusa-2, {TUNED_BUDGET} nodes, greedy: "
        f"{both[1]:.2f} instead of {both[0]:.2f}, and the target it tuned has {drift[1]:.3f} nats on held-out code "
        f"instead of {drift[0]:.3f}."
    )


def figure(results: Results, path: Path) -> None:
    """Tokens a call against drafted tokens, by kind of text and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, constrained_layout=True)
    for panel, mode in zip(panels, MODES, strict=True):
        for kind, colour in zip(KINDS, ("C0", "C1"), strict=True):
            name = f"{mode} {kind} tokens_per_call"
            trees = np.asarray([results[f"{budget} nodes"][name] for budget in BUDGETS])
            panel.errorbar(
                BUDGETS, trees.mean(1), trees.std(1), fmt="o-", color=colour, capsize=3, label=f"tree, {kind}"
            )
            chain = results["chain"][name]
            panel.errorbar(
                HEADS, np.mean(chain), np.std(chain), fmt="s", color=colour, capsize=3, label=f"chain, {kind}"
            )
        panel.set(title=mode, xlabel="drafted tokens a call", xticks=(HEADS, *BUDGETS))
        panel.axhline(1.0, color="C7", linewidth=0.8)
    panels[0].set_ylabel("tokens gained a call")
    panels[0].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


UNITS = {
    "tokens_per_call": "plain is 1",
    "speed": "x plain",
    "equal": "share of prompts",
    "loopiness": "share of repeated 8-grams",
}
WARM_UNITS = {"tokens_per_call": "plain is 1", "loopiness": "share of repeated 8-grams", "nats": "per token"}

CLAIM = Claim(
    system="medusa",
    paper="arXiv 2401.10774, abstract and sections 2.1 and 2.3",
    statement="Heads on a frozen model that guess several tokens ahead, their guesses checked as a tree, make decoding "
    "2.2 times as fast without changing its output; a sparse tree accepts more than a dense one or a chain; typical "
    "acceptance accepts more than exact sampling at like quality.",
    setting=f"{HEADS} heads for the shipped base model of 7.3M parameters, {STEPS} updates of {BATCH} x {LENGTH} "
    "tokens of Python's standard library. 8 held-out prompts a kind, 64 tokens each, greedy and at temperature 0.7; "
    "typical acceptance at temperature 1; two seeds. Wall clock is information: 32 rows are not free on two CPU cores.",
    measures={
        **{f"{mode} {kind} {name}": UNITS[name] for mode in MODES for kind in KINDS for name in NAMES},
        **{f"warm {kind} {name}": unit for kind in KINDS for name, unit in WARM_UNITS.items()},
        "nats before": "per token of held-out code",
        "nats after": "per token of held-out code",
    },
    budget="training tokens",
    arms={
        "chain": Arm(functools.partial(exact, None), "the best guess of each head"),
        **{
            f"{budget} nodes": Arm(
                functools.partial(exact, budget),
                "the best tree of that size, the same heads",
                needs=("chain",),
            )
            for budget in BUDGETS
        },
        "exact, T=1": Arm(
            functools.partial(warm, None), f"{BUDGETS[-1]} nodes, the law of plain sampling", needs=("chain",)
        ),
        "typical, T=1": Arm(
            functools.partial(warm, Typical()), f"{BUDGETS[-1]} nodes, typical acceptance", needs=("chain",)
        ),
        "Medusa-2": Arm(
            tuned, f"heads and target tuned together, {TUNED_BUDGET} nodes, as many tokens", needs=("chain",)
        ),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
