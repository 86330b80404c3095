"""PEARL against plain speculation with the same draft model, on a virtual clock of two devices.

Two processes of one small machine share its cores, so nothing is gained there; what counts is how many rounds the
text takes, and that a round costs the longer of its two halves. The tokens are decoded for real.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.draft_model import small_draft
from experiments.claims.drafting import fit, prompts, target
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.decoding import engine as engines
from research.decoding.proposers import Plain, Proposer
from research.decoding.sampling import Sampling
from research.decoding.speculative.draft_model import DraftModel
from research.decoding.speculative.pearl import Pearl, PreVerify
from research.decoding.verify import Greedy, Sampled, Verifier
from research.nn.accounting import count_bytes

STEPS, BATCH, LENGTH = 200, 16, 128
GAMMAS = (1, 2, 3, 4, 6, 8)  # of plain speculation, which is given its best
RATIOS = (2, 5, 10)  # target time / draft time; PEARL's gamma is the ratio
ABLATED = 5
PROMPTS, NEW_TOKENS = 8, 96
MODES = {"greedy": Sampling(), "sampled": Sampling(1.0)}


def train(seed: int, workdir: Path, progress: Progress) -> Any:
    """The draft's parameters; those of an earlier run in the same folder, if it is finished."""
    return fit(of(DraftModel, model=small_draft()), seed, workdir, progress, steps=STEPS, peak=4e-3)


def run(proposer: Proposer, params: Any, verifier: Verifier, sampling: Sampling, seed: int) -> engines.State:
    """All prompts decoded in one batch."""
    loaded = target()
    texts = prompts("code", PROMPTS) + prompts("prose", PROMPTS)
    engine = engines.Engine(loaded.model, proposer, verifier, capacity=192)
    weights = engines.Weights(loaded.params, params, sampling.chain(loaded.model.vocab_size))
    lengths = jnp.asarray([len(text) for text in texts])
    keys = engines.row_keys(seed, jnp.arange(len(texts)), 1)
    ends = jnp.asarray([loaded.tokenizer.eos_id])
    first = (weights, jnp.asarray(texts), lengths, jnp.full_like(lengths, NEW_TOKENS), keys, ends)
    state = engines.compiled(engine, "prefill", *first)(*first)
    rest = (weights, state, jnp.zeros(len(texts), bool), jnp.int32(10 * NEW_TOKENS), ends)
    return engines.compiled(engine, "decode", *rest)(*rest)


def measure(
    make: Callable[[int], Proposer], gammas: tuple[int, ...], params: Any, seed: int
) -> dict[str, Any]:
    """For each gamma: tokens after prefill, rounds in PRE and in POST (plain speculation knows the one kind)."""
    found: dict[str, Any] = {}
    for mode, sampling in MODES.items():
        rows = []
        for gamma in gammas:
            proposer = make(gamma)
            drawn = PreVerify() if isinstance(proposer, Pearl) else Sampled()
            verifier = Greedy() if sampling.greedy else drawn
            state = run(proposer, params, verifier, sampling, seed)
            calls = np.asarray(state.histogram).sum()
            pre, post = (
                np.asarray(state.proposer.rounds).sum(0) if isinstance(proposer, Pearl) else (calls, 0)
            )
            rows.append((int(np.sum(np.asarray(state.count) - 1)), int(pre), int(post)))
            if mode == "greedy":
                plain = run(Plain(), (), Greedy(), sampling, seed)
                equal = np.all(
                    np.asarray(plain.tokens)[:, :NEW_TOKENS] == np.asarray(state.tokens)[:, :NEW_TOKENS], 1
                )
                found["equal"] = min(float(equal.mean()), found.get("equal", 1.0))
        for name, values in zip(("tokens", "pre", "post"), zip(*rows, strict=True), strict=True):
            found[f"{mode} {name}"] = list(values)
    budget = STEPS * BATCH * LENGTH
    return {**found, "budget": budget, "bytes": count_bytes(params)}


def plain(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    params = train(seed, workdir, progress)
    model = build(small_draft())
    measured = measure(lambda gamma: DraftModel(model, gamma), GAMMAS, params, seed)
    loaded = target()
    return measured | {
        "draft ms": forward_seconds(model, params, 1) * 1e3,
        "target ms": forward_seconds(loaded.model, loaded.params, max(RATIOS) // 2) * 1e3,
    }


def pearl(
    seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed], **fields: bool
) -> dict[str, Any]:
    params = train(seed, needs["plain"].workdir, progress)
    model = build(small_draft())
    gammas = (ABLATED,) if fields else RATIOS
    return measure(lambda gamma: Pearl(model, gamma, **fields), gammas, params, seed)


def forward_seconds(model: Any, params: Any, nodes: int) -> float:
    """One forward of `nodes` tokens of one row behind 128 cached ones, median of 30."""
    cache = model.init_cache(1, 192).replace(length=jnp.asarray([128]))
    tokens = jnp.zeros((1, nodes), jnp.int32)
    forward = jax.jit(
        lambda p, c: jnp.argmax(model.apply({"params": p}, tokens, c, method="extend")[0][:, -1])
    )
    times = []
    for _ in range(33):
        begin = time.perf_counter()
        forward(params, cache).block_until_ready()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[3:]))


