"""SCMoE: a mixture contrasted with its own worse routing, on arithmetic whose answers can be checked.

One mixture a seed. How strongly to contrast is chosen on validation problems, and test problems are answered once; the
whole sweep is shown. How far the passes are apart is measured on text of the test split.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs.scmoe import SOURCES
from configs.scmoe import get_config as scmoe_config
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build
from research.data.arithmetic import Arithmetic
from research.data.tokenizer import Tokenizer
from research.decoding.generator import Generator
from research.moe.scmoe import self_contrast, with_ranks
from research.nn.accounting import count_bytes
from research.training.model_directory import Loaded
from research.training.workdir import load_model, open_workdir

STEPS, BATCH = 700, 16
PROBLEMS = 400  # of validation, and as many of test
BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
ALPHA = 0.1
WEAK: dict[str, tuple[int, ...] | Literal["random"]] = {
    "rank-2": (1,),
    "rank-3": (2,),
    "random-1": "random",
}
APART = {"rank-1": (0,), "rank-2": (1,), "rank-3": (2,), "rank-4": (3,), "rank-8": (7,)}
MORE = {"top-3": (0, 1, 2), "top-4": (0, 1, 2, 3)}


def mixture(seed: int, workdir: Path, progress: Progress) -> Loaded:
    """The config's experiment, shorter, with a seed of its own; read again where it is finished."""
    config = scmoe_config("tiny")
    config.seed = seed
    config.stages[0].steps = STEPS
    config.evaluators = ()
    config.checkpoint_every = STEPS
    with open_workdir(workdir / "run", config) as run:
        build(config).train(run, progress=False)
    progress(0.6, "decoding")
    return read(workdir)


def read(workdir: Path) -> Loaded:
    """The finished mixture, with the tokenizer that its data were made with."""
    return dataclasses.replace(load_model(workdir / "run"), tokenizer=Tokenizer.load())


def answered(generator: Generator, split: str) -> float:
    """Share of the split's problems whose answer is right."""
    problems = Arithmetic(split).problems(PROBLEMS)
    questions = [problem.question for problem in problems]
    samples = generator.generate(questions, max_new_tokens=4).samples
    right = [s.text.split(".")[0] == problem.answer for s, problem in zip(samples, problems, strict=True)]
    return float(np.mean(right))


