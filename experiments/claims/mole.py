"""LLaVA-MoLE on the language side: domains that contradict each other in one LoRA, and a mixture of LoRA experts.

Three domains continue sequences of numbers from random starts: one goes up by one, one down by one, one up by three. A
row is of one domain and its first word says which. The same numbers have other successors in other domains: that is the
conflict. Every arm trains on the shipped model and is measured on held-out rows of every domain, but for their starts.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.adapting import nats, shipped, stacked, start, tune
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.adapters.lora import LoRA
from research.adapters.mole import MoLE
from research.nn.accounting import count_bytes, count_parameters

DOMAINS = {"up": 1, "down": -1, "leap": 3}
BATCH, ROW, STEPS, RATE = 12, 40, 60, 4e-3
RANK, EXPERTS = 2, 3


def record(rng: np.random.Generator, domain: str) -> dict[str, np.ndarray]:
    """A row of a domain: its name, and runs of six numbers from random starts. Starts have no weight."""
    tokenizer = shipped().tokenizer
    tokens = list(tokenizer.encode(f"{domain}:"))
    known = [0.0] * len(tokens)
    while len(tokens) <= ROW:
        first = int(rng.integers(20, 80))
        for i in range(6):
            own = tokenizer.encode(f" {first + i * DOMAINS[domain]}")
            tokens += own
            known += [float(i > 0)] * len(own)
        tokens += (end := tokenizer.encode(";"))
        known += [1.0] * len(end)
    tokens, known = tokens[: ROW + 1], known[: ROW + 1]
    ones = np.ones(ROW, np.int32)
    return {
        "tokens": np.array(tokens[:-1], np.int32),
        "targets": np.array(tokens[1:], np.int32),
        "weights": np.array(known[1:], np.float32),
        "segments": ones,
        "positions": np.arange(ROW, dtype=np.int32),
        "target_bytes": ones,
    }


def batch(rng: np.random.Generator, domains: tuple[str, ...], count: int) -> dict[str, np.ndarray]:
    """`count` rows, of the domains in turn."""
    return stacked([record(rng, domains[i % len(domains)]) for i in range(count)])


@functools.cache
def held(domain: str) -> dict[str, np.ndarray]:
    return batch(np.random.default_rng((1, list(DOMAINS).index(domain))), (domain,), 24)


def fit(adapter: LoRA, domains: tuple[str, ...], steps: int, seed: int) -> tuple[Any, Any]:
    """-> the model, and the run's parameters after `steps` updates on the domains."""
    rng = np.random.default_rng((2, seed))
    batches = stacked([batch(rng, domains, BATCH) for _ in range(steps)])
    model = adapter.model(shipped().model)
    return model, tune(model, adapter, start(adapter, seed), batches, RATE, jax.random.key(seed))[0]