def speed(results: Results, arm: str, mode: str, gamma: int, ratio: float) -> float:
    """Tokens in the time of one call of the target, where the draft takes 1 / ratio of it."""
    gammas = GAMMAS if arm == "plain" else RATIOS if arm == "pearl" else (ABLATED,)
    at = gammas.index(gamma)
    tokens, pre, post = (
        np.sum(results[arm][f"{mode} {name}"], axis=0)[at] for name in ("tokens", "pre", "post")
    )
    if arm == "plain":
        return tokens / (pre * (gamma / ratio + 1))
    return tokens / PEARLS[arm](gamma).seconds((pre, post), 1 / ratio, 1.0)


# The clock needs no model.
PEARLS = {
    "pearl": lambda gamma: Pearl(None, gamma),
    "no pre-verify": lambda gamma: Pearl(None, gamma, pre_verify=False),
    "no post-verify": lambda gamma: Pearl(None, gamma, post_verify=False),
}


def best_plain(results: Results, mode: str, ratio: float) -> float:
    return max(speed(results, "plain", mode, gamma, ratio) for gamma in GAMMAS)


def gain(results: Results, arm: str, mode: str, ratio: float, gamma: int) -> float:
    """Speed over plain speculation's best."""
    return speed(results, arm, mode, gamma, ratio) / best_plain(results, mode, ratio)


def measured_ratio(results: Results) -> float:
    return float(np.median(results["plain"]["target ms"]) / np.median(results["plain"]["draft ms"]))


def judge(results: Results) -> tuple[str, str]:
    """Holds if at gamma = c PEARL is faster than plain speculation at its best gamma for c = 5 and 10 in both modes,
    both ablations are slower than PEARL, and greedy outputs are those of plain decoding; partly if it is faster in
    some."""
    gains = {(mode, c): gain(results, "pearl", mode, c, c) for mode in MODES for c in RATIOS}
    ablations = {
        name: gain(results, name, "greedy", ABLATED, ABLATED) for name in ("no pre-verify", "no post-verify")
    }
    equal = min(min(results[arm]["equal"]) for arm in results)
    own = measured_ratio(results)
    mine = max(gain(results, "pearl", "greedy", own, gamma) for gamma in RATIOS)
    wins = [gains[mode, c] > 1 for mode in MODES for c in (5, 10)]
    wins += [max(ablations.values()) < gains["greedy", ABLATED], equal == 1.0]
    verdict = "yes" if all(wins) else "partly" if any(g > 1 for g in gains.values()) else "no"
    by_mode = "; ".join(
        f"{mode} " + ", ".join(f"{gains[mode, c]:.2f} at c = {c}" for c in RATIOS) for mode in MODES
    )
    cut = ", ".join(f"{value:.2f} with {name}" for name, value in ablations.items())
    sentence = (
        f"tokens per virtual second over plain speculation at its best gamma: {by_mode} (greedy at c = {ABLATED}: "
        f"{cut}); at this machine's c = {own:.1f} {mine:.2f}; {equal:.0%} of the greedy outputs are those of plain "
        "decoding; the paper has up to 1.50."
    )
    return verdict, sentence


def figure(results: Results, path: Path) -> None:
    """Speed over plain decoding, by the ratio of the two models' times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharey=True)
    places = np.arange(len(RATIOS))
    for panel, mode in zip(panels, MODES, strict=True):
        panel.bar(
            places - 0.2,
            [best_plain(results, mode, c) for c in RATIOS],
            0.4,
            label="plain speculation, best gamma",
        )
        speeds = [speed(results, "pearl", mode, c, c) for c in RATIOS]
        panel.bar(places + 0.2, speeds, 0.4, label="PEARL, gamma = c")
        for arm, marker in (("no pre-verify", "v"), ("no post-verify", "^")):
            height = speed(results, arm, mode, ABLATED, ABLATED)
            panel.plot(RATIOS.index(ABLATED) + 0.2, height, marker, color="k", label=arm)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xticks(places, [f"c = {c}" for c in RATIOS])
        panel.set(title=mode, ylabel="tokens in the time of a target call" if mode == "greedy" else None)
    panels[0].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="pearl",
    paper="arXiv 2408.11850, abstract and section 4.2",
    statement="Drafting and verifying at the same time, with an adaptive draft length, is up to 1.50 times as "
    "fast as plain speculative decoding; both pre-verify and post-verify contribute.",
    setting=f"The shipped base model (7.3M parameters) and a draft of 0.4M, distilled in {STEPS} updates of "
    f"2048 tokens. {PROMPTS} prompts of held-out code and as many of prose, {NEW_TOKENS} new tokens, "
    "greedy and at temperature 1. A virtual clock: the draft takes 1 / c of the target's time, c = "
    f"{RATIOS}; PEARL with gamma = c, plain speculation with the best gamma of {GAMMAS}.",
    measures={
        **{f"{mode} tokens": "after prefill, by gamma" for mode in MODES},
        **{f"{mode} pre": "rounds with nothing pending; all, in plain speculation" for mode in MODES},
        **{f"{mode} post": "rounds with tokens pending" for mode in MODES},
        "equal": "share of greedy outputs",
        "draft ms": "one forward",
        "target ms": "one forward of 5 tokens",
    },
    budget="training tokens of the draft",
    arms={
        "plain": Arm(plain, "plain speculation"),
        "pearl": Arm(pearl, "PEARL", needs=("plain",)),
        "no pre-verify": Arm(
            functools.partial(pearl, pre_verify=False), "PEARL without pre-verify", needs=("plain",)
        ),
        "no post-verify": Arm(
            functools.partial(pearl, post_verify=False), "PEARL without post-verify", needs=("plain",)
        ),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
