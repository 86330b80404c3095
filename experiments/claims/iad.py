"""IAD: the corrector that ships, decoded with the rest of its source as the draft, and where that can't help."""

import functools
import statistics
from pathlib import Path

from configs import iad as config
from experiments.claims import correcting
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.corrections import Corrections
from research.decoding.proposers import Plain, Proposer
from research.decoding.speculative.iad import IAD
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.language.encoder_decoder import SequenceToSequence
from research.nn.accounting import count_bytes
from research.training.loop import Trainer
from research.training.model_directory import Loaded
from research.training.optimizers import muon, wsd
from research.training.stages import Stage
from research.training.workdir import open_workdir

LINES = 24
MEASURED = ("tokens_per_call", "calls", "speed", "decoding", "equal", "exact", "edited")
REVERSED_STEPS = 250


def corrected(proposer: Proposer, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    """The corrector on lines with few and with many errors."""
    loaded = correcting.corrector()
    plain, found = correcting.generator(loaded), correcting.generator(loaded, proposer=proposer)
    measured, calls = {}, 0.0
    for done, (name, rate) in enumerate(correcting.RATES.items()):
        progress(done / len(correcting.RATES), f"{name} errors")
        values = correcting.measure(found, plain, correcting.lines(rate, seed, LINES))
        calls += LINES * values["calls"]
        measured |= {f"{key} {name}": values[key] for key in MEASURED}
    return {**measured, "budget": calls, "bytes": count_bytes(loaded.params)}


def backwards(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    """Another model, which writes lines backwards."""
    optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=20, decay=0.4, floor=0.02))
    data = dict(length=64, rates=(0.0, 0.0), tokenizer=correcting.BYTES, reverse=True, seed=seed)
    experiment = of(
        Trainer,
        task=of(SequenceToSequence, model=config.encoder_decoder(96, (2, 1), 4, 256, 64, vocab_size=259)),
        data=of(Corrections, **data),
        stages=(of(Stage, name="train", steps=REVERSED_STEPS, batch_size=16, optimizer=optimizer),),
        seed=seed,
        checkpoint_every=REVERSED_STEPS,
    )
    progress(0.05, f"{REVERSED_STEPS} steps")
    trainer = build(experiment)
    with open_workdir(workdir / "run", experiment) as run:
        state, _ = trainer.train(run, progress=False)
    progress(0.8, "decoding")
    ours = correcting.corrector()
    loaded = Loaded(
        trainer.task.model, state.params, ours.tokenizer, experiment.task.model, None, ours.inputs
    )
    plain = correcting.generator(loaded)
    found = correcting.generator(loaded, proposer=IAD(window=63))
    values = correcting.measure(found, plain, correcting.lines(0.0, seed, LINES, reverse=True))
    measured = {f"{key} reversed": values[key] for key in MEASURED}
    return {**measured, "budget": LINES * values["calls"], "bytes": count_bytes(state.params)}


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def judge(results: Results) -> tuple[str, str]:
    """Holds when every token is that of plain decoding, a line with few errors takes at most a fifth of the calls and a
    third of the time, and one with many still less of both. Partly, when tokens are the same and calls fewer."""
    arms = [arm for arm in results if arm != "IAD, reversed"]
    equal = min(
        *(min(results[arm][f"equal {rate}"]) for arm in arms for rate in correcting.RATES),
        min(results["IAD, reversed"]["equal reversed"]),
    )
    fewer = {rate: mean(results, "IAD", f"tokens_per_call {rate}") for rate in correcting.RATES}
    best = max(("IAD", "IAD, 16 ahead"), key=lambda arm: mean(results, arm, "speed 5%"))
    faster = {rate: mean(results, best, f"speed {rate}") for rate in correcting.RATES}
    lookup = {rate: mean(results, "prompt lookup", f"tokens_per_call {rate}") for rate in correcting.RATES}
    backward = mean(results, "IAD, reversed", "tokens_per_call reversed")
    slow = mean(results, "IAD, reversed", "speed reversed")
    holds = (
        equal == 1 and fewer["5%"] >= 5 and faster["5%"] >= 3 and min(*fewer.values(), *faster.values()) > 1
    )
    verdict = "yes" if holds else "partly" if equal == 1 and min(fewer.values()) > 1 else "no"
    return verdict, (
        f"tokens a call: {fewer['5%']:.1f} at 5 % errors and {fewer['25%']:.1f} at 25 % (prompt lookup, ten ahead: "
        f"{lookup['5%']:.1f} and {lookup['25%']:.1f}), {backward:.2f} for lines backwards; time on two cores "
        f"({best}): {faster['5%']:.1f} and {faster['25%']:.1f} times as fast as plain decoding, {slow:.2f} times "
        f"backwards; {equal:.0%} of the lines with the tokens of plain decoding. The paper has 7 to 9 times."
    )


def figure(results: Results, path: Path) -> None:
    """Tokens a call and speed for each way to draft, by error rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for panel, measure, label in zip(
        panels, ("tokens_per_call", "speed"), ("tokens a call", "times as fast as plain"), strict=True
    ):
        groups = [*correcting.RATES, "reversed"]
        for i, arm in enumerate(results):
            offset, label_ = 0.2 * (min(i, 3) - 1.5), arm
            for group, name in enumerate(groups):
                if (values := results[arm].get(f"{measure} {name}")) is not None:
                    place = group + offset
                    panel.bar(place, statistics.fmean(values), width=0.18, color=f"C{i}", label=label_)
                    panel.plot([place] * len(values), values, "k.", markersize=3)
                    label_ = None  # an arm is named once
        panel.axhline(1.0, color="0.6", linewidth=0.8)
        panel.set_xticks(range(len(groups)), ["5 % errors", "25 % errors", "backwards"])
        panel.set_ylabel(label)
    panels[0].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="iad",
    paper="arXiv 2205.10350, abstract and section 4.2",
    statement="Input-guided aggressive decoding makes sequence-to-sequence models whose output resembles their input 7 "
    "to 9 times as fast on a GPU, with output identical to greedy decoding.",
    setting=f"The corrector that ships (0.4M parameters, two encoder layers and one decoder layer, bytes) on {LINES} "
    "lines a seed of held-out files of Python's standard library, with 5 % and 25 % generated errors (letters swapped, "
    "dropped, doubled, of the other case), one line at a time on two CPU cores. As what IAD can't help: a model of the "
    f"same shape after {REVERSED_STEPS} updates on writing lines backwards. "
    "`calls` are a line's after prefill, `decoding` is the speed without it; "
    "`exact` is the share of lines that come out right, `edited` how much of the source the output changes.",
    measures={
        f"{key} {name}": unit
        for name in (*correcting.RATES, "reversed")
        for key, unit in {
            "tokens_per_call": "tokens",
            "calls": "a line",
            "speed": "times plain",
            "decoding": "times plain",
            "equal": "share of lines",
            "exact": "share of lines",
            "edited": "share of tokens",
        }.items()
    },
    budget="decoder calls",
    arms={
        "plain": Arm(functools.partial(corrected, Plain()), "one token a call"),
        "prompt lookup": Arm(
            functools.partial(corrected, PromptLookup()), "the longest n-gram that occurs before, ten tokens"
        ),
        "IAD": Arm(
            functools.partial(corrected, IAD(window=63)), "the whole rest of the source, as in the paper"
        ),
        "IAD, 16 ahead": Arm(
            functools.partial(corrected, IAD(window=16)), "the next 16 tokens of the source"
        ),
        "IAD, reversed": Arm(backwards, "another model, which writes lines backwards"),
    },
    judge=judge,
    figure=figure,
)
