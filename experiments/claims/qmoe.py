"""QMoE on a switch transformer of bytes: ternary experts, with the error fed back and without, at the bits they take.

Only experts are compressed, 16.8M of the 19M parameters, in rows of 1024 weights. Bits are those of the stored arrays,
codes, offsets and ends, and of the dictionary, spread over the experts of this one small model; no entropy is quoted.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.qmoe import switch
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from experiments.claims.matformer import byte_tokenizer
from research.compression.baselines import GPTQ, RoundToNearest
from research.compression.blocks import plain, replace
from research.compression.chain import Chain, Method
from research.compression.qmoe import EXPERTS, QMoE
from research.config import build, of
from research.data.text import TokenDataset
from research.data.tokenizer import Tokenizer
from research.nn.accounting import count_bytes
from research.nn.ternary import TernaryCode, dictionary_bits
from research.nn.weights import stored_bits
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir

WIDTH, HIDDEN, NUMBER = 1024, 1024, 8
LENGTH, BATCH, STEPS = 128, 8, 600
CALIBRATION, HELD_OUT = 256, 64  # rows
DRAWS = 2  # of calibration text
NAMES = ("up", "down")


def train(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The model, in floats."""
    heads = dict(num_heads=4, head_dim=32)
    model = switch(WIDTH, HIDDEN, NUMBER, heads, 2, LENGTH, vocab_size=259, dense=256)
    tokenizer = byte_tokenizer(workdir)
    optimizer = of(adamw, schedule=of(cosine, peak=2e-3, warmup=20, floor=0.05))
    config = of(
        Trainer,
        task=of(LanguageModelling, model=model),
        data=of(TokenDataset, length=LENGTH, tokenizer=tokenizer, seed=seed),
        stages=(of(Stage, name="train", steps=STEPS, batch_size=BATCH, optimizer=optimizer),),
        seed=seed,
    )
    progress(0.05, "training")
    with open_workdir(workdir / "run", config) as place:
        state, _ = build(config).train(place, progress=False)
    task = build(config.task)
    # How much there is to lose: the same model whose experts say nothing.
    silent = replace(
        state.params, {f"layer_1/mlp/experts/{name}/kernel": 0 * kernel(state.params, name) for name in NAMES}
    )
    without = {"without experts": nats(task.model, silent, tokenizer)}
    return measured(task.model, state.params, tokenizer) | without | {"budget": STEPS * BATCH * LENGTH}


