"""GAD: a non-autoregressive drafter for the corrector that ships, and without each half of its training."""

import functools
import statistics
from pathlib import Path

from configs.gad import TARGET, network
from experiments.claims import correcting
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.corrections import Corrections
from research.decoding.speculative.gad import GAD
from research.decoding.speculative.training import DrafterTraining
from research.decoding.verify import TopBeta
from research.nn.accounting import count_bytes
from research.training.loop import Trainer
from research.training.optimizers import muon, wsd
from research.training.stages import Stage
from research.training.workdir import open_workdir

LINES, STEPS, BATCH, BLOCK = 24, 150, 16, 8
MEASURED = ("tokens_per_call", "speed", "decoding", "equal", "exact")


def drafted(
    glancing: bool, distilled: bool, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
):
    """Trains a drafter and decodes with it, exactly and by the relaxed rule."""
    records = STEPS * BATCH if glancing else None
    drafter = of(GAD, model=network(2), block=BLOCK, records=records, distilled=distilled)
    optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=20, decay=0.4, floor=0.02))
    stage = of(
        Stage, name="drafter", steps=STEPS, batch_size=BATCH, optimizer=optimizer, trainable=("^drafter/",)
    )
    experiment = of(
        Trainer,
        task=of(DrafterTraining, drafter=drafter, target=TARGET),
        data=of(Corrections, length=64, tokenizer=correcting.BYTES, seed=seed),
        stages=(stage,),
        seed=seed,
        checkpoint_every=STEPS,
    )
    progress(0.05, f"{STEPS} steps")
    trainer = build(experiment)
    with open_workdir(workdir / "run", experiment) as run:
        state, _ = trainer.train(run, progress=False)
    progress(0.7, "decoding")
    loaded, params = correcting.corrector(), state.params["drafter"]
    plain = correcting.generator(loaded)
    fields = dict(proposer=trainer.task.drafter, proposer_params=params)
    exact = correcting.generator(loaded, **fields)
    relaxed = correcting.generator(loaded, **fields, verifier=TopBeta(beta=5, gap=3.0))
    measured = {}
    for name, rate in correcting.RATES.items():
        pairs = correcting.lines(rate, seed, LINES)
        measured |= {
            f"{k} {name}": v for k, v in correcting.measure(exact, plain, pairs).items() if k in MEASURED
        }
        loose = correcting.measure(relaxed, plain, pairs)
        measured |= {f"relaxed {k} {name}": v for k, v in loose.items() if k in MEASURED}
    return {**measured, "budget": STEPS * BATCH, "bytes": count_bytes(params)}


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def judge(results: Results) -> tuple[str, str]:
    """Holds when all output is plain decoding's, the drafter gives at least two tokens a call and saves time, and both
    halves of its training help; partly when the output is the same and calls are fewer."""
    equal = min(min(results[arm][f"equal {rate}"]) for arm in results for rate in correcting.RATES)
    tokens = {
        arm: statistics.fmean(mean(results, arm, f"tokens_per_call {rate}") for rate in correcting.RATES)
        for arm in results
    }
    speed = statistics.fmean(mean(results, "GAD", f"speed {rate}") for rate in correcting.RATES)
    relaxed = {
        key: statistics.fmean(mean(results, "GAD", f"{key} {rate}") for rate in correcting.RATES)
        for key in ("relaxed tokens_per_call", "relaxed equal", "relaxed exact", "exact")
    }
    ablated = [tokens["no glancing"], tokens["no distilled targets"]]
    tests = [equal == 1, tokens["GAD"] >= 2, speed > 1, tokens["GAD"] > max(ablated)]
    verdict = "yes" if all(tests) else "partly" if tests[0] and tokens["GAD"] > 1.5 else "no"
    return verdict, (
        f"{tokens['GAD']:.2f} tokens a call (paper: 4 to 6), {ablated[0]:.2f} without glancing and {ablated[1]:.2f} "
        f"without distilled targets; {speed:.2f} times as fast as plain decoding on two cores (paper, on a GPU: 3 to "
        f"5); {equal:.0%} of the lines with the tokens of plain decoding. GAD++, which is not lossless: "
        f"{relaxed['relaxed tokens_per_call']:.2f} tokens a call, {relaxed['relaxed equal']:.0%} of the lines "
        f"unchanged, {relaxed['relaxed exact']:.0%} right instead of {relaxed['exact']:.0%}."
    )


def figure(results: Results, path: Path) -> None:
    """Tokens a call of the drafters, with the exact and the relaxed rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(7, 3.8), constrained_layout=True)
    groups = [(rule, rate) for rate in correcting.RATES for rule in ("", "relaxed ")]
    for i, arm in enumerate(results):
        for g, (rule, rate) in enumerate(groups):
            values = results[arm][f"{rule}tokens_per_call {rate}"]
            place = g + 0.25 * (i - 1)
            panel.bar(place, statistics.fmean(values), width=0.22, color=f"C{i}", label=None if g else arm)
            panel.plot([place] * len(values), values, "k.", markersize=3)
    panel.set_xticks(range(len(groups)), [f"{'GAD++' if rule else 'exact'}, {rate}" for rule, rate in groups])
    panel.axhline(1.0, color="0.6", linewidth=0.8)
    panel.set_ylabel("tokens a call")
    panel.legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="gad",
    paper="arXiv 2205.10350, abstract and section 4.3",
    statement="Generalized aggressive decoding makes sequence-to-sequence models 3 to 5 times as fast with output "
    "identical to greedy decoding, and faster still with nearly the same quality when verification is relaxed.",
    setting=f"The corrector that ships, and a drafter with its encoder and two decoder layers that fills {BLOCK} "
    f"bytes, after {STEPS} updates of {BATCH} corrupted lines; decoded are {LINES} lines a seed of held-out files of "
    "Python's standard library, with 5 % and 25 % generated errors, one at a time on two CPU cores"
    " (`decoding`: without prefill). GAD++ takes a "
    "token that is among the five most probable and within 3 nats of the best. All arms have the same updates.",
    measures={
        f"{rule}{key} {name}": unit
        for name in correcting.RATES
        for rule in ("", "relaxed ")
        for key, unit in {
            "tokens_per_call": "tokens",
            "speed": "times plain",
            "decoding": "times plain",
            "equal": "share of lines",
            "exact": "share of lines",
        }.items()
    },
    budget="training lines",
    arms={
        "GAD": Arm(functools.partial(drafted, True, True), "glancing, the target's own output to learn from"),
        "no glancing": Arm(functools.partial(drafted, False, True), "all masked places are learned at once"),
        "no distilled targets": Arm(functools.partial(drafted, True, False), "learns the corpus' lines"),
    },
    judge=judge,
    figure=figure,
)