def plain(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Greedy decoding as trained; and how far the weak passes are from the strong one."""
    loaded = mixture(seed, workdir, progress)
    generator = Generator(loaded.model, loaded.params, loaded.tokenizer)
    found = {f"{split} right": answered(generator, split) for split in ("validation", "test")}
    on_answers, elsewhere = divergences(loaded)
    return found | {
        "KL on answers": on_answers,
        "KL elsewhere": elsewhere,
        "budget": STEPS * BATCH * loaded.model.max_length,
        "bytes": count_bytes(loaded.params),
    }


def more(top: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """More experts than in training, greedy."""
    loaded = read(needs["greedy"].workdir)
    generator = Generator(with_ranks(loaded.model, MORE[top]), loaded.params, loaded.tokenizer)
    found = {f"{split} right": answered(generator, split) for split in ("validation", "test")}
    return found | {"budget": 0, "bytes": count_bytes(loaded.params)}


def contrast(
    weak: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """All betas on both splits, with one compiled program; what counts is the one that validation chooses."""
    loaded = read(needs["greedy"].workdir)
    model, params = self_contrast(loaded.model, loaded.params, weak=WEAK[weak], alpha=ALPHA, seed=seed)
    generator = Generator(model, params, loaded.tokenizer)
    by_beta: dict[str, list[float]] = {"validation": [], "test": []}
    for beta in BETAS:
        generator.params = generator.params | {"beta": jnp.float32(beta)}
        for split, shares in by_beta.items():
            shares.append(answered(generator, split))
    best = int(np.argmax(by_beta["validation"]))
    return {
        **{f"{split} right": shares[best] for split, shares in by_beta.items()},
        **{f"{split} by beta": shares for split, shares in by_beta.items()},
        "beta": BETAS[best],
        "budget": 0,
        "bytes": count_bytes(loaded.params),
    }


def divergences(loaded: Loaded) -> tuple[list[float], list[float]]:
    """Mean KL(strong || weak) in nats, a weak pass each, at tokens of answers and at all others."""
    source, tokenizer = Arithmetic("test"), loaded.tokenizer
    rows = np.zeros((16, loaded.model.max_length), np.int32)
    is_answer = np.zeros(rows.shape, bool)
    for i in range(len(rows)):
        ids: list[int] = [tokenizer.bos_id]
        marks = [False]
        for line in source[i].splitlines(keepends=True):
            question, answer = line[: line.rindex(" ") + 1], line[line.rindex(" ") + 1 :]
            for text, mark in ((question, False), (answer.split(".")[0], True), (".\n", False)):
                part = tokenizer.encode(text)
                ids += part
                marks += [mark] * len(part)
        rows[i], is_answer[i] = ids[: rows.shape[1]], marks[: rows.shape[1]]
    targets = is_answer[:, 1:]  # the token before predicts it

    @functools.partial(jax.jit, static_argnums=0)
    def log_p(model, params):
        return jax.nn.log_softmax(model.apply({"params": params}, rows))

    strong = log_p(loaded.model, loaded.params)
    on_answers, elsewhere = [], []
    for ranks in APART.values():
        weak = log_p(with_ranks(loaded.model, ranks), loaded.params)
        kl = np.asarray(jnp.sum(jnp.exp(strong) * (strong - weak), -1))[:, :-1]
        on_answers.append(float(kl[targets].mean()))
        elsewhere.append(float(kl[~targets].mean()))
    return on_answers, elsewhere


def right(results: Results, arm: str) -> float:
    """Share of right test answers, all seeds."""
    return float(np.mean(results[arm]["test right"]))


def interval(share: float, seeds: int) -> float:
    """Half of the 95% binomial interval of a share over the test problems of all seeds."""
    return 1.96 * math.sqrt(share * (1 - share) / (PROBLEMS * seeds))


def judge(results: Results) -> tuple[str, str]:
    """Holds if rank-2 contrast at the beta chosen on validation answers more test problems than greedy decoding and
    more experts do, outside the 95% interval of greedy, and KL grows with the rank and is larger on answers; partly
    if only the one or the other."""
    greedy, wider = right(results, "greedy"), [right(results, top) for top in MORE]
    half = interval(greedy, len(results["greedy"]["test right"]))
    answers = np.mean(results["greedy"]["KL on answers"], axis=0)
    others = np.mean(results["greedy"]["KL elsewhere"], axis=0)
    gains = right(results, "rank-2") > max(greedy + half, *wider)
    grows = bool(np.all(np.diff(answers) > 0) and np.all(np.diff(others) > 0))
    larger = bool(np.all(answers > others))
    verdict = "yes" if gains and grows and larger else "partly" if gains or (grows and larger) else "no"
    shown = ", ".join(
        f"{right(results, arm):.1%} with {arm} (beta {', '.join(f'{beta:g}' for beta in results[arm]['beta'])})"
        for arm in WEAK
    )
    more_shown = ", ".join(f"{share:.1%} with {top}" for top, share in zip(MORE, wider, strict=True))
    kl = ", ".join(f"{name} {a:.2f} and {b:.2f}" for name, a, b in zip(APART, answers, others, strict=True))
    return verdict, (
        f"Right answers to unseen problems: greedy {greedy:.1%} +- {half:.1%} (95% interval), {shown}, {more_shown}; "
        "each seed's beta is chosen on other problems. KL from the strong to the weak pass, on answers and elsewhere, "
        f"in nats: {kl}."
    )


def figure(results: Results, path: Path) -> None:
    """Right answers by beta, and how far the passes are apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (left, apart) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    greedy = right(results, "greedy")
    half = interval(greedy, len(results["greedy"]["test right"]))
    left.axhspan(greedy - half, greedy + half, color="C7", alpha=0.3, label="greedy, 95% interval")
    for arm in WEAK:
        left.plot(BETAS, np.mean(results[arm]["test by beta"], axis=0), "o-", label=arm)
    for top in MORE:
        left.axhline(right(results, top), linestyle=":", color="k", linewidth=0.8)
        left.annotate(top, (BETAS[-1], right(results, top)), fontsize=8, va="bottom", ha="right")
    left.set(xlabel="beta", ylabel="share of test problems right")
    left.legend(fontsize=8)
    places = np.arange(len(APART))
    for shift, name in ((-0.2, "KL on answers"), (0.2, "KL elsewhere")):
        apart.bar(places + shift, np.mean(results["greedy"][name], axis=0), 0.4, label=name[3:])
    apart.set_xticks(places, list(APART))
    apart.set(ylabel="KL(strong || weak), nats")
    apart.legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="scmoe",
    paper="arXiv 2405.14507, abstract, sections 2 and 4 and table 2",
    statement="Contrasting a mixture's logits with those of its rank-2 routing raises accuracy without training (GSM8K "
    "61.8 to 66.9), more than routing to more experts; the two passes differ more the worse the rank, and most where "
    "reasoning happens.",
    setting=f"Top-2 of 8 experts, 4 layers of width 128, 2.4M parameters, {STEPS} updates of {BATCH} x 128 tokens: "
    f"{' and '.join(f'{weight:g} parts {name}' for name, weight in SOURCES)} (the arithmetic is generated). "
    f"{PROBLEMS} unseen problems to choose beta and {PROBLEMS} to measure, a seed; alpha {ALPHA}, float32, greedy.",
    measures={
        "validation right": "share of the answers",
        "test right": "share of the answers",
        "beta": "best on validation",
        "validation by beta": f"share right: beta {BETAS}",
        "test by beta": f"share right: beta {BETAS}",
        "KL on answers": f"nats: {', '.join(APART)}",
        "KL elsewhere": f"nats: {', '.join(APART)}",
    },
    budget="training tokens",
    arms={
        "greedy": Arm(plain, "plain decoding, as trained"),
        **{top: Arm(functools.partial(more, top), "more experts, greedy", needs=("greedy",)) for top in MORE},
        **{
            arm: Arm(functools.partial(contrast, arm), f"self-contrast, betas {BETAS}", needs=("greedy",))
            for arm in WEAK
        },
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