def compress(
    method: Method, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """The trained model after a method; loss is the mean over draws of the text that is observed."""
    loaded = load_model(needs["float"].workdir / "run")
    tokenizer = byte_tokenizer(workdir)
    found = []
    for draw in range(DRAWS if method.needs_data else 1):
        progress(0.1 + draw / DRAWS, "compressing")
        text = dict(tokens=CALIBRATION * LENGTH, length=LENGTH, batch_size=32, seed=1000 * (draw + 1) + seed)
        chain = Chain((method,), **text)
        batches = chain.batches(loaded.model, Tokenizer.load(tokenizer)) if chain.needs_data else []
        (step,) = chain.run(loaded.model, loaded.params, batches)
        found.append(measured(loaded.model, step.params, tokenizer))
    losses = [one["loss"] for one in found]
    return found[0] | {
        "loss": float(np.mean(losses)),
        "loss by draw": losses,
        "budget": len(batches) * 32 * LENGTH,
    }


def kernel(params: Any, name: str) -> Any:
    return params["layer_1"]["mlp"]["experts"][name]["kernel"]


def measured(model: Any, params: Any, tokenizer: str) -> dict[str, Any]:
    """Nats a byte, and bits of an expert's weight: over all, by matrix, and the share of zeros."""
    experts = params["layer_1"]["mlp"]["experts"]
    sizes = [np.prod(experts[name]["kernel"].shape) for name in NAMES]
    bits = [stored_bits(experts[name]) for name in NAMES]
    found = {
        "loss": nats(model, plain(params), tokenizer),
        "bits": (sum(bits) + dictionary_bits(experts)) / sum(sizes),
        "bits by matrix": [float(b / s) for b, s in zip(bits, sizes, strict=True)],
        "bytes": count_bytes(params),
    }
    if isinstance(experts["up"]["kernel"], TernaryCode):
        found["zeros"] = [float(np.mean(np.asarray(plain(experts[name])["kernel"]) == 0)) for name in NAMES]
    return found


@functools.cache
def evaluation(model: Any) -> Any:
    """Compiled once for all arms."""
    return jax.jit(LanguageModelling(model).evaluate)


def nats(model: Any, params: Any, tokenizer: str) -> float:
    data = TokenDataset("builtin", "test", LENGTH, tokenizer, shuffle=False)
    found = [
        evaluation(model)(params, data.take(np.arange(at, at + 16)))["loss"] for at in range(0, HELD_OUT, 16)
    ]
    return float(sum(total for total, _ in found) / sum(weight for _, weight in found))


METHODS = {
    "ternary, nearest": QMoE(feedback=False),
    "QMoE": QMoE(),
    "2 bits, nearest": RoundToNearest(2, select=EXPERTS),
    "2 bits, GPTQ": GPTQ(2, damp=0.1, order=False, select=EXPERTS),
}


def mean(results: Results, arm: str, name: str, place: int | None = None) -> float:
    values = results[arm][name]
    return float(np.mean(values if place is None else [value[place] for value in values]))


def judge(results: Results) -> tuple[str, str]:
    """Four parts: an expert's weight takes less than one bit, everything counted; QMoE closes at least half of the gap
    that rounding to nearest leaves; 2 bits lose less; QMoE loses at most 15 % of the loss in floats, as the paper's
    smallest model does. Yes if all hold, no if fewer than two."""
    loss = {arm: mean(results, arm, "loss") for arm in results}
    gap, left = loss["ternary, nearest"] - loss["float"], loss["QMoE"] - loss["float"]
    bits = {arm: mean(results, arm, "bits") for arm in METHODS}
    parts = {
        "bits": bits["QMoE"] < 1,
        "closed": left <= 0.5 * gap,
        "two": loss["2 bits, GPTQ"] < loss["QMoE"],
        "minor": left <= 0.15 * loss["float"],
    }
    verdict = "yes" if all(parts.values()) else "partly" if sum(parts.values()) >= 2 else "no"
    rows = "; ".join(f"{arm} {loss[arm]:.3f} at {bits[arm]:.3f} bits" for arm in METHODS)
    silent = mean(results, "float", "without experts")
    matrices = " and ".join(
        f"{mean(results, 'QMoE', 'bits by matrix', i):.3f} ({name}, {mean(results, 'QMoE', 'zeros', i):.1%} zeros)"
        for i, name in enumerate(NAMES)
    )
    return verdict, (
        f"Nats a byte: float {loss['float']:.3f} at 32 bits ({silent:.3f} with silent experts); {rows}, "
        f"with the dictionary. By matrix it takes {matrices} without it. "
        f"It closes {1 - left / gap:.0%} of the gap of rounding to nearest."
    )


def figure(results: Results, path: Path) -> None:
    """Loss against bits of an expert's weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    for arm, colour in zip(METHODS, ("C7", "C3", "C0", "C1"), strict=True):
        panel.plot(results[arm]["bits"], results[arm]["loss"], "o", color=colour, label=arm)
    panel.axhline(mean(results, "float", "loss"), color="k", linestyle=":", label="float, 32 bits")
    panel.axvline(1.0, color="0.8")
    panel.set(xlabel="bits of an expert's weight, all counted", ylabel="nats a byte, held out")
    panel.legend()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="qmoe",
    paper="arXiv 2310.16795, abstract and tables 2 to 5",
    statement="Experts of switch transformers are compressed to less than one bit a parameter, 20 times, at a minor "
    "loss of accuracy; rounding to nearest at ternary precision is far worse.",
    setting=f"A decoder of bytes of Python's standard library, width {WIDTH}, a dense and a switch layer of {NUMBER} "
    f"experts of {HIDDEN} units, trained for {STEPS} updates of {BATCH} x {LENGTH}; calibrated on {CALIBRATION} rows "
    f"of training text, measured on {HELD_OUT} held-out. GPTQ at 2 bits has the same damping and a grid a row. "
    "There is one trained model; what observes text is the mean over two draws of it. Speed is not claimed: a CPU "
    "decodes more slowly than it reads.",
    measures={
        "loss": "nats/byte",
        "loss by draw": "nats/byte",
        "without experts": "nats/byte",
        "bits": "bits",
        "bits by matrix": "bits",
        "zeros": "share, by matrix",
    },
    budget="tokens trained on, or observed",
    arms={"float": Arm(train, "as trained")}
    | {
        name: Arm(functools.partial(compress, method), text, ("float",))
        for (name, method), text in zip(
            METHODS.items(),
            (
                "0 and the ends of a row, the nearest",
                "0 and the ends of a row, the error fed back",
                "4 values of a row, the nearest",
                "4 values of a row, the error fed back",
            ),
            strict=True,
        )
    },
    judge=judge,
    figure=figure,
    seeds=(0,),
)