def together(
    adapter: LoRA, steps: int, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """One adapter for all domains."""
    progress(0.1, f"{steps} updates")
    model, params = fit(adapter, tuple(DOMAINS), steps, seed)
    losses = [float(nats(model, adapter, params, held(domain))) for domain in DOMAINS]
    measured = {
        "losses": losses,
        "loss": float(np.mean(losses)),
        "trained": count_parameters(params["adapter"]),
    }
    if isinstance(adapter, MoLE):
        measured |= {"information": information(model, adapter, params)}
    return measured | cost(params, steps)


def alone(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """An adapter for every domain, with a third of the updates each."""
    losses = []
    for number, domain in enumerate(DOMAINS):
        progress(number / len(DOMAINS), domain)
        model, params = fit(LORA, (domain,), STEPS // len(DOMAINS), seed)
        losses.append(float(nats(model, LORA, params, held(domain))))
    trained = len(DOMAINS) * count_parameters(params["adapter"])
    return {"losses": losses, "loss": float(np.mean(losses)), "trained": trained, **cost(params, STEPS)}


def cost(params: Any, steps: int) -> dict[str, Any]:
    size = count_bytes(params["base"]) + count_bytes(params["adapter"])
    return {"budget": steps * BATCH * ROW, "bytes": size}


def information(model: Any, adapter: MoLE, params: Any) -> float:
    """Mutual information of a token's domain and its expert, in bits, mean over layers; log2(3) = 1.58 at most."""
    counts = np.stack([np.asarray(loads(model, adapter, params, held(domain))) for domain in DOMAINS])
    joint = counts / counts.sum(axis=(0, 2), keepdims=True)  # [domains, layers, experts]
    apart = joint.sum(axis=0, keepdims=True) * joint.sum(axis=2, keepdims=True)
    bits = np.where(joint > 0, joint * np.log2(np.where(joint > 0, joint / apart, 1.0)), 0.0)
    return float(bits.sum(axis=(0, 2)).mean())


@functools.partial(jax.jit, static_argnames=("model", "adapter"))
def loads(model: Any, adapter: MoLE, params: Any, rows: dict[str, np.ndarray]) -> jax.Array:
    """Tokens of every expert, [layers, experts]."""
    from research.training.task import LanguageModelling

    metrics = LanguageModelling(model).evaluate(adapter.assemble(params, None), rows)
    return jnp.stack([metrics[f"layer_{i}/mlp/load"][0] for i in range(model.num_layers)])


LORA = LoRA(rank=RANK, alpha=2.0 * RANK)
MIXTURE = MoLE(rank=RANK, alpha=2.0 * RANK, num_experts=EXPERTS, dropout=0.0)
DENSE = MoLE(rank=RANK, alpha=2.0 * RANK, num_experts=EXPERTS, dropout=0.0, routing="dense")
WIDE = LoRA(rank=RANK * EXPERTS, alpha=2.0 * RANK * EXPERTS)
ARMS = {
    "LoRA": (LORA, STEPS, "one of the same rank for all domains"),
    "MoLE": (MIXTURE, STEPS, "the paper's: a token to one expert, its router trained for balance alone"),
    "MoLE, dense": (DENSE, STEPS, "the released code's: all experts by their probabilities"),
    "LoRA, wide": (WIDE, STEPS, "one with the rank of all experts together"),
    "LoRA, twice as long": (LORA, 2 * STEPS, "twice the updates"),
}


def values(results: Results, arm: str, measure: str = "loss") -> np.ndarray:
    return np.asarray(results[arm][measure], float)


def judge(results: Results) -> tuple[str, str]:
    """Yes where with every seed the sparse mixture beats one LoRA of its rank and one trained twice as long; partly
    where it beats the first only, or the dense one both. The wide LoRA is its rival at equal parameters, and told."""
    rivals = ("LoRA", "LoRA, twice as long")
    sparse, dense = (
        [bool((values(results, arm) < values(results, rival)).all()) for rival in rivals]
        for arm in ("MoLE", "MoLE, dense")
    )
    verdict = "yes" if all(sparse) else "partly" if sparse[0] or all(dense) else "no"
    shown = ", ".join(f"{arm} {values(results, arm).mean():.3f}" for arm in ("one a domain", *ARMS))
    mutual = ", ".join(
        f"{arm} {values(results, arm, 'information').mean():.2f}" for arm in ("MoLE", "MoLE, dense")
    )
    return (
        verdict,
        f"Nats per token, mean of the domains: {shown}. Domain and expert share {mutual} of 1.58 bits.",
    )


def figure(results: Results, path: Path) -> None:
    """Losses by arm and domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axis = plt.subplots(figsize=(9, 4), constrained_layout=True)
    arms = ["one a domain", *ARMS]
    for number, domain in enumerate(DOMAINS):
        data = [values(results, arm, "losses")[:, number] for arm in arms]
        where = np.arange(len(arms)) + 0.26 * (number - 1)
        axis.bar(where, [x.mean() for x in data], 0.25, yerr=[np.ptp(x) / 2 for x in data], label=domain)
    axis.set_xticks(range(len(arms)), arms, rotation=15, ha="right")
    axis.set(ylabel="nats per token", title="Three domains with other successors of the same numbers")
    axis.legend()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="mole",
    paper="arXiv 2401.16160, abstract",
    statement="A sparse mixture of LoRA experts avoids the conflicts of mixed data, is better than one LoRA at the "
    "same "
    "compute, and even than one trained with twice the samples.",
    setting=f"The shipped base model of 7.3M parameters; three domains of number sequences with contradicting rules, "
    f"in "
    f"equal parts. {STEPS} updates of {BATCH} x {ROW} tokens with Adam at rate {RATE}, rank {RANK}, {EXPERTS} experts "
    f"on "
    "the MLPs, plain LoRA on attention, balance weight 0.01. Held out: 24 rows a domain. Two seeds. Text alone: the "
    "paper's models read images too.",
    measures={
        "loss": "nats/token, mean of the domains",
        "losses": f"nats/token of {', '.join(DOMAINS)}",
        "trained": "numbers that are trained",
        "information": "bits shared by domain and expert, mean over layers",
    },
    budget="training tokens",
    arms={
        "one a domain": Arm(alone, "three of the same rank, each with its domain's share of the updates"),
        **{
            name: Arm(functools.partial(together, adapter, steps), what)
            for name, (adapter, steps, what) in ARMS.items()
        },
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
